"""The relevance maps of an image as numbers, and as a table that people read.

Rows and columns of patches count from 1, row 1 at the top, column 1 at the left, wherever people read them: in tables, in their
JSON, on pages. Arrays are NumPy's and count from 0.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa


class Patch(NamedTuple):
    """One patch of a map."""

    value: float
    row: int
    """From 1, at the top."""
    column: int
    """From 1, at the left."""


def peaks(values: np.ndarray) -> tuple[Patch, Patch | None]:
    """A map (H, W) -> its strongest patch, that of the largest value, and the strongest against, where it outweighs the first.

    The largest value speaks most for the target, and is what a pointing score takes. The least one is named where its
    magnitude is the larger of the two; elsewhere it is None.
    """
    most_against, most_for = (_patch(values, place) for place in (values.argmin(), values.argmax()))
    return most_for, most_against if -most_against.value > abs(most_for.value) else None


def _patch(values: np.ndarray, place: np.intp) -> Patch:
    row, column = np.unravel_index(place, values.shape)
    return Patch(values[row, column].item(), int(row) + 1, int(column) + 1)


class ImageMaps(NamedTuple):
    """The relevance maps of one image by one method, those of kept latents first, strongest first."""

    maps: np.ndarray
    """float32 (k, H, W), pre-activation units."""
    latents: list[int | None]
    """None where the target is not a latent."""
    targets: list[str | None]
    """None where it is one."""
    methods: list[str]
    remainders: np.ndarray
    """float32 (k): what of each pre-activation no patch accounts for; NaN where the method is no decomposition."""

    def table(self) -> pa.Table:
        """A row a map: its target, its strongest patch, the strongest against where that outweighs it, sum and remainder."""
        found = [peaks(one) for one in self.maps]
        most_for = [patch for patch, _ in found]
        against = [patch or (None, None, None) for _, patch in found]
        return pa.table(
            {
                "latent": pa.array(self.latents, pa.int32()),
                "target": pa.array(self.targets, pa.string()),
                "method": pa.array(self.methods, pa.string()),
                "row": pa.array([row for _, row, _ in most_for], pa.int32()),
                "column": pa.array([column for _, _, column in most_for], pa.int32()),
                "strongest": pa.array([value for value, _, _ in most_for], pa.float32()),
                "against_row": pa.array([row for _, row, _ in against], pa.int32()),
                "against_column": pa.array([column for _, _, column in against], pa.int32()),
                "against": pa.array([value for value, _, _ in against], pa.float32()),
                "sum": self.maps.sum((1, 2)),
                "remainder": self.remainders,
            }
        )
