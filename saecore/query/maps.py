"""The relevance maps of an image as numbers, and as a table for people.

Where people read them, in tables, their JSON and pages, rows and columns of patches count from 1: row 1 is at the top, column
1 at the left. NumPy arrays count from 0.
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
    """A map (H, W) -> the patch of its largest value, and the patch of its least value if that is larger in magnitude.

    The patch of the largest value speaks most for the target, and a pointing score takes it. The patch of the least value
    speaks most against the target. It is None if its value is not negative, or not the larger one in magnitude.
    """
    most_against, most_for = (_patch(values, index) for index in (values.argmin(), values.argmax()))
    return most_for, most_against if -most_against.value > abs(most_for.value) else None


def _patch(values: np.ndarray, index: np.intp) -> Patch:
    row, column = np.unravel_index(index, values.shape)
    return Patch(values[row, column].item(), int(row) + 1, int(column) + 1)


class ImageMaps(NamedTuple):
    """The relevance maps of one image. Those of kept latents come first, the strongest latent first."""

    maps: np.ndarray
    """float32 (n, H, W), in the units of the methods."""
    latents: list[int | None]
    """n latents; None for a text or a concept."""
    targets: list[str | None]
    """n names of texts and concepts; None for a latent."""
    methods: list[str]
    remainders: np.ndarray
    """float32 (n,): what of each pre-activation no patch accounts for; NaN if the method is no decomposition."""

    def table(self) -> pa.Table:
        """One row per map: its target, the patches of `peaks`, its sum and its remainder."""
        patches = [peaks(values) for values in self.maps]
        most_for = [patch for patch, _ in patches]
        against = [patch or (None, None, None) for _, patch in patches]
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
