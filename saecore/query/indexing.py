"""Make by_latent/: sort a run's activations by latent, and copy what it takes to show each latent's first images.

    update_of -> build_segment, once for each group of chunks, here or on another machine -> `by_latent.write_index`

DuckDB sorts within the memory of `Budget`; what does not fit goes to the budget's folder. Maps are read once, as a stream.
"""

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from saecore.query import by_latent
from saecore.query.by_latent import MAP, File, Index, Segment
from saecore.query.tables import connect
from saecore.runs.files import of_chunks, open_dataset, parquet_bytes, read_manifest
from saecore.schema import ACTIVATIONS
from saecore.storage import join_uri, write_atomic

MOST_SEGMENTS = 8
"""Above this number all segments are made again as one, since a look-up reads each segment."""

ORDER = "ORDER BY latent, activation DESC, image_id"

ROWS_PER_FILE = {by_latent.ROWS: 2_000_000, by_latent.TOP: 65_536}
ROW_GROUP_ROWS = {by_latent.ROWS: 62_500, by_latent.TOP: 1024}
"""A look-up decodes one or two row groups. Groups of four times as many rows make by_latent only 0.2 % smaller."""

MAPS_AT_ONCE = 32_768


@dataclasses.dataclass(frozen=True)
class Budget:
    """Memory, threads and disk for making a segment."""

    memory: float = 2.0
    """GB for DuckDB; this process takes up to 1 GB more."""
    threads: int = 0
    """0 means as many as there are CPUs."""
    folder: str = ""
    """Folder for what does not fit into memory; "" means a temporary folder."""


class Update(NamedTuple):
    """What brings an index up to date."""

    kept: list[Segment]
    """Segments that stay."""
    groups: list[np.ndarray]
    """Chunk ids of each new segment."""


def update_of(manifest: pa.Table, before: Index | None, top: int, n_groups: int) -> Update:
    """Index what is not indexed yet, in `n_groups` segments; if that would make too many segments, index everything again."""
    kept = []
    if before is not None and before.top == top:
        kept = [s for s in before.segments if by_latent.digest(manifest, by_latent.ids(s)) == s.digest]
    chunk_ids = np.unique(manifest["chunk_id"].to_numpy())
    covered = np.concatenate([by_latent.ids(segment) for segment in kept]) if kept else np.zeros(0, np.int64)
    pending = np.setdiff1d(chunk_ids, covered)
    if len(pending) and len(kept) + min(n_groups, len(pending)) > max(MOST_SEGMENTS, n_groups):
        kept, pending = [], chunk_ids
    groups = np.array_split(pending, min(n_groups, len(pending))) if len(pending) else []
    return Update(kept, groups)


def build_segment(
    uri: str, fingerprint: str, n_latents: int, top: int, chunk_ids: np.ndarray, budget: Budget
) -> Segment:
    """Write the files of one segment of the run at `uri`. Called again, it writes the same files."""
    manifest = of_chunks(read_manifest(uri), chunk_ids)
    digest = by_latent.digest(manifest, chunk_ids)
    # The name follows from the content, so a segment that is made again replaces its files by equal ones.
    name = hashlib.sha256(f"{fingerprint} {digest} {top} {by_latent.VERSION}".encode()).hexdigest()[:12]
    held = {table: open_dataset(uri, table, manifest) for table in manifest["table"].unique().to_pylist()}
    with _database(budget) as database:
        database.register("activations", held["activations"])
        database.register("images", held["images"])
        sorted_rows = _Files(uri, by_latent.ROWS, name, ACTIVATIONS.with_metadata(held["activations"].schema.metadata))
        rows, first = _write_rows(database, sorted_rows, n_latents, top)
        database.register("first", first)
        schema = by_latent.top_schema({table: dataset.schema for table, dataset in held.items()})
        top_images = _Files(uri, by_latent.TOP, name, schema)
        if "maps" in held:
            maps, extents = _copy_maps(database, held["maps"], n_latents)
        else:
            maps, extents = np.zeros(n_latents, np.int64), np.zeros(n_latents)
            database.sql("CREATE TABLE copied AS SELECT image_id, latent FROM first LIMIT 0")
        query = f"""SELECT {", ".join(schema.names)}
            FROM images JOIN first USING (image_id) LEFT JOIN copied USING (image_id, latent)
            {ORDER}{", method" if "maps" in held else ""}"""
        for batch in database.sql(query).to_arrow_reader(16_384):
            top_images.add(batch)
    extent = [round(value, 6) for value in extents.tolist()]
    return Segment(name, by_latent.ranges(chunk_ids), digest, rows, top_images.close(), maps.tolist(), extent)


@contextmanager
def _database(budget: Budget) -> Iterator[duckdb.DuckDBPyConnection]:
    with tempfile.TemporaryDirectory(dir=budget.folder or None) as folder:
        threads = {"threads": budget.threads} if budget.threads else {}
        with connect(memory_limit=f"{budget.memory}GB", temp_directory=folder, **threads) as database:
            yield database


