"""Embeddings to train an SAE on: where they lie, what they are like, and batches of them in a random order.

    NAME_rows_width.npy    float32, raw (MSAE's memory maps, no header) or a true .npy; mapped, never loaded whole
    RUN                    a run of jobs.embed, or of jobs.explain --embeddings; images without an embedding are passed over
    *.parquet, FOLDER      Parquet files with a column of lists; any pyarrow filesystem

Data is read in blocks (1,024 mapped rows, or a Parquet row group). An epoch visits the blocks in a random order, mixes the
rows of many blocks in a buffer, and cuts batches from that: every row once, and whole-data shuffling wherever the data is no
larger than the buffer. The order is a function of seed and step alone, so that training resumes anywhere, exactly.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saecore.runs import run as runs
from saecore.spellings import Model
from saecore.storage import Place, exists, is_file, join_uri

# dataset_model_split_image_rows_width, as `saecore.training.memmaps` and MSAE name them, the model as
# openai~clip-vit-base-patch16.
_MSAE_MAP = re.compile(r".+_(?P<model>[^_]+)_[^_]+_(?:image|text)_\d+_\d+")

MAPPED_BLOCK = 1024
"""Rows read at once from a memory map: 3 MB at width 768."""

BUFFER_ROWS = 131_072
"""Rows mixed at once: 400 MB at width 768, twice that while the next ones are read."""

MEDIAN_ROWS = 16_384
"""Rows of which the geometric median is taken: its error is that of a mean of so many rows, 1/128 of a standard deviation."""


class Embeddings(Protocol):
    """Rows of embeddings in blocks that are read one at a time."""

    width: int
    block_rows: np.ndarray
    """int64 (blocks,): rows of each block."""
    identity: str
    """Hash of names and sizes: another one is other data."""
    model: Model
    """Whose embeddings they are, as far as files or their names tell."""

    def read(self, block: int) -> np.ndarray:
        """float32 (rows, width), finite; ValueError if it is not."""
        ...


def open_embeddings(address: str, column: str = "embedding") -> Embeddings:
    """The embeddings at `address` (forms above); ValueError in one sentence if there are none."""
    if address.endswith(".npy"):
        return _Mapped(Path(address))
    return _Tables(address, column)


class _Mapped:
    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"--embeddings {path}: no such file")
        with path.open("rb") as file:
            headed = file.read(6) == b"\x93NUMPY"
        if headed:
            self._rows = np.load(path, mmap_mode="r", allow_pickle=False)
            if self._rows.ndim != 2 or self._rows.dtype not in (np.float32, np.float16):
                raise ValueError(
                    f"--embeddings {path}: expected a float32 matrix, found {self._rows.dtype} {self._rows.shape}"
                )
        else:
            fields = path.stem.split("_")[-2:]
            if len(fields) < 2 or not all(field.isdigit() for field in fields):
                raise ValueError(
                    f"--embeddings {path}: a raw memory map says its shape in its name, NAME_rows_width.npy"
                )
            shape = (int(fields[0]), int(fields[1]))
            if path.stat().st_size != 4 * math.prod(shape):
                raise ValueError(
                    f"--embeddings {path}: {shape[0]} x {shape[1]} float32 are {4 * math.prod(shape):,} bytes, "
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


class _Tables:
    def __init__(self, address: str, column: str) -> None:
        self._column = column
        self._place = Place(address)
        paths = _parquet_files(address, self._place)
        self._groups: list[tuple[str, int]] = []
        rows: list[int] = []
        self.width = 0
        sizes, models = [], set[Model]()
        for path in paths:
            file = self._place.open_parquet(path)
            if column not in file.schema_arrow.names:
                raise ValueError(f"--embeddings {address}: {path} has no column {column!r} of embeddings")
            kind = file.schema_arrow.field(column).type
            if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
                raise ValueError(f"--embeddings {address}: column {column!r} holds {kind}, expected lists of numbers")
            leaf = [file.schema.column(i).path.split(".")[0] for i in range(len(file.schema))].index(column)
            for group in range(file.metadata.num_row_groups):
                about = file.metadata.row_group(group)
                if not self.width:
                    found = file.read_row_group(group, columns=[column])[column].drop_null()
                    if not len(found):
                        continue
                    self.width = len(found[0])
                    if self.width < 2:
                        raise ValueError(f"--embeddings {address}: the lists in {path} are {self.width} long")
                # A list is as many values as it is long, a null is one: the footer says how many rows have an embedding.
                values = about.column(leaf).num_values
                full, rest = divmod(values - about.num_rows, self.width - 1)
                if rest or full < 0:
                    raise ValueError(
                        f"--embeddings {address}: the lists in {path} are not all {self.width} long, as the first is"
                    )
                if full:
                    self._groups.append((path, group))
                    rows.append(full)
            sizes.append([path, file.metadata.num_rows, self._place.info(path).size])
            said = file.schema_arrow.metadata or {}
            models.add(Model(said.get(b"clip", b"").decode(), said.get(b"clip_sha256", b"").decode()))
        self.model = models.pop() if len(models) == 1 else Model()
        if not rows:
            raise ValueError(f"--embeddings {address}: no embedding in column {column!r}; jobs.embed writes them")
        self.block_rows = np.array(rows)
        self.identity = _hash(sizes)

    def read(self, block: int) -> np.ndarray:
        path, group = self._groups[block]
        table = self._place.open_parquet(path).read_row_group(group, columns=[self._column])
        lists = table[self._column].drop_null().combine_chunks()
        if set(pc.list_value_length(lists).to_pylist()) != {self.width}:
            raise ValueError(f"{path}: the lists in {self._column!r} are not all {self.width} long")
        values = lists.flatten().to_numpy(zero_copy_only=False)
        return _checked(values.astype(np.float32, copy=False).reshape(-1, self.width), path)


def _parquet_files(address: str, place: Place) -> list[str]:
    if is_file(address):
        return [place.path]
    if not exists(address):
        raise ValueError(f"--embeddings {address}: no such file or folder")
    if is_file(join_uri(address, "run.json")):
        if not is_file(join_uri(address, "manifest.parquet")):
            raise ValueError(f"--embeddings {address}: this run is not complete; the command that made it resumes it")
        return runs.dataset(address, "images").files
    found = place.dataset().files
    if not found:
        raise ValueError(f"--embeddings {address}: no Parquet file in this folder")
    return sorted(found)


def _checked(rows: np.ndarray, where: str) -> np.ndarray:
    if not np.isfinite(rows).all():
        raise ValueError(f"{where} holds embeddings that are not finite")
    return rows


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


# ---- What they are like.


def draw(source: Embeddings, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (int64, ascending) and values (float32) of so many random rows, or of all; `survey` holds out the same ones."""
    total = int(source.block_rows.sum())
    chosen = np.arange(total) if rows >= total else _chosen(np.random.default_rng(seed), total, rows)
    starts = np.concatenate([[0], np.cumsum(source.block_rows)])
    inside = np.split(chosen, np.searchsorted(chosen, starts[1:-1]))
    found = [source.read(block)[own - starts[block]] for block, own in enumerate(inside) if len(own)]
    return chosen, np.concatenate(found)


