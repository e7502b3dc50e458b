"""Halving finds the images that end their worker, whatever schedules the attempts."""

import pytest

from saecore.isolation import MAX_ATTEMPTS, Suspects, pieces


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


def test_attempts_are_bounded() -> None:
    suspects = Suspects()
    for _ in range(MAX_ATTEMPTS):
        suspects.begin("decode", 3, 5)  # dies before it enters anything: a shard that cannot even be opened
    with pytest.raises(RuntimeError, match=f"{MAX_ATTEMPTS} times"):
        suspects.begin("decode", 3, 5)