def _write_rows(
    database: duckdb.DuckDBPyConnection, files: "_Files", n_latents: int, top: int
) -> tuple[list[File], pa.Table]:
    """Write all rows, sorted; returns the files, and for each latent the first `top` rows where it fires."""
    seen, first = np.zeros(n_latents, np.int64), []
    query = f"SELECT {', '.join(ACTIVATIONS.names)} FROM activations {ORDER}"
    reader = database.sql(query).to_arrow_reader(ROW_GROUP_ROWS[by_latent.ROWS])
    for batch in reader:
        files.add(batch)
        fired = batch.filter(pc.not_equal(batch["activation"], 0))
        latent = fired["latent"].to_numpy()
        place = seen[latent] + np.arange(len(latent)) - np.searchsorted(latent, latent)
        first.append(fired.filter(pa.array(place < top)))
        seen += np.bincount(latent, minlength=n_latents)
    return files.close(), pa.Table.from_batches(first, reader.schema)


def _copy_maps(
    database: duckdb.DuckDBPyConnection, maps: pyarrow.dataset.Dataset, n_latents: int
) -> tuple[np.ndarray, np.ndarray]:
    """Copy the maps of the images and latents of `first` into the table `copied`, by every method.

    Returns, for each latent, the number of its maps by the run's first method and the sum of their extents.
    """
    counts, extents = np.zeros(n_latents, np.int64), np.zeros(n_latents)
    method = by_latent.methods(maps.schema)[0]
    scanner = maps.scanner(
        columns=["image_id", "latent", *MAP], filter=pc.field("latent").is_valid(), batch_size=MAPS_AT_ONCE
    )

    def passing() -> Iterator[pa.RecordBatch]:
        # Every map is decoded here, once: DuckDB takes batch after batch and keeps the rows that it joins.
        for batch in scanner.to_batches():
            share = extent(batch["map"])
            counted = np.isfinite(share) & pc.equal(batch["method"], method).to_numpy(zero_copy_only=False)
            latent = batch["latent"].to_numpy()[counted]
            np.add(counts, np.bincount(latent, minlength=n_latents), out=counts)
            np.add(extents, np.bincount(latent, share[counted], n_latents), out=extents)
            yield batch

    database.register("maps", pa.RecordBatchReader.from_batches(scanner.projected_schema, passing()))
    database.execute("CREATE TABLE copied AS FROM maps SEMI JOIN first USING (image_id, latent)")
    return counts, extents


def extent(maps: pa.Array) -> np.ndarray:
    """How much of the grid a map's positive relevance covers: (sum r)^2 / (P sum r^2) over its positive values r.

    maps: n fixed-size binaries of P int8 values. Returns float64 (n), the participation ratio as a share of the P patches:
    1 / P if one patch has everything, 1 if all have the same; NaN for a map without a positive value.
    """
    n_patches = maps.type.byte_width
    values = np.frombuffer(maps.buffers()[1], np.int8)[maps.offset * n_patches :][: len(maps) * n_patches]
    positive = np.maximum(values, 0).reshape(len(maps), n_patches).astype(np.float32)
    with np.errstate(invalid="ignore"):
        return positive.sum(1, dtype=float) ** 2 / (n_patches * np.einsum("np,np->n", positive, positive, dtype=float))


class _Files:
    """Writes sorted batches to files of `ROWS_PER_FILE` rows, each as soon as it is full."""

    def __init__(self, uri: str, folder: str, segment: str, schema: pa.Schema) -> None:
        self.uri, self.folder, self.segment, self.schema = uri, folder, segment, schema
        self._files: list[File] = []
        self._waiting: list[pa.RecordBatch] = []

    def add(self, batch: pa.RecordBatch) -> None:
        """Take some more rows."""
        self._waiting.append(batch)
        most = ROWS_PER_FILE[self.folder]
        while sum(batch.num_rows for batch in self._waiting) >= most:
            table = pa.Table.from_batches(self._waiting)
            self._write(table[:most])
            self._waiting = table[most:].to_batches()

    def close(self) -> list[File]:
        """Write the last file; returns all files."""
        if self._waiting:
            self._write(pa.Table.from_batches(self._waiting))
        return self._files

    def _write(self, table: pa.Table) -> None:
        # DuckDB's tables have no columns without null and no binaries of fixed size: the cast restores both.
        data = parquet_bytes(table.cast(self.schema), ROW_GROUP_ROWS[self.folder])
        path = f"{self.folder}/{self.segment}-{len(self._files):05d}.parquet"
        write_atomic(join_uri(self.uri, path), data)
        first, last = (table["latent"][place].as_py() for place in (0, -1))
        self._files.append(File(path, table.num_rows, data.size, first, last))
