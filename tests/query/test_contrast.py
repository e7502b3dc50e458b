"""The 2 x 2 tables by hand."""

import math

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from saecore.query.contrast import contrast


def contrasted(counts: list[tuple[int, int]], n_a: int, n_b: int) -> dict[int, dict[str, float]]:
    a, b = zip(*counts, strict=True)
    table = pa.table({"latent": pa.array(range(len(counts)), pa.int32()), "images_a": a, "images_b": b})
    return {row["latent"]: row for row in contrast(table, n_a, n_b).to_pylist()}


def test_chi_squared_where_counts_are_large() -> None:
    """30 of 100 against 10 of 100: expected 20 each, so chi^2 = 2 * 10^2 / 20 + 2 * 10^2 / 80 = 12.5 with one degree."""
    row = contrasted([(30, 10)], 100, 100)[0]
    assert row["p"] == pytest.approx(math.erfc(math.sqrt(12.5 / 2)))
    assert row["q"] == row["p"]
    assert (row["rate_a"], row["rate_b"]) == (0.3, 0.1)
    assert row["effect"] == pytest.approx(2 * (math.asin(0.3**0.5) - math.asin(0.1**0.5)))
    assert row["odds_ratio"] == pytest.approx(30.5 * 90.5 / (10.5 * 70.5))


def test_fisher_where_they_are_small() -> None:
    """3 of 3 against 0 of 3: of the 20 ways to choose 3 of 6, two are as extreme."""
    assert contrasted([(3, 0)], 3, 3)[0]["p"] == pytest.approx(2 / 20)
    assert contrasted([(3, 3)], 3, 3)[0]["p"] == 1.0  # fires everywhere


def test_the_border_between_the_two_is_an_expected_count_of_five() -> None:
    """Of 10 firing images in sets of 50 and 50, 5 are expected on each side; of 9, fewer."""
    found = contrasted([(8, 2), (8, 1)], 50, 50)
    assert found[0]["p"] == pytest.approx(stats.chi2_contingency([[8, 42], [2, 48]], correction=False).pvalue)
    assert found[1]["p"] == pytest.approx(stats.fisher_exact([[8, 42], [1, 49]]).pvalue)
    assert found[0]["p"] != pytest.approx(stats.fisher_exact([[8, 42], [2, 48]]).pvalue)


def test_correction_over_all_latents() -> None:
    """Benjamini and Hochberg: q of the i-th smallest of m is the least p_j m / j of those from it on."""
    random = np.random.default_rng(0)
    counts = [(int(a), int(b)) for a, b in random.integers(0, 60, (40, 2))]
    found = contrasted(counts, 100, 120)
    ordered = sorted(found.values(), key=lambda row: row["p"])
    raw = [row["p"] * len(ordered) / place for place, row in enumerate(ordered, 1)]
    np.testing.assert_allclose([row["q"] for row in ordered], np.minimum.accumulate(raw[::-1])[::-1], rtol=1e-12)


def test_latents_that_do_not_differ_are_rarely_called_different() -> None:
    """4,000 latents that fire at random: none may pass q < 0.05, or in one of twenty such trials one does."""
    random = np.random.default_rng(3)
    rates = random.random(4000) * 0.2
    counts = [(int(a), int(b)) for a, b in zip(random.binomial(500, rates), random.binomial(700, rates), strict=True)]
    same = contrasted(counts, 500, 700)
    assert min(row["q"] for row in same.values()) > 0.05
    assert 0.02 < np.mean([row["p"] < 0.05 for row in same.values()]) < 0.06
    different = contrasted([*counts, (100, 40)], 500, 700)
    assert [latent for latent, row in different.items() if row["q"] < 0.05] == [4000]
