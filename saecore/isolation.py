"""Which image ends its worker: bookkeeping that outlives the worker.

An image can take its whole process down (a fault in a decoder, memory that runs out), and whatever schedules the work
then starts the same chunk again, for ever. Workers therefore say what they are about to touch, to a `Suspects` in another
process. When a chunk comes back, the range that was entered last and never left is halved, until one image stands alone;
an image that ends its worker twice while alone is refused, and the rest of its chunk goes on.

A worker can also die of something else (a lost node): the first death of a chunk changes nothing, later ones only make
ranges smaller. Left out: work that hangs.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import pyarrow as pa

FREE_DEATHS = 1
"""Deaths of a chunk's worker that are nobody's fault yet."""

DEATHS_ALONE = 2
"""Deaths while working on one image alone, after which that image is refused."""

MAX_ATTEMPTS = 200
"""Attempts at one chunk before the job gives up, loudly: room for about 16 such images among 512 (11 attempts each)."""

REASON = "killed-worker"


class Work(NamedTuple):
    """How to go about a chunk this time."""

    ranges: list[tuple[int, int]]
    """Pieces to work on one after the other: [start, end) among the chunk's images."""
    refused: list[int]
    """Images not to touch: each ended its worker."""


class Witness(Protocol):
    """What a worker tells, and whom: a `Suspects`, in this process or behind an actor handle."""

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


class Suspects:
    """Keeps one case per (step, chunk) in work. Single-threaded; forgets a chunk when its step is done."""

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
        return Work(list(case.ranges), sorted(case.refused))

    def _narrow(self, case: _Case, start: int, end: int) -> None:
        """The worker died in [start, end): halve it, or count against the one image in it."""
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
    """RAW or DECODED rows [start, ...) of a chunk, with the content in `column` taken away from the refused images."""
    marked = [row for row in range(table.num_rows) if start + row in refused]
    if not marked:
        return table
    rows = table.to_pylist()
    for row in marked:
        detail = f"its worker process ended {DEATHS_ALONE} times while it was worked on alone"
        rows[row] |= {column: None, "error": REASON, "error_detail": detail}
    return pa.Table.from_pylist(rows, schema=table.schema)
