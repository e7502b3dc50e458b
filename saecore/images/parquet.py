"""Parquet shards with a column of encoded images: choose that column, count its rows, and read some of them.

A column of images is binary, or Hugging Face's struct of `bytes` and `path`. An image is named by that path, by a column of
keys (`_KEY_COLUMNS`), or by its row.

Reading decodes whole row groups up to the last row that is asked for, since Parquet cannot seek to a row. A null is `no-data`,
and rows whose pages are damaged are `unreadable`. pyarrow raises OSError for those and for storage that fails alike:
`WatchedFile` tells the two apart, and failures of the storage are raised.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from saecore.images.items import READ_AHEAD, Item, Scan, read_item

ROWS_AT_ONCE = 16
"""Rows that are decoded at once: an image can have many megabytes."""

_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "data", "content")
_KEY_COLUMNS = ("key", "__key__", "id", "image_id", "url", "file_name", "path")


def scan(uri: str, file: pa.NativeFile, column: str | None) -> Scan:
    """The rows of a Parquet file and its column of images, from the footer."""
    watched = WatchedFile(file)
    try:
        parquet = pq.ParquetFile(watched)
    except (OSError, pa.ArrowException) as error:
        if watched.failed:
            raise
        return Scan(0, [], None, f"not a Parquet file: {' '.join(str(error).split())}")
    return Scan(parquet.metadata.num_rows, [], image_column(uri, parquet.schema_arrow, column), None)


def read(file: pa.NativeFile, column: str, wanted: Sequence[int]) -> Iterator[tuple[int, Item]]:
    """The wanted rows of a Parquet file whose images are in `column`; none if it has changed and can no longer be read."""
    watched = WatchedFile(file)
    try:
        parquet = pq.ParquetFile(watched, buffer_size=READ_AHEAD, pre_buffer=False)
    except (OSError, pa.ArrowException):
        if watched.failed:
            raise
        return
    if column not in parquet.schema_arrow.names:
        return
    first = 0
    for group in range(parquet.num_row_groups):
        end = first + parquet.metadata.row_group(group).num_rows
        if rows := _between(wanted, first, end):
            yield from _read_group(watched, parquet, group, first, column, rows)
        first = end


def _read_group(
    watched: "WatchedFile", parquet: pq.ParquetFile, group: int, first: int, column: str, wanted: Sequence[int]
) -> Iterator[tuple[int, Item]]:
    """The wanted rows of a row group that begins with row `first` of the file."""
    key = key_column(parquet.schema_arrow)
    columns = [column] if key is None else [column, key]
    position = first
    detail = f"row group {group}: it holds fewer rows than the footer says"
    try:
        how = {"row_groups": [group], "columns": columns, "use_threads": False}  # see `saecore.storage.table_of`
        for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE, **how):
            for index, row in _rows(batch, position, _between(wanted, position, position + batch.num_rows)):
                yield index, _item(row[column], None if key is None else row[key], index)
            position += batch.num_rows
            if position > wanted[-1]:
                return
    except (OSError, pa.ArrowException) as error:
        if watched.failed:
            raise
        detail = f"row group {group}: {' '.join(str(error).split())}"
    for index in _between(wanted, position, wanted[-1] + 1):
        yield index, Item(str(index), None, "unreadable", detail)


def _rows(batch: pa.RecordBatch, position: int, wanted: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
    """The wanted rows of a batch whose first row is row `position` of the file."""
    if not wanted:
        return []
    rows = batch.slice(wanted[0] - position, wanted[-1] - wanted[0] + 1).to_pylist()
    return [(index, rows[index - wanted[0]]) for index in wanted]


def _between(wanted: Sequence[int], first: int, end: int) -> Sequence[int]:
    """The wanted places from `first` up to `end`, which is not one of them."""
    return wanted[bisect_left(wanted, first) : bisect_left(wanted, end)]


def _item(value: bytes | dict[str, Any] | None, key: object, row: int) -> Item:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    name = str(path or (row if key is None else key))
    if data is None:
        return Item(name, None, "no-data", "null")
    return read_item(name, len(data), lambda size: data)


class WatchedFile:
    """A file that remembers whether reading it failed."""

    def __init__(self, file: pa.NativeFile) -> None:
        self.file = file
        self.failed = False
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        """As of any file."""
        try:
            return self.file.read(size)
        except OSError:
            self.failed = True
            raise

    def seek(self, position: int, whence: int = 0) -> int:
        """As of any file."""
        return self.file.seek(position, whence)

    def tell(self) -> int:
        """As of any file."""
        return self.file.tell()

    def close(self) -> None:
        """Nothing: the file belongs to whoever opened it."""
        self.closed = True


# ---- Columns.


def image_column(uri: str, columns: pa.Schema, asked: str | None) -> str:
    """The column of encoded images.

    ValueError if there is none, if there are several and no name says which, or if the one that is asked for cannot be it.
    """
    able = [field.name for field in columns if _holds_images(field.type)]
    if asked is not None:
        # Encoded images differ in length, so a column of one length is taken if it is asked for and never guessed.
        if asked in able or (asked in columns.names and pa.types.is_fixed_size_binary(columns.field(asked).type)):
            return asked
        raise ValueError(f"image_column {asked}: {uri} has no such column of encoded images; {_described(columns)}")
    preferred = [name for name in _IMAGE_COLUMNS if name in able]
    if not able:
        raise ValueError(f"{uri}: no column of it holds encoded images; {_described(columns)}")
    if not preferred and len(able) > 1:
        raise ValueError(f"image_column: which column of {uri} holds the images? Name one of {', '.join(able)}")
    return (preferred or able)[0]


def key_column(columns: pa.Schema) -> str | None:
    """The column that names the images, if there is one of text or numbers."""
    return next((name for name in _KEY_COLUMNS if name in columns.names and _is_plain(columns.field(name).type)), None)


def _described(columns: pa.Schema) -> str:
    fields = [f"{field.name} ({str(field.type)[:60]})" for field in columns]
    listed = ", ".join(fields[:20]) + (f" and {len(fields) - 20} more" if len(fields) > 20 else "")
    return f"needed is binary, or a struct with a binary field named bytes, and there are: {listed or 'none'}"


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    kind = _value_type(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _value_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values, where each is stored once and pointed at (a dictionary) too."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_plain(kind: pa.DataType) -> bool:
    kind = _value_type(kind)
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return texts or pa.types.is_integer(kind)
