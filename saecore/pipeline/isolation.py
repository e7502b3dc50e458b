"""An image that ends its worker, or makes a stage raise, is found by halving and refused; the rest of its chunk goes on.

    killed-worker   the worker process ended twice while it worked on this image alone
    raised-error    a stage raises for this image and not for others; the detail names the exception and where it was raised

An image can take its whole process down (a fault in a decoder, memory that runs out). Whatever schedules the work then starts
the same chunk again, for ever. Workers therefore tell a `Suspects` in another process what they are about to touch. When a
chunk comes back, the range that was entered last and never left is halved, until one image stands alone; an image that ends its
worker twice while it stands alone is refused. A worker can also die of something else (a lost node): the first death of a chunk
changes nothing, and later deaths only make ranges smaller.

Values round by the batch in which they are computed. So a step whose values depend on batches works, once all pieces have
passed, on the whole chunk again without the refused images (`Work.whole`): its values are then those of a chunk that was never
halved. This happens once: if a worker dies in it, the pieces count.

An exception does not end its process, and it may be a bug that no image caused (`survive`). So the exception is raised on if
memory ran out, if the stage raises for a blank image too, or if it raises for every image or for many.

Left out: an image that hangs its decoder, or ends it, where decoders have a process of their own (`saecore.pipeline.decoder`).
"""

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import pyarrow as pa

FREE_DEATHS = 1
"""Deaths of a chunk's worker for which no image is suspected yet."""

DEATHS_ALONE = 2
"""Deaths while working on one image alone, after which that image is refused."""

MAX_ATTEMPTS = 200
"""Attempts at one chunk before the job fails: room for about 16 images among 512 that end their worker (11 attempts each)."""

REASON = "killed-worker"

RAISED = "raised-error"

MAX_RAISED = 16
"""Images of one piece of a chunk for which a stage may raise; if it raises for more, the stage is at fault."""

_MEMORY = ("outofmemory", "out of memory", "allocate memory", "alloc_failed")
"""What exceptions of PyTorch, CUDA and cuBLAS say of memory that ran out: they need not be MemoryErrors."""


class Work(NamedTuple):
    """What an attempt at a chunk works on."""

    ranges: list[tuple[int, int]]
    """Pieces to work on one after the other: [start, end) among the chunk's images."""
    refused: list[int]
    """Images that must not be touched: each ended its worker."""
    whole: bool
    """Whether the chunk was halved, and may be worked on as a whole after its pieces."""


class Witness(Protocol):
    """What a worker reports to: a `Suspects`, in this process or in an actor."""

    def begin(self, step: str, chunk_id: int, n_images: int) -> Work: ...
    def enter(self, step: str, chunk_id: int, start: int, end: int) -> None: ...
    def done(self, step: str, chunk_id: int) -> None: ...


@dataclasses.dataclass
class _Case:
    ranges: list[tuple[int, int]]
    entered: tuple[int, int] | None = None
    attempts: int = 0
    deaths: int = 0
    deaths_alone: dict[int, int] = dataclasses.field(default_factory=dict)
    refused: list[int] = dataclasses.field(default_factory=list)
    died_whole: bool = False


