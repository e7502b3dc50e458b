"""The order in which batches come: every row once an epoch, mixed, and the same from any step on."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from saecore.training import embeddings
from saecore.training.batches import Batches
from saecore.training.embeddings import Embeddings
from tests.training.test_embeddings import ROWS, mapped


def numbered(folder: Path, rows: int = ROWS) -> Embeddings:
    """Row i holds i, twice."""
    return mapped(folder, np.repeat(np.arange(rows, dtype=np.float32)[:, None], 2, axis=1))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "MAPPED_BLOCK", 64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("buffer_rows", [1, 300, 100_000])
def test_every_row_to_train_on_comes_once_an_epoch(tmp_path: Path, buffer_rows: int) -> None:
    held_out = np.arange(0, ROWS, 5)
    batches = Batches(numbered(tmp_path), held_out, batch_size=80, seed=3, buffer_rows=buffer_rows)
    assert batches.steps_per_epoch == 25
    expected = np.delete(np.arange(ROWS), held_out)
    steps = list(itertools.islice(batches.start(0), 50))
    assert {step.shape for step in steps} == {(80, 2)}
    one, two = (np.concatenate(steps[start : start + 25])[:, 0] for start in (0, 25))
    for epoch in (one, two):
        np.testing.assert_array_equal(np.sort(epoch), expected)
    assert not np.array_equal(one, two)
    assert not np.array_equal(one, expected)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("buffer_rows", [1, 300, 100_000])
def test_from_any_step_on_batches_are_those_of_an_unbroken_iteration(tmp_path: Path, buffer_rows: int) -> None:
    """A batch size that divides nothing: windows end inside batches, and some rows sit each epoch out."""
    batches = Batches(numbered(tmp_path), np.array([0, 63, 64, 2499]), 77, seed=3, buffer_rows=buffer_rows)
    whole = list(itertools.islice(batches.start(0), 70))
    assert batches.steps_per_epoch == 32
    for step in (1, 3, 4, 31, 32, 33, 65):
        for one, other in zip(whole[step:], batches.start(step), strict=False):
            np.testing.assert_array_equal(one, other)
    again = Batches(batches.source, batches.held_out, 77, seed=4, buffer_rows=buffer_rows)
    assert not np.array_equal(next(again.start(0)), whole[0])


def test_data_no_larger_than_the_buffer_is_mixed_as_a_whole(tmp_path: Path) -> None:
    """The first fifth of an epoch holds rows of every tenth of the data."""
    first = next(Batches(numbered(tmp_path), np.zeros(0, np.int64), 500, seed=0).start(0))[:, 0]
    assert (np.histogram(first, bins=10, range=(0, ROWS))[0] > 20).all()
