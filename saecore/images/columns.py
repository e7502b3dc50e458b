"""Which columns of a Parquet file hold encoded images, and which their names."""

import pyarrow as pa

_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "data", "content")
_KEY_COLUMNS = ("key", "__key__", "id", "image_id", "url", "file_name", "path")


def image_column(uri: str, columns: pa.Schema, asked: str | None) -> str:
    """The column of encoded images: binary, or Hugging Face's struct of bytes and path.

    ValueError if there is none, if there are several and no name says which, or if the one that is asked for cannot be.
    """
    able = [field.name for field in columns if _holds_images(field.type)]
    if asked is not None:
        # Of one length for all: not what encoded images are, so taken if it is asked for and never guessed.
        if asked in able or (asked in columns.names and pa.types.is_fixed_size_binary(columns.field(asked).type)):
            return asked
        raise ValueError(f"--image-column {asked}: {uri} has no such column of encoded images; {_described(columns)}")
    preferred = [name for name in _IMAGE_COLUMNS if name in able]
    if not able:
        raise ValueError(f"{uri}: no column of it holds encoded images; {_described(columns)}")
    if not preferred and len(able) > 1:
        raise ValueError(f"{uri}: which column holds the images? Name one of {', '.join(able)} with --image-column")
    return (preferred or able)[0]


def _described(columns: pa.Schema) -> str:
    held = [f"{field.name} ({str(field.type)[:60]})" for field in columns]
    named = ", ".join(held[:20]) + (f" and {len(held) - 20} more" if len(held) > 20 else "")
    return f"needed is binary, or a struct with a binary field named bytes, and there are: {named or 'none'}"


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    kind = _value_type(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _value_type(kind: pa.DataType) -> pa.DataType:
    """What a column holds, whether or not each value is stored once and pointed at."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def key_column(columns: pa.Schema) -> str | None:
    """The column that names the images, if there is one of text or numbers."""
    return next((name for name in _KEY_COLUMNS if name in columns.names and _is_plain(columns.field(name).type)), None)


def _is_plain(kind: pa.DataType) -> bool:
    kind = _value_type(kind)
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return texts or pa.types.is_integer(kind)
