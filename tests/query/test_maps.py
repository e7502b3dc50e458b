"""The strongest patch of a map, and the table that people read, whose rows and columns of patches count from 1."""

import numpy as np
import pytest

from saecore.query.maps import ImageMaps, peaks


@pytest.mark.parametrize(
    ("values", "most_for", "against"),
    [
        ([[0.0, 2.0], [-1.0, 1.0]], (2.0, 1, 2), None),
        ([[0.0, 2.0], [-3.0, 1.0]], (2.0, 1, 2), (-3.0, 2, 1)),
        ([[0.0, 2.0], [-2.0, 1.0]], (2.0, 1, 2), None),  # equally strong, so not stronger
        ([[-1.0, -2.0], [-1.5, -3.0]], (-1.0, 1, 1), (-3.0, 2, 2)),
        ([[0.0, 0.0], [0.0, 0.0]], (0.0, 1, 1), None),
        ([[-1.0, -1.0], [-1.0, -1.0]], (-1.0, 1, 1), None),
        ([[5.0]], (5.0, 1, 1), None),
    ],
)
def test_peaks(
    values: list[list[float]], most_for: tuple[float, int, int], against: tuple[float, int, int] | None
) -> None:
    assert peaks(np.array(values, np.float32)) == (most_for, against)


def test_a_table_of_maps() -> None:
    values = np.array([[[0, 2, 0], [-3, 1, 0]], [[4, 2, 0], [-3, 1, 0]]], np.float32)
    maps = ImageMaps(values, [7, None], [None, "text: x"], ["contrib"] * 2, np.array([0.5, 0.25], np.float32))
    for_7 = {"latent": 7, "target": None, "row": 1, "column": 2, "strongest": 2.0, "sum": 0.0, "remainder": 0.5}
    for_x = {
        "latent": None,
        "target": "text: x",
        "row": 1,
        "column": 1,
        "strongest": 4.0,
        "sum": 4.0,
        "remainder": 0.25,
    }
    against = {"against_row": 2, "against_column": 1, "against": -3.0}
    rows = [for_7 | against, for_x | dict.fromkeys(against)]
    assert maps.table().to_pylist() == [{"method": "contrib"} | row for row in rows]


def test_no_map_is_an_empty_table() -> None:
    none = ImageMaps(np.zeros((0, 2, 3), np.float32), [], [], [], np.zeros(0, np.float32))
    assert none.table().num_rows == 0
