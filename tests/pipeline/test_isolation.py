"""Halving finds the images that end their worker, whatever schedules the attempts."""

from collections.abc import Callable

import pyarrow as pa
import pytest
import torch

from saecore.pipeline.isolation import MAX_ATTEMPTS, MAX_RAISED, RAISED, Suspects, pieces, survive


class WorkerDiedError(Exception):
    """Stands for the end of a process: nothing after it runs."""


def work_until_done(suspects: Suspects, n_images: int, poison: set[int]) -> tuple[list[int], set[int], int]:
    """Start again and again, as a scheduler would; returns the images worked on in order, the refused, and the attempts."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        work, seen = suspects.begin("decode", 7, n_images), []
        try:
            for start, end in pieces(suspects, "decode", 7, work, 0, n_images):
                for image in range(start, end):
                    if image in poison and image not in work.refused:
                        raise WorkerDiedError
                    seen.append(image)
        except WorkerDiedError:
            continue
        suspects.done("decode", 7)
        return seen, set(work.refused), attempt
    raise AssertionError("never done")


@pytest.mark.parametrize("poison", [set(), {0}, {511}, {100, 101}, {0, 255, 256, 511}])
def test_exactly_the_poison_is_refused(poison: set[int]) -> None:
    seen, refused, attempts = work_until_done(Suspects(), 512, poison)
    assert seen == list(range(512))
    assert refused == poison
    # One free death, nine halvings and one more death alone for each; halvings are shared, so this bounds it.
    assert attempts <= 2 + 11 * len(poison)


def test_a_death_that_is_nobodys_fault_changes_nothing() -> None:
    suspects = Suspects()
    work = suspects.begin("explain", 1, 100)
    assert next(pieces(suspects, "explain", 1, work, 0, 100)) == (0, 100)
    # the node is lost here
    assert suspects.begin("explain", 1, 100).ranges == [(0, 100)]


def die_twice(suspects: Suspects, n_images: int) -> None:
    """Two attempts at chunk 1 of the step decode that end while working on all of it."""
    for _ in range(2):
        suspects.begin("decode", 1, n_images)
        suspects.enter("decode", 1, 0, n_images)


def test_steps_and_chunks_are_told_apart() -> None:
    suspects = Suspects()
    die_twice(suspects, 4)
    assert suspects.begin("decode", 1, 4).ranges == [(0, 2), (2, 4)]
    assert suspects.begin("decode", 2, 4).ranges == [(0, 4)]
    assert suspects.begin("explain", 1, 4).ranges == [(0, 4)]


def test_pieces_follow_a_stream_of_batches() -> None:
    suspects = Suspects()
    die_twice(suspects, 10)
    work = suspects.begin("decode", 1, 10)
    streamed = [list(pieces(suspects, "decode", 1, work, start, min(start + 4, 10))) for start in (0, 4, 8)]
    assert streamed == [[(0, 4)], [(4, 5), (5, 8)], [(8, 10)]]


def test_a_chunk_that_was_halved_is_worked_on_as_a_whole_once() -> None:
    suspects = Suspects()
    die_twice(suspects, 4)
    assert suspects.begin("decode", 1, 4).whole
    suspects.enter("decode", 1, 2, 4)
    suspects.enter("decode", 1, 0, 4)  # all pieces have passed, and the worker dies in the whole chunk
    work = suspects.begin("decode", 1, 4)
    assert work.ranges == [(0, 2), (2, 4)]
    assert not work.whole
    suspects.done("decode", 1)
    assert not suspects.begin("decode", 1, 4).whole


def test_attempts_are_bounded() -> None:
    suspects = Suspects()
    for _ in range(MAX_ATTEMPTS):
        suspects.begin("decode", 3, 5)  # dies before it enters anything: a shard that cannot even be opened
    with pytest.raises(RuntimeError, match=f"{MAX_ATTEMPTS} times"):
        suspects.begin("decode", 3, 5)


class Stage:
    """Doubles numbers that travel as bytes; raises for some, and counts how often it was called."""

    def __init__(self, poison: set[int], error: Callable[[], BaseException], batch: int = 1 << 20) -> None:
        self.poison, self.error, self.batch, self.calls = poison, error, batch, 0

    def __call__(self, table: pa.Table) -> pa.Table:
        self.calls += 1
        rows = table.to_pylist()
        held = [int.from_bytes(row["data"], "big") for row in rows if row["data"] is not None]
        if self.poison & set(held) or len(held) > self.batch:
            raise self.error()
        for row in rows:
            row["data"] = None if row["data"] is None else (2 * int.from_bytes(row["data"], "big")).to_bytes(2, "big")
        return pa.Table.from_pylist(rows, schema=table.schema)


RAW = pa.schema([("data", pa.large_binary()), ("error", pa.string()), ("error_detail", pa.string())])


def numbers(n: int, without: tuple[int, ...] = ()) -> pa.Table:
    """Rows 1 to n, some refused before."""
    rows = [
        {"data": None, "error": "truncated", "error_detail": "cut"} if i in without else {"data": i.to_bytes(2, "big")}
        for i in range(1, n + 1)
    ]
    return pa.Table.from_pylist(rows, schema=RAW)


def zero(_: bytes) -> bytes:
    return b"\0\0"


@pytest.mark.parametrize("n", [1, 2, 3, 64, 512])
def test_an_image_for_which_a_stage_raises_is_refused(n: int) -> None:
    stage, given = Stage({n}, lambda: AssertionError("no such\ncolour")), numbers(n, (1,) if n > 2 else ())
    before = given.to_pylist()
    survivors = survive(stage, given, "data", zero).to_pylist()
    assert [row["error"] for row in survivors] == [*(row["error"] for row in before[:-1]), RAISED]
    assert survivors[-1]["data"] is None
    assert survivors[-1]["error_detail"].startswith("AssertionError: no such colour (__call__, test_isolation.py:")
    assert [row["data"] for row in survivors[1:-1]] == [(2 * i).to_bytes(2, "big") for i in range(2, n)]
    assert given.to_pylist() == before
    assert stage.calls <= 4 + 2 * n.bit_length()


def test_several_are_found_at_once_and_none_costs_one_call() -> None:
    stage = Stage({3, 4, 100}, KeyError)
    errors = [row["error"] for row in survive(stage, numbers(128), "data", zero).to_pylist()]
    assert [i for i, error in enumerate(errors, 1) if error] == [3, 4, 100]
    healthy = Stage(set(), KeyError)
    survive(healthy, numbers(128), "data", zero)
    assert healthy.calls == 1


@pytest.mark.parametrize(
    ("stage", "n"),
    [
        (Stage(set(range(600)), ValueError), 512),  # every image, a blank one too
        (Stage(set(range(1, 600)), ValueError), 512),
        (Stage({1, 2, 3, 4}, ValueError), 4),
        (Stage({0, 7}, ValueError), 64),  # one image, and a blank one
        (Stage(set(range(1, MAX_RAISED + 2)), ValueError), 512),
        (Stage(set(), ValueError, batch=5), 64),  # too many at once
    ],
)
def test_an_exception_that_is_no_single_images_fault_is_loud(stage: Stage, n: int) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        survive(stage, numbers(n), "data", zero)
    assert stage.calls < 60


@pytest.mark.parametrize(
    "error",
    [
        MemoryError,
        lambda: RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        KeyboardInterrupt,
    ],
)
def test_memory_that_runs_out_refuses_no_image(error: Callable[[], BaseException]) -> None:
    for stage in (Stage({5}, error), Stage(set(), error, batch=5)):
        with pytest.raises(type(error())):
            survive(stage, numbers(64), "data", zero)
        assert stage.calls <= 2


def test_rows_without_an_image_that_raise_are_loud() -> None:
    def stage(table: pa.Table) -> pa.Table:
        raise TypeError("whatever comes")

    for given in (numbers(1, (1,)), numbers(2, (1, 2)), numbers(0)):
        with pytest.raises(TypeError):
            survive(stage, given, "data", zero)