def _chosen(generator: np.random.Generator, total: int, rows: int) -> np.ndarray:
    return np.sort(generator.choice(total, rows, replace=False))


class Survey(NamedTuple):
    """One pass over the data."""

    rows: int
    """All rows."""
    mean: np.ndarray
    """float32 (width,), of the rows to train on."""
    scale: float
    """s = sqrt(width) / sqrt(mean |x - mean|^2), so that standardised rows have a mean squared norm of `width`."""
    held_out: np.ndarray
    """int64, ascending: rows kept for evaluation."""
    evaluation: np.ndarray
    """float32 (held out, width): those rows."""
    sample: np.ndarray
    """float32 (at most MEDIAN_ROWS, width): random rows to train on."""
    unit_norm: bool
    """Whether every row has length 1: almost surely not what a CLIP tower gave."""


def survey(source: Embeddings, held_out: int, seed: int) -> Survey:
    """Mean and scale in one pass, numerically sound at any length: moments by block in float64, merged by Chan's formula."""
    total = int(source.block_rows.sum())
    if not 0 <= held_out < total:
        raise ValueError(f"cannot hold out {held_out} of {total} embeddings")
    generator = np.random.default_rng(seed)
    kept = _chosen(generator, total, held_out)
    sampled = _chosen(generator, total, min(MEDIAN_ROWS, total))
    sampled = sampled[~np.isin(sampled, kept)]
    count, mean, spread = 0, np.zeros(source.width), 0.0
    evaluation, sample, unit = [], [], True
    start = 0
    for block, length in enumerate(source.block_rows):
        rows = source.read(block)
        inside = kept[np.searchsorted(kept, start) : np.searchsorted(kept, start + length)] - start
        chosen = sampled[np.searchsorted(sampled, start) : np.searchsorted(sampled, start + length)] - start
        evaluation.append(rows[inside])
        sample.append(rows[chosen])
        train = np.delete(rows, inside, axis=0).astype(np.float64)
        unit = unit and unit_length(rows)
        if len(train):
            own = train.mean(axis=0)
            shift = own - mean
            between = np.square(shift).sum() * count * len(train) / (count + len(train))
            spread += float(np.square(train - own).sum() + between)
            mean += shift * (len(train) / (count + len(train)))
            count += len(train)
        start += int(length)
    if spread == 0:
        raise ValueError("all embeddings are the same: there is nothing to learn from them")
    scale = math.sqrt(source.width) / math.sqrt(spread / count)
    return Survey(total, mean.astype(np.float32), scale, kept, np.concatenate(evaluation), np.concatenate(sample), unit)


