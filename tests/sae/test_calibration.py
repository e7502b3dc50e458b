"""The threshold of BatchTopK: how many latents fire with it."""

import math

import pytest
import torch

from saecore.evaluation.quality import quality
from saecore.sae.calibration import calibrate
from saecore.sae.model import SAEConfig
from tests.evaluation.test_quality import LATENTS, WIDTH, normal, sae_of
from tests.helpers.towers import random_sae


@pytest.mark.parametrize("by_magnitude", [False, True])
@pytest.mark.parametrize("rows", [500, 2500])
def test_calibrated_k_latents_fire_on_average(rows: int, by_magnitude: bool) -> None:
    """Also on rows that lie in the order of their strength: the first and the last batch are of another kind."""
    x = normal(rows, WIDTH) * torch.linspace(0.5, 3, rows)[:, None]
    sae = sae_of("batchtopk", threshold=math.nan, output="signed" if by_magnitude else "relu")
    if by_magnitude:
        sae.config = SAEConfig(WIDTH, LATENTS, 8, "batchtopk", "signed", by_magnitude=True)
    with pytest.raises(ValueError, match="no threshold"):
        sae.encode_sparse(x)
    threshold = calibrate(sae, x, 8)
    assert float(sae.firing_threshold()) == threshold
    assert quality(sae, x).l0 == pytest.approx(8, rel=0.03)


def test_only_a_batchtopk_sae_with_a_k_is_calibrated() -> None:
    with pytest.raises(ValueError, match="a topk SAE has no threshold to calibrate"):
        calibrate(random_sae(), normal(20, WIDTH), 8)
    with pytest.raises(ValueError, match="does not say its k"):
        calibrate(sae_of("batchtopk"), normal(20, WIDTH), 0)
