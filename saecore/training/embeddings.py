"""Embeddings to train an SAE on, at an address: how they lie there, and how they are read in blocks.

    NAME_rows_width.npy    float32, raw (MSAE's memory maps, no header) or a true .npy; mapped, never loaded whole
    RUN                    a run of jobs.embed, or of jobs.explain that kept embeddings; refused images have none. Vectors of
                           tokens lie one after the other in an image's list, and are a row each
    *.parquet, FOLDER      Parquet files with a column of lists; any pyarrow filesystem

A block is 1,024 rows of a memory map, or a row group of Parquet.

Left out: statistics of embeddings (`saecore.training.survey`), and their order in training (`saecore.training.batches`).
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from saecore.runs.files import open_dataset
from saecore.sae import sites
from saecore.spellings import Model
from saecore.storage import Place, exists, is_file, join_uri

# dataset_model_split_image_rows_width, as `saecore.training.memmaps` and MSAE name memory maps, with the model as
# openai~clip-vit-base-patch16.
_MSAE_MAP = re.compile(r".+_(?P<model>[^_]+)_[^_]+_(?:image|text)_\d+_\d+")

EMBEDDING = str(sites.EMBEDDING)
"""The site of what has no other."""

SITE, WIDTH = b"site", b"width"
"""Keys of the metadata of vectors inside the tower: where they were taken, and how many numbers each has."""

MAPPED_BLOCK = 1024
"""Rows that are read at once from a memory map: 3 MB at width 768."""


class Embeddings(Protocol):
    """Rows of embeddings in blocks that are read one at a time."""

    width: int
    block_rows: np.ndarray
    """int64 (blocks,): rows of each block."""
    identity: str
    """Hash of the files' names and sizes, which differs for other data."""
    model: Model
    """The model that made them, as far as the files or their names tell."""
    site: str
    """Where in it they were taken, in the text form of `saecore.sae.sites`."""

    def read(self, block: int) -> np.ndarray:
        """float32 (rows, width), finite; ValueError if it is not."""
        ...


def open_embeddings(address: str, column: str = "embedding") -> Embeddings:
    """The embeddings at `address` (forms above); ValueError in one sentence, which begins with `address`, if it has none."""
    if address.endswith(".npy"):
        return _MemoryMap(Path(address))
    return _ParquetColumn(address, column)


class _MemoryMap:
    site = EMBEDDING

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        with path.open("rb") as file:
            headed = file.read(6) == b"\x93NUMPY"
        if headed:
            self._rows = np.load(path, mmap_mode="r", allow_pickle=False)
            if self._rows.ndim != 2 or self._rows.dtype not in (np.float32, np.float16):
                raise ValueError(f"{path}: expected a float32 matrix, found {self._rows.dtype} {self._rows.shape}")
        else:
            fields = path.stem.split("_")[-2:]
            if len(fields) < 2 or not all(field.isdigit() for field in fields):
                raise ValueError(f"{path}: the name of a raw memory map must say its shape, NAME_rows_width.npy")
            shape = (int(fields[0]), int(fields[1]))
            if path.stat().st_size != 4 * math.prod(shape):
                raise ValueError(
                    f"{path}: {shape[0]} x {shape[1]} float32 are {4 * math.prod(shape):,} bytes, "
                    f"the file has {path.stat().st_size:,}"
                )
            self._rows = np.memmap(path, np.float32, "r", shape=shape)
        rows, self.width = self._rows.shape
        starts = np.arange(0, rows, MAPPED_BLOCK)
        self.block_rows = np.minimum(MAPPED_BLOCK, rows - starts)
        self.identity = _hash([path.name, path.stat().st_size])
        named = _MSAE_MAP.fullmatch(path.stem)
        self.model = Model(named["model"].replace("~", "/") if named else "")
        self._path = path

    def read(self, block: int) -> np.ndarray:
        start = block * MAPPED_BLOCK
        return _checked(np.array(self._rows[start : start + MAPPED_BLOCK], np.float32), f"{self._path}")


