"""Histograms of numbers, also of numbers that are all equal.

Numbers that differ only by float32 rounding count as equal. They have one bin, from the least to the largest: several bins of
the same width would need a range that nobody measured, or one that is too narrow to be cut.
"""

from typing import NamedTuple

import numpy as np

ROUNDING = 1e-5
"""Relative difference that rounding may cause. Activations of 17 equal pictures in batches of 16 differed by 8e-7."""


class Bins(NamedTuple):
    """A histogram. Equal numbers have one bin, no numbers have none."""

    edges: list[float]
    """One more than there are bins, in rising order; two nearly equal ones if all numbers are equal."""
    counts: list[int]


def alike(least: float, most: float) -> bool:
    """Whether all numbers between these two are equal but for rounding."""
    return most - least <= ROUNDING * max(abs(least), abs(most))


def count(values: np.ndarray, bins: int) -> Bins:
    """A histogram in bins of the same width, from the least of the values to the largest."""
    if not values.size:
        return Bins([], [])
    values = values.astype(np.float64)  # NumPy would cut float32 values in float32, with too coarse edges
    least, most = float(values.min()), float(values.max())
    if alike(least, most):
        return Bins([least, most], [values.size])
    counts, edges = np.histogram(values, bins)
    return Bins(edges.tolist(), counts.tolist())
