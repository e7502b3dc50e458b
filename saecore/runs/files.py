"""The tables of a run, as files: which files hold what, through the manifest, and how they are written.

    RUN/images/chunk-00000017.parquet, activations/.., maps/..      one file per chunk and table
    RUN/plan.parquet        the chunks (schema.PLAN)
    RUN/manifest.parquet    every file of a complete run (`MANIFEST`)

Left out: the table `latents`, which is one file and has writers of its own (`saecore.runs.latents`).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from saecore import numbering
from saecore.storage import Place, join_uri, read_parquet, write_atomic

EXPLAINED = ("images", "activations", "maps")
"""The tables of a run of jobs.explain."""

TABLES = (*EXPLAINED, "faithfulness", "curves")
"""The tables that a run may have. Which it has follows from the payload that is written."""

# The rows of one image should be one small read, the scan of a table few large reads.
ROW_GROUP_ROWS = {
    "images": 4096,
    "activations": 131_072,
    "maps": 2048,
    "faithfulness": 131_072,
    "curves": 16_384,
}

ROW_GROUP_BYTES = 1 << 26
"""A row group has fewer rows where these would be larger in memory: vectors of 197 tokens are 600 kB an image."""

MANIFEST = pa.schema(
    [
        pa.field("chunk_id", pa.int64(), nullable=False),
        pa.field("table", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),  # below the run
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


def read_plan(uri: str) -> pa.Table:
    """All chunks of a run (schema.PLAN)."""
    return read_file(uri, "plan.parquet")


def read_lengths(uri: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all chunks, rising, and how many images each stands for, int64 both, without the rest of the plan."""
    with Place(join_uri(uri, "plan.parquet")).open_parquet() as file:
        known = [name for name in ("chunk_id", "start", "end", "only") if name in file.schema_arrow.names]
    plan = read_file(uri, "plan.parquet", known).sort_by("chunk_id")
    return plan["chunk_id"].to_numpy(), numbering.lengths(plan)


def write_plan(uri: str, plan: pa.Table) -> None:
    """Make this the plan of a run."""
    write_atomic(join_uri(uri, "plan.parquet"), parquet_bytes(plan, 65_536))


def read_manifest(uri: str) -> pa.Table:
    """Every file of a complete run (MANIFEST)."""
    return read_file(uri, "manifest.parquet")


def of_chunks(manifest: pa.Table, chunk_ids: np.ndarray) -> pa.Table:
    """The rows of a manifest that belong to some chunks."""
    return manifest.filter(pc.is_in(manifest["chunk_id"], pa.array(chunk_ids, pa.int64())))


def open_dataset(uri: str, table: str, manifest: pa.Table | None = None) -> pyarrow.dataset.Dataset:
    """One table of a complete run, one of `TABLES`, or the part in some rows of its manifest."""
    files = read_manifest(uri) if manifest is None else manifest
    place = Place(uri)
    names = files.filter(pc.equal(files["table"], table))["path"].to_pylist()
    return place.dataset([f"{place.path}/{name}" for name in names])


def of_images(image_ids: np.ndarray) -> pyarrow.dataset.Expression:
    """The rows of some images, as a filter of a data set.

    A list is copied into Arrow's memory; an array of NumPy's would be shared, and Arrow's threads let go of it some time after
    the answer (7 of 100 times). If Python ends just then, the process aborts (45 of 360 times in a trial).
    """
    return pc.field("image_id").isin(pa.array(image_ids.tolist(), pa.int64()))


def scan_table(uri: str, table: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a table of a complete run, in the order of the chunks and of their images, a row group at a time."""
    manifest = read_manifest(uri)
    for name in manifest.filter(pc.equal(manifest["table"], table))["path"].to_pylist():
        with Place(join_uri(uri, name)).open_parquet() as file:
            for group in range(file.num_row_groups):
                yield from file.iter_batches(ROW_GROUP_ROWS[table], row_groups=[group], columns=columns)


def row_group_rows(name: str, table: pa.Table) -> int:
    """How many of its rows make a row group of the table of that name."""
    of_one = max(1, table.nbytes // max(1, table.num_rows))
    return min(ROW_GROUP_ROWS[name], max(1, ROW_GROUP_BYTES // of_one))


def chunk_file(table: str, chunk_id: int, again: int = 0) -> str:
    """Where the run keeps a chunk's rows of a table, below its own folder; each time it is done `again`, under another name."""
    return f"{table}/chunk-{chunk_id:08d}{f'-{again}' if again else ''}.parquet"


def done_again(manifest: pa.Table) -> np.ndarray:
    """The ids of the chunks that were done again, by the names of their files."""
    rows = manifest.filter(pc.match_substring_regex(manifest["path"], r"/chunk-\d+-\d+\.parquet$"))
    return np.unique(rows["chunk_id"].to_numpy())


def replaced(before: pa.Table, rows: pa.Table, image_ids: pa.ChunkedArray) -> pa.Table:
    """A table of a chunk in which `rows` stand for all that it had of some images; in the order of image_id."""
    kept = before.filter(pc.invert(pc.is_in(before["image_id"], image_ids.combine_chunks())))
    whole = pa.concat_tables([kept, rows.cast(before.schema)])
    return whole.take(pc.sort_indices(whole["image_id"]))  # stable: an image's rows stay in their order


def parquet_bytes(table: pa.Table, row_group_rows: int) -> pa.Buffer:
    """A Parquet file in memory (a chunk's file is a few MB), so that it is hashed and written in one piece.

    Floats, those of embeddings too, are byte-stream-split, and ids are stored as differences. At level 12 of ZSTD, maps are
    only 1 % smaller than at level 1 (`python -m benchmarks storage`). Statistics of a column of maps help no question, and
    would be a third of the footer.
    """
    encodings = {pa.float32(): "BYTE_STREAM_SPLIT", pa.int64(): "DELTA_BINARY_PACKED"}
    encoded = {field.name: encodings[field.type] for field in table.schema if field.type in encodings}
    lists = [field.name for field in table.schema if field.type == pa.list_(pa.float32())]
    encoded |= {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in lists}
    repeating = [field.name for field in table.schema if field.type in (pa.string(), pa.int16(), pa.int32())]
    told = [field.name for field in table.schema if not pa.types.is_fixed_size_binary(field.type)]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_rows,
        compression="zstd",
        compression_level=1,
        use_dictionary=repeating,
        column_encoding=encoded,
        write_page_checksum=True,
        write_statistics=told,
    )
    return sink.getvalue()


def read_file(uri: str, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One Parquet file below the run: all of it, or some columns."""
    return read_parquet(join_uri(uri, name), columns)
