"""by_latent/: a run's activations sorted by (latent, activation descending, image_id), so that one latent is one small read.

    RUN/by_latent/{segment}-00000.parquet     ACTIVATIONS, in files of 2M rows and row groups of 62,500
    RUN/top_images/{segment}-00000.parquet    what it takes to show the first images of each latent: key, crop, maps
    RUN/by_latent/_index.json                 which files there are (`Index`); readers go through it, never through a raw glob

A segment is the sorted rows of some chunks and is never changed. A run that grew gets one more segment, and a reader merges
the segments. Files are written first and the index last, each whole or not at all, so that a new index does not disturb readers
of the one before. Works on any pyarrow filesystem.

Why top_images: maps are 9 of 10 bytes of a run. A second copy of all maps would double the run, and reading them from the
run's own files opens as many files as there are images. A copy of the maps that people look at grows with the latents, not with
the images.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from saecore.runs.files import done_again, of_chunks
from saecore.storage import Place, is_file, join_uri, read_json, write_atomic

VERSION = 1
ROWS, TOP = "by_latent", "top_images"
"""The folders."""

SHOWN = ("uri", "key", "width", "height", "crop_left", "crop_top", "crop_right", "crop_bottom")
"""Columns of `images` that it takes to show an image with a map over it."""

MAP = ("method", "map", "scale", "remainder", "sink_share")
"""Columns of `maps` that make one map."""


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a segment."""

    path: str
    """Its place below the run's folder."""
    rows: int
    bytes: int
    first: int
    """Its first latent."""
    last: int
    """Its last latent."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """The sorted rows of some chunks."""

    name: str
    chunks: list[tuple[int, int]]
    """Ranges of chunk ids, both ends included."""
    digest: str
    """Hash of the names and the sha256 of the chunks' files."""
    rows: list[File]
    top: list[File]
    maps: list[int]
    """Maps per latent, not counting maps without a positive value."""
    extent: list[float]
    """Sum of the extents of these maps; see `saecore.query.indexing.extent`."""


@dataclasses.dataclass(frozen=True)
class Index:
    """The segments of a run. No two of them cover the same chunk."""

    fingerprint: str
    """That of the run."""
    top: int
    """Images per latent whose maps are copied to top_images."""
    segments: list[Segment]
    version: int = VERSION

    def chunk_ids(self) -> np.ndarray:
        """All chunks that are indexed."""
        ranges = [np.arange(first, last + 1) for segment in self.segments for first, last in segment.chunks]
        return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)


def read_index(uri: str, fingerprint: str) -> Index | None:
    """The index of the run at `uri`, None if it has none; ValueError for the index of another run, or of another version."""
    if not is_file(content := join_uri(uri, ROWS, "_index.json")):
        return None
    held: dict[str, Any] = read_json(content)
    if held["fingerprint"] != fingerprint or held["version"] != VERSION:
        raise ValueError(
            f"{uri}/{ROWS} is the index of another run, or of another version: remove it, or make it again"
        )
    return Index(**{**held, "segments": [_segment(segment) for segment in held["segments"]]})


def _segment(held: dict[str, Any]) -> Segment:
    files = {name: [File(**file) for file in held[name]] for name in ("rows", "top")}
    return Segment(**{**held, "chunks": [tuple(ends) for ends in held["chunks"]], **files})


def write_index(uri: str, index: Index) -> None:
    """Make this the index that readers see, and remove the files that it does not name."""
    write_atomic(join_uri(uri, ROWS, "_index.json"), json.dumps(dataclasses.asdict(index)).encode())
    held = {file.path for segment in index.segments for file in (*segment.rows, *segment.top)}
    for folder in (ROWS, TOP):
        place = Place(join_uri(uri, folder))
        for info in place.entries():
            if info.base_name.endswith(".parquet") and f"{folder}/{info.base_name}" not in held:
                place.remove(info.path)


