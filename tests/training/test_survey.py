"""What a survey says of embeddings, against NumPy in float64; and the geometric median, against a general minimiser."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from saecore.training.survey import draw, geometric_median, survey
from tests.training.test_embeddings import ROWS, WIDTH, mapped, normal


def test_moments_at_an_offset_at_which_float32_fails(tmp_path: Path) -> None:
    """Sums of squares in float32 keep 7 digits: at 1e4 they leave nothing of a variance of 1."""
    rows = normal() + np.float32(1e4)
    found = survey(mapped(tmp_path, rows), held_out=300, seed=1)
    train = np.delete(rows, found.held_out, axis=0).astype(np.float64)
    scale = np.sqrt(WIDTH / np.square(train - train.mean(0)).sum(1).mean())
    assert found.scale == pytest.approx(scale, rel=1e-9)
    np.testing.assert_allclose(found.mean, train.mean(0), rtol=1e-7)
    naive = (np.square(rows).sum(0) / ROWS - np.square(rows.sum(0) / ROWS)).sum()
    assert abs(float(naive) / np.square(train - train.mean(0)).sum(1).mean() - 1) > 0.1


def test_rows_held_out_stay_out(tmp_path: Path) -> None:
    rows = normal()
    source = mapped(tmp_path, rows)
    first = survey(source, held_out=200, seed=1)
    assert (first.rows, len(np.unique(first.held_out)), first.unit_norm) == (ROWS, 200, False)
    np.testing.assert_array_equal(first.evaluation, rows[first.held_out])
    rest = np.delete(rows, first.held_out, axis=0)
    np.testing.assert_array_equal(first.sample, rest)
    rows[first.held_out] = 1e6
    again = survey(mapped(tmp_path, rows), held_out=200, seed=1)
    np.testing.assert_array_equal(again.mean, first.mean)
    assert again.scale == first.scale
    assert not np.array_equal(survey(source, held_out=200, seed=2).held_out, first.held_out)


def test_drawn_rows_are_those_that_a_survey_holds_out(tmp_path: Path) -> None:
    rows = normal()
    source = mapped(tmp_path, rows)
    for count in (1, 200, ROWS - 2):
        numbers, values = draw(source, count, seed=1)
        np.testing.assert_array_equal(numbers, survey(source, count, seed=1).held_out)
        np.testing.assert_array_equal(values, rows[numbers])
    numbers, values = draw(source, ROWS + 5, seed=1)
    np.testing.assert_array_equal(numbers, np.arange(ROWS))
    np.testing.assert_array_equal(values, rows)


def test_rows_of_length_one_and_rows_that_are_all_the_same(tmp_path: Path) -> None:
    rows = normal(50)
    assert survey(mapped(tmp_path, rows / np.linalg.norm(rows, axis=1, keepdims=True)), 5, 0).unit_norm
    with pytest.raises(ValueError, match="all embeddings are the same"):
        survey(mapped(tmp_path, np.ones((50, 3), np.float32)), 5, 0)
    with pytest.raises(ValueError, match="cannot hold out 50 of 50"):
        survey(mapped(tmp_path, rows), 50, 0)


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    rows = normal(80, 3) ** 3 + 2
    best = minimize(lambda point: np.linalg.norm(rows - point, axis=1).sum(), rows.mean(0), tol=1e-12, method="Powell")
    np.testing.assert_allclose(geometric_median(rows), best.x, atol=1e-3)


@pytest.mark.parametrize("seed", [*range(5)])
def test_on_a_line_it_is_the_median(seed: int) -> None:
    rows = normal(31, 1, seed=seed)
    np.testing.assert_allclose(geometric_median(rows), np.median(rows, axis=0), atol=1e-3)


def test_a_mean_that_is_a_row_does_not_hold_it_unless_it_is_the_median() -> None:
    """Weiszfeld's iteration starts at the mean: a row there weighs infinitely much."""
    for line, median in (([-3, 0, 1, 1, 1], 1), ([-2, -1, 0, 1, 2], 0), ([2, 2, 2], 2)):
        np.testing.assert_allclose(geometric_median(np.array(line, np.float32)[:, None]), [median], atol=1e-3)
