"""Bytes and CPU time of an image's maps in a chunk's file, for each way that Parquet could store them.

    now                    `saecore.runs.files.parquet_bytes`
    ZSTD 1 .. 12, codecs   the same encodings, compressed otherwise
    split, differences     ZSTD 1, one column encoded otherwise; DuckDB reads no maps that are split, DuckDB 1.2 no latents
    the last rows          no files: the values as they are, after transforms that plain readers could not undo; the entropy

CPU time is of one thread, the least of several rounds.

Left out: maps of trained towers of the true shapes. Maps of random weights are nearly noise, and no way makes noise small.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.maps import SHAPES, random_models, tower_in
from saecore import schema
from saecore.pipeline.inference import Inference, Inferred
from saecore.runs.files import ROW_GROUP_ROWS, parquet_bytes

LEVELS = (1, 3, 6, 9, 12)
CODECS = (("brotli", 5), ("gzip", 6), ("lz4", None), ("none", None))
SPLIT = "BYTE_STREAM_SPLIT"


class Row(NamedTuple):
    """One way; bytes and CPU milliseconds of an image."""

    way: str
    size: float
    maps: float
    """Bytes of the column of maps only."""
    write: float | None
    read: float | None


def measure(maps: pa.Table, rounds: int) -> list[Row]:
    """Rows of all ways to store a table of maps (schema.maps_schema)."""
    images = len(maps["image_id"].unique())
    rows = []
    for way, encode in ways().items():
        writing, data = least(functools.partial(encode, maps), rounds)
        reading, back = least(functools.partial(read_back, data), rounds)
        assert back.equals(maps)
        rows.append(Row(way, data.size / images, column(data) / images, 1e3 * writing / images, 1e3 * reading / images))
    for way, size in transformed(maps).items():
        rows.append(Row(way, rows[0].size - rows[0].maps + size / images, size / images, None, None))
    return rows


def ways() -> dict[str, Callable[[pa.Table], pa.Buffer]]:
    """Every way that a file can be written, by name."""
    said: dict[str, dict[str, Any]] = {f"ZSTD {level}": {"compression_level": level} for level in LEVELS}
    said |= {
        f"{name} {level or ''}".strip(): {"compression": name, "compression_level": level} for name, level in CODECS
    }
    said["maps split, ZSTD 1"] = {"more": {"map": SPLIT}}
    said["floats plain, ZSTD 1"] = {"less": pa.float32()}
    said["latents as differences, ZSTD 1"] = {"more": {"latent": "DELTA_BINARY_PACKED"}}
    said["latents split, ZSTD 1"] = {"more": {"latent": SPLIT}}
    now = {"now": lambda table: parquet_bytes(table, ROW_GROUP_ROWS["maps"])}
    return now | {name: functools.partial(written, **how) for name, how in said.items()}


def written(
    table: pa.Table,
    compression: str = "zstd",
    compression_level: int | None = 1,
    more: dict[str, str] | None = None,
    less: pa.DataType | None = None,
) -> pa.Buffer:
    """A file as `parquet_bytes` makes it, but for the codec, for `more` encodings, and `less` those of a type."""
    encoded = {"image_id": "DELTA_BINARY_PACKED"} | {
        f.name: SPLIT for f in table.schema if f.type == pa.float32() != less
    }
    encoded |= more or {}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_ROWS["maps"],
        compression=compression,
        compression_level=compression_level,
        use_dictionary=[name for name in ("latent", "target", "method") if name not in encoded],
        column_encoding=encoded,
        write_page_checksum=True,
        write_statistics=[name for name in table.column_names if name != "map"],
    )
    return sink.getvalue()


def transformed(maps: pa.Table) -> dict[str, float]:
    """Bytes of the column of maps after transforms that plain readers could not undo, and the entropy of single values."""
    stored = np.frombuffer(b"".join(maps["map"].to_pylist()), np.uint8).reshape(len(maps), -1)
    planes = np.packbits((stored[None] >> np.arange(8, dtype=np.uint8)[:, None, None]) & 1)
    differences = stored.copy()
    differences[:, 1:] -= stored[:, :-1]
    share = np.bincount(stored.ravel(), minlength=256) / stored.size
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum() / 8 * stored.size
    sizes = {
        name: float(len(pa.compress(v.tobytes(), "zstd")))
        for name, v in (("bit planes", planes), ("differences", differences))
    }
    return {"raw int8": float(stored.size), "raw float32": 4.0 * stored.size, **sizes, "entropy": float(entropy)}


def read_back(data: pa.Buffer) -> pa.Table:
    """All of a file."""
    return pq.read_table(pa.BufferReader(data), use_threads=False)


def column(data: pa.Buffer) -> int:
    """Bytes of the column of maps in a file."""
    footer = pq.ParquetFile(pa.BufferReader(data)).metadata
    place = footer.schema.to_arrow_schema().get_field_index("map")
    return sum(footer.row_group(number).column(place).total_compressed_size for number in range(footer.num_row_groups))


def least(step: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """The least CPU seconds of several rounds, and what the step returns."""
    taken, made = [], None
    for _ in range(rounds):
        started = time.process_time()
        made = step()
        taken.append(time.process_time() - started)
    return min(taken), made


def random_maps(name: str, images: int, k: int) -> pa.Table:
    """Maps by contrib of crops of photographs, by a tower of this shape with random weights: the rows of a chunk."""
    shape = SHAPES[name]
    model, sae = random_models(shape, 6144, k, "cpu")
    infer = Inference(tower_in("float32", model, shape), sae, k, ("contrib",), "cpu")
    pixels = crops(images, shape.image_size)
    batches = [infer(pixels[first : first + shape.batch]) for first in range(0, images, shape.batch)]
    of = {field: np.concatenate([getattr(batch, field) for batch in batches]) for field in Inferred._fields}
    n_patches = of["map"].shape[-1]
    kind = schema.maps_schema(n_patches)
    columns = {
        "image_id": np.repeat(np.arange(images), k),
        "latent": of["target_latent"].ravel(),
        "target": pa.nulls(images * k, pa.string()),
        "method": ["contrib"] * (images * k),
        "map": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(n_patches), images * k, [None, pa.py_buffer(of["map"].tobytes())]
        ),
        "pre_activation": of["map_pre_activation"].ravel(),
        **{field: of[field].ravel() for field in ("scale", "remainder", "sink_share")},
    }
    return pa.Table.from_arrays([pa.array(columns[field.name], field.type) for field in kind], schema=kind)


def crops(images: int, size: int) -> np.ndarray:
    """Random squares of photographs that scikit-image carries, uint8 (images, size, size, 3)."""
    import skimage.data

    photographs = [getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    random, squares = np.random.default_rng(0), []
    for number in range(images):
        picture = photographs[number % len(photographs)]
        side = int(random.integers(size, min(picture.shape[:2]) + 1))
        top, left = (int(random.integers(0, extent - side + 1)) for extent in picture.shape[:2])
        square = picture[top : top + side, left : left + side]
        squares.append(np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(squares)


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| | bytes | of them maps | write, ms | read, ms |", "|---|---|---|---|---|"]
    for row in rows:
        times = ("" if value is None else f"{value:.3f}" for value in (row.write, row.read))
        lines.append(f"| {row.way} | {row.size:,.0f} | {row.maps:,.0f} | {' | '.join(times)} |")
    return "\n".join(lines)