def digest(manifest: pa.Table, chunk_ids: np.ndarray) -> str:
    """Hash of the files of these chunks, by their names and sha256 in the run's manifest."""
    files = of_chunks(manifest, chunk_ids).sort_by("path")
    lines = pc.binary_join_element_wise(files["path"], files["sha256"], " ")
    return hashlib.sha256("\n".join(lines.to_pylist()).encode()).hexdigest()


def held_by(index: Index, manifest: pa.Table) -> Index:
    """An index without the segments of chunks that were done again after them."""
    again = done_again(manifest)
    kept = [
        segment
        for segment in index.segments
        if not len(np.intersect1d(ids(segment), again)) or digest(manifest, ids(segment)) == segment.digest
    ]
    return dataclasses.replace(index, segments=kept)


def ids(segment: Segment) -> np.ndarray:
    """The chunks of a segment."""
    return np.concatenate([np.arange(first, last + 1) for first, last in segment.chunks])


def ranges(chunk_ids: np.ndarray) -> list[tuple[int, int]]:
    """Sorted chunk ids as ranges, both ends included."""
    breaks = np.flatnonzero(np.diff(chunk_ids) != 1) + 1
    return [(int(part[0]), int(part[-1])) for part in np.split(chunk_ids, breaks) if len(part)]


def top_schema(held: Mapping[str, pa.Schema]) -> pa.Schema:
    """Schema of top_images for a run with these tables: a row for each latent, image and method; null without a map."""
    wanted = {"activations": ("latent", "image_id", "activation", "pre_activation"), "images": SHOWN, "maps": MAP}
    fields = [
        held[table].field(name).with_nullable(table != "activations")
        for table, names in wanted.items()
        if table in held
        for name in names
    ]
    return pa.schema(fields, held["activations"].metadata)


def methods(schema: pa.Schema) -> list[str]:
    """The methods of a run's maps, from the metadata of one of its files. The first is the default of every question."""
    return schema.metadata[b"methods"].decode().split(",")


class Reader:
    """Reads the files of an index. Each footer is read once."""

    def __init__(self, uri: str, index: Index) -> None:
        self.uri = uri
        self.index = index
        self._footers: dict[str, pq.FileMetaData] = {}

    def paths(self) -> dict[str, list[str]]:
        """The files of each folder, by their places below the run's folder."""
        segments = self.index.segments
        return {
            ROWS: [file.path for segment in segments for file in segment.rows],
            TOP: [file.path for segment in segments for file in segment.top],
        }

    def first_rows(self, latent: int, n: int | None = None) -> list[pa.Table]:
        """ACTIVATIONS rows where a latent fires, strongest first: all, or the first n and a few more of each segment."""
        return [part for segment in self.index.segments for part in self._read(segment.rows, latent, n)]

    def top_images(self, latent: int) -> list[pa.Table]:
        """All rows of top_images of a latent, a table for each row group that has some."""
        return [part for segment in self.index.segments for part in self._read(segment.top, latent, None)]

    def _read(self, files: Sequence[File], latent: int, n: int | None) -> Iterator[pa.Table]:
        rows = 0
        for file in files:
            if file.first <= latent <= file.last:
                for part in self._row_groups(file, latent):
                    yield part
                    rows += part.num_rows
                    if n is not None and rows >= n:
                        return

    def _row_groups(self, file: File, latent: int) -> Iterator[pa.Table]:
        place = Place(join_uri(self.uri, file.path))
        with place.open_parquet(footer=self._footers.get(file.path)) as parquet:
            footer = self._footers.setdefault(file.path, parquet.metadata)
            column = parquet.schema_arrow.get_field_index("latent")
            for number in range(footer.num_row_groups):
                held = footer.row_group(number).column(column).statistics
                if held.min <= latent <= held.max:
                    rows = parquet.read_row_group(number)
                    start, end = np.searchsorted(rows["latent"].to_numpy(), [latent, latent + 1])
                    rows = rows.slice(start, end - start)
                    yield rows.filter(pc.not_equal(rows["activation"], 0))