def unit_length(rows: np.ndarray) -> bool:
    """Whether every row has length 1, as rows have that somebody normalised."""
    return bool(np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3))


def geometric_median(rows: np.ndarray, tolerance: float = 1e-5, rounds: int = 1000) -> np.ndarray:
    """The point with the least sum of distances to the rows (n, width), by Weiszfeld's iteration in float64.

    A row that the point has reached would weigh infinitely much and hold it for ever; by Vardi and Zhang (2000) it holds it
    only as far as it outweighs the pull of all others.
    """
    rows = rows.astype(np.float64)
    point = rows.mean(axis=0)
    for _ in range(rounds):
        apart = rows - point
        distance = np.linalg.norm(apart, axis=1)
        away = distance > 1e-12
        if not away.any():
            break
        weight = away / np.maximum(distance, 1e-12)
        pull = weight @ apart
        held = min(1.0, np.count_nonzero(~away) / max(float(np.linalg.norm(pull)), 1e-12))
        following = point + (1 - held) * pull / weight.sum()
        moved = float(np.linalg.norm(following - point))
        point = following
        if moved <= tolerance * max(float(np.linalg.norm(point)), tolerance):
            break
    return point.astype(np.float32)


# ---- Batches.


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of the rows to train on, without end, in an order that seed and step fix."""

    source: Embeddings
    held_out: np.ndarray
    """int64, ascending: rows left out."""
    batch_size: int
    seed: int
    buffer_rows: int = BUFFER_ROWS

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the rows to train on; what is left over sits this epoch out."""
        return (int(self.source.block_rows.sum()) - len(self.held_out)) // self.batch_size

    def start(self, step: int) -> Iterator[np.ndarray]:
        """float32 (batch_size, width) for every step from `step` on."""
        epoch, first = divmod(step, self.steps_per_epoch)
        while True:
            yield from self._epoch(epoch, first)
            epoch, first = epoch + 1, 0

    def _epoch(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        windows, position, skip = self._windows(epoch), 0, first * self.batch_size
        needed = []
        for index, (blocks, length) in enumerate(windows):
            if position + length > skip:
                needed.append((index, blocks, max(0, skip - position)))
            position += length
        left = np.zeros((0, self.source.width), np.float32)
        with ThreadPoolExecutor(1) as reader:  # the next window is read while this one is trained on
            coming = reader.submit(self._read, epoch, *needed[0][:2])
            for place, (_, _, offset) in enumerate(needed):
                rows = coming.result()[offset:]
                if place + 1 < len(needed):
                    coming = reader.submit(self._read, epoch, *needed[place + 1][:2])
                rows = np.concatenate([left, rows]) if len(left) else rows
                whole = len(rows) // self.batch_size * self.batch_size
                for start in range(0, whole, self.batch_size):
                    yield rows[start : start + self.batch_size]
                left = rows[whole:]

    def _windows(self, epoch: int) -> list[tuple[list[int], int]]:
        """The epoch's blocks in their random order, cut where the buffer is full, and the rows of each piece."""
        bounds = np.concatenate([[0], np.cumsum(self.source.block_rows)])
        rows = self.source.block_rows - np.diff(np.searchsorted(self.held_out, bounds))
        windows: list[tuple[list[int], int]] = []
        blocks: list[int] = []
        held = 0
        for block in np.random.default_rng((self.seed, epoch)).permutation(len(rows)):
            blocks.append(int(block))
            held += int(rows[block])
            if held >= self.buffer_rows:
                windows.append((blocks, held))
                blocks, held = [], 0
        return [*windows, (blocks, held)] if held else windows

    def _read(self, epoch: int, window: int, blocks: list[int]) -> np.ndarray:
        starts = np.concatenate([[0], np.cumsum(self.source.block_rows)])
        parts = []
        for block in blocks:
            inside = self.held_out[slice(*np.searchsorted(self.held_out, starts[block : block + 2]))] - starts[block]
            parts.append(np.delete(self.source.read(block), inside, axis=0))
        rows = np.concatenate(parts)
        return rows[np.random.default_rng((self.seed, epoch, window)).permutation(len(rows))]