class _ParquetColumn:
    def __init__(self, address: str, column: str) -> None:
        self._address, self._column = address, column
        self._place = Place(address)
        paths = _parquet_files(address, self._place)
        self._groups: list[tuple[str, int]] = []
        self.width = 0
        rows: list[int] = []
        self._length = 0
        """Of each list: the width, or several times it."""
        sizes, models, vectors = [], set[Model](), set[tuple[str, int]]()
        for path in paths:
            file = self._place.open_parquet(path)
            metadata = file.schema_arrow.metadata or {}
            vectors.add(_vectors(metadata, path))
            if len(vectors) > 1:
                names = " and ".join(sorted(f"{site} of width {width}" if width else site for site, width in vectors))
                raise ValueError(f"{address} holds vectors of several sites: {names}")
            for group, n_rows in enumerate(self._rows_of(file, path)):
                if n_rows:
                    self._groups.append((path, group))
                    rows.append(n_rows)
            sizes.append([path, file.metadata.num_rows, self._place.info(path).size])
            models.add(Model(metadata.get(b"clip", b"").decode(), metadata.get(b"clip_sha256", b"").decode()))
        self.model = models.pop() if len(models) == 1 else Model()
        self.site, _ = vectors.pop()
        if not rows:
            raise ValueError(f"{address}: no embedding in column {column!r}; jobs.embed writes them")
        self.block_rows = np.array(rows)
        self.identity = _hash(sizes)

    def _rows_of(self, file: pq.ParquetFile, path: str) -> list[int]:
        """How many embeddings each row group of a file has, which the footer tells; ValueError if there can be none."""
        if self._column not in file.schema_arrow.names:
            raise ValueError(f"{self._address}: {path} has no column {self._column!r} of embeddings")
        kind = file.schema_arrow.field(self._column).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            raise ValueError(f"{self._address}: column {self._column!r} holds {kind}, expected lists of numbers")
        leaf = [file.schema.column(i).path.split(".")[0] for i in range(len(file.schema))].index(self._column)
        counts = []
        for group in range(file.metadata.num_row_groups):
            if not self._length:
                lists = file.read_row_group(group, columns=[self._column])[self._column].drop_null()
                self._length = len(lists[0]) if len(lists) else 0
                self.width = _vectors(file.schema_arrow.metadata or {}, path)[1] or self._length
                if len(lists) and (self.width < 2 or self._length % self.width):
                    raise ValueError(f"{self._address}: the lists in {path} are {self._length} long")
            if not self._length:
                counts.append(0)
                continue
            # A list of so many numbers counts as so many values, and a null as one.
            statistics = file.metadata.row_group(group)
            n_values = statistics.column(leaf).num_values
            n_lists, rest = divmod(n_values - statistics.num_rows, self._length - 1)
            if rest or n_lists < 0:
                raise ValueError(
                    f"{self._address}: the lists in {path} are not all {self._length} long, as the first is"
                )
            counts.append(n_lists * (self._length // self.width))
        return counts

    def read(self, block: int) -> np.ndarray:
        path, group = self._groups[block]
        table = self._place.open_parquet(path).read_row_group(group, columns=[self._column])
        lists = table[self._column].drop_null().combine_chunks()
        if set(pc.list_value_length(lists).to_pylist()) != {self._length}:
            raise ValueError(f"{path}: the lists in {self._column!r} are not all {self._length} long")
        values = lists.flatten().to_numpy(zero_copy_only=False)
        return _checked(values.astype(np.float32, copy=False).reshape(-1, self.width), path)


def _vectors(metadata: Mapping[bytes, bytes], path: str) -> tuple[str, int]:
    """The site of a file's vectors and how many numbers each has, by its metadata; 0 of embeddings, which fill their lists.

    Files of jobs.explain have the site of its SAE, and no width: their embeddings are the tower's all the same.
    """
    if not {SITE, WIDTH} <= metadata.keys():
        return EMBEDDING, 0
    site, width = (metadata[key].decode(errors="replace") for key in (SITE, WIDTH))
    try:
        return str(sites.parse(site)), int(width)
    except ValueError as error:
        raise ValueError(f"{path}: its metadata do not say what its vectors are: {error}") from error


def _parquet_files(address: str, place: Place) -> list[str]:
    if is_file(address):
        return [place.path]
    if not exists(address):
        raise ValueError(f"{address}: no such file or folder")
    if is_file(join_uri(address, "run.json")):
        if not is_file(join_uri(address, "manifest.parquet")):
            raise ValueError(f"{address}: this run is not complete; the command that made it resumes it")
        return open_dataset(address, "images").files
    files = place.dataset().files
    if not files:
        raise ValueError(f"{address}: no Parquet file in this folder")
    return sorted(files)


def _checked(rows: np.ndarray, where: str) -> np.ndarray:
    if not np.isfinite(rows).all():
        raise ValueError(f"{where} holds embeddings that are not finite")
    return rows


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
