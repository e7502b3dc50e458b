"""Bins of numbers that differ, that are equal but for rounding, and of none."""

import numpy as np
import pytest

from saecore.query.histograms import Bins, count


def test_bins_of_one_width() -> None:
    found = count(np.array([1, 2, 4, 4], np.float32), 3)
    assert found == Bins([1.0, 2.0, 3.0, 4.0], [1, 1, 2])


@pytest.mark.parametrize(
    "values",
    [[2.5], [2.5, 2.5], [0.0, 0.0, 0.0], [2.5, np.nextafter(np.float32(2.5), np.float32(3))], [-2.5, -2.5000001]],
)
def test_equal_numbers_have_one_bin(values: list[float]) -> None:
    """The fourth is what float32 makes of equal pictures in two batches; NumPy cuts no 20 bins between them."""
    found = count(np.array(values, np.float32), 20)
    assert found.counts == [len(values)]
    assert found.edges == [pytest.approx(min(values)), pytest.approx(max(values))]


def test_no_numbers_have_no_bin() -> None:
    assert count(np.zeros(0, np.float32), 20) == Bins([], [])
