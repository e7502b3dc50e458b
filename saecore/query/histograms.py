"""Histograms of numbers, those of equal numbers among them.

Numbers that differ by no more than float32 rounds off are one number. They have one bin, which ends where the numbers do:
bins of one width would need a range that nobody measured, or one that is too narrow to be cut.
"""

from typing import NamedTuple

import numpy as np

ROUNDING = 1e-5
"""Share of a number that rounding may account for. Activations of 17 equal pictures in batches of 16 differed by 8e-7."""


class Bins(NamedTuple):
    """A histogram: of equal numbers one bin, of no numbers none."""

    edges: list[float]
    """One more than bins, in rising order; two that are equal, or nearly so, where all numbers are."""
    counts: list[int]


def alike(least: float, most: float) -> bool:
    """Whether numbers between these two are one number but for rounding."""
    return most - least <= ROUNDING * max(abs(least), abs(most))


def count(values: np.ndarray, bins: int) -> Bins:
    """So many bins of one width, from the least of the values to the largest."""
    if not values.size:
        return Bins([], [])
    values = values.astype(np.float64)  # of float32, NumPy cuts in float32, which ends earlier
    least, most = float(values.min()), float(values.max())
    if alike(least, most):
        return Bins([least, most], [values.size])
    counts, edges = np.histogram(values, bins)
    return Bins(edges.tolist(), counts.tolist())