class Suspects:
    """Keeps one case for each (step, chunk) that is worked on, and forgets it when the step is done. Single-threaded."""

    def __init__(self) -> None:
        self._cases: dict[tuple[str, int], _Case] = {}

    def begin(self, step: str, chunk_id: int, n_images: int) -> Work:
        """A worker starts, or starts again, on a chunk; RuntimeError after `MAX_ATTEMPTS`."""
        case = self._cases.setdefault((step, chunk_id), _Case(ranges=[(0, n_images)]))
        case.attempts += 1
        if case.attempts > MAX_ATTEMPTS:
            raise RuntimeError(
                f"chunk {chunk_id}: {step} ended its worker {MAX_ATTEMPTS} times; refused so far: {case.refused}"
            )
        if case.entered is not None:
            case.deaths += 1
            if case.deaths > FREE_DEATHS:
                self._narrow(case, *case.entered)
            case.entered = None
        return Work(list(case.ranges), sorted(case.refused), len(case.ranges) > 1 and not case.died_whole)

    def _narrow(self, case: _Case, start: int, end: int) -> None:
        """The worker died in [start, end): halve it, or count against the one image in it."""
        if (start, end) not in case.ranges:  # in the whole chunk, whose pieces had passed
            case.died_whole = True
            return
        place = case.ranges.index((start, end))
        if end - start > 1:
            middle = (start + end) // 2
            case.ranges[place : place + 1] = [(start, middle), (middle, end)]
            return
        case.deaths_alone[start] = case.deaths_alone.get(start, 0) + 1
        if case.deaths_alone[start] >= DEATHS_ALONE:
            case.refused.append(start)

    def enter(self, step: str, chunk_id: int, start: int, end: int) -> None:
        """The worker is about to touch the images [start, end)."""
        case = self._cases.get((step, chunk_id))
        if case is not None:  # None: a second attempt has finished this chunk meanwhile
            case.entered = (start, end)

    def done(self, step: str, chunk_id: int) -> None:
        """The chunk's step is finished."""
        self._cases.pop((step, chunk_id), None)


def pieces(witness: Witness, step: str, chunk_id: int, work: Work, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) to work on one by one, each announced before it is yielded."""
    for range_start, range_end in work.ranges:
        piece = max(start, range_start), min(end, range_end)
        if piece[0] < piece[1]:
            witness.enter(step, chunk_id, range_start, range_end)
            yield piece


def refuse(table: pa.Table, start: int, refused: list[int], column: str) -> pa.Table:
    """RAW or DECODED rows [start, ...) of a chunk, in which refused images have a reason and no content in `column`."""
    detail = f"its worker process ended {DEATHS_ALONE} times while it was worked on alone"
    marked = [image - start for image in refused if 0 <= image - start < table.num_rows]
    return _changed(table, {row: {column: None, "error": REASON, "error_detail": detail} for row in marked})


def survive(
    stage: Callable[[pa.Table], pa.Table], table: pa.Table, column: str, blank: Callable[[bytes], bytes]
) -> pa.Table:
    """`stage(table)`, in which the images for which the stage raises are refused. `column` holds the images' content.

    The table has RAW or DECODED rows. `blank` makes, from the content of an image, that of an image in which nothing can be
    wrong. What the stage raised is raised on if it is no single image's fault.
    """
    try:
        return stage(table)
    except Exception as error:
        raising: dict[int, Exception] = {}
        n_images = table.num_rows - table[column].null_count
        if not n_images:
            raise
        for row, row_error in _raising(stage, table, 0):
            raising[row] = row_error
            content = table[column][row].as_py()
            if content is None or len(raising) > MAX_RAISED or len(raising) == n_images > 1:
                raise error
            if len(raising) == 1:
                stage(_changed(table.slice(row, 1), {0: {column: blank(content)}}))
    refused = {
        row: {column: None, "error": RAISED, "error_detail": _told(row_error)} for row, row_error in raising.items()
    }
    return stage(_changed(table, refused))


def _raising(stage: Callable[[pa.Table], pa.Table], table: pa.Table, start: int) -> Iterator[tuple[int, Exception]]:
    """Rows for which the stage raises if it is given each alone, and what it raises."""
    try:
        stage(table)
    except Exception as error:
        if isinstance(error, MemoryError) or any(sign in f"{type(error).__name__} {error}".lower() for sign in _MEMORY):
            raise
        if table.num_rows <= 1:
            yield start, error
            return
        middle = table.num_rows // 2
        yield from _raising(stage, table.slice(0, middle), start)
        yield from _raising(stage, table.slice(middle), start + middle)


def _told(error: Exception) -> str:
    """An exception and where it was raised, in one line."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return f"{said} ({where.name}, {where.filename.rpartition('/')[2]}:{where.lineno})"


def _changed(table: pa.Table, changes: Mapping[int, Mapping[str, object]]) -> pa.Table:
    """The table with other values in some rows."""
    if not changes:
        return table
    rows = table.to_pylist()
    for row, values in changes.items():
        rows[row] |= values
    return pa.Table.from_pylist(rows, schema=table.schema)
