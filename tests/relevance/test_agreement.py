"""How far two maps lie apart, beside SciPy and by hand."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from saecore.relevance.agreement import peak_distance, rank_correlation


@pytest.mark.parametrize("distinct", [2, 5, 10_000])
def test_rank_correlation_is_scipy_s_with_ties(distinct: int) -> None:
    """Activations are zero at most patches, so that most of their ranks are shared."""
    generator = torch.Generator().manual_seed(distinct)
    one, other = torch.randint(0, distinct, (2, 3, 4, 49), generator=generator).float()
    other += (distinct > 5) * one
    found = rank_correlation(one, other)
    for image in range(3):
        for target in range(4):
            expected = spearmanr(one[image, target], other[image, target]).statistic
            assert found[image, target] == pytest.approx(expected, abs=1e-6)


def test_peaks() -> None:
    one, other = np.zeros((2, 3, 4), np.float32)
    one[0, 1], other[2, 3], other[0, 0] = 1, 2, -9
    distance = peak_distance(torch.from_numpy(one).flatten()[None], torch.from_numpy(other).flatten()[None], (3, 4))
    assert distance.tolist() == pytest.approx([8**0.5])


def test_a_constant_map_has_neither() -> None:
    values, flat = torch.arange(12.0)[None], torch.zeros(1, 12)
    for pair in ((values, flat), (flat, values), (flat, flat)):
        assert rank_correlation(*pair).isnan().all()
        assert peak_distance(*pair, (3, 4)).isnan().all()
