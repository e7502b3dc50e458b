"""The hand-written gradient along the CLS path against autograd in float64, on every shape and on the embedded model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from saecore.sae.checkpoints import load_sae
from saecore.sae.model import SAE
from saecore.towers.clip import ClipTower
from saecore.towers.cls_path import attention_gradients
from tests.helpers.derivations import replayed
from tests.helpers.towers import SHAPES, demo_tower, random_pixels, random_sae, random_tower


def assert_equal(tower: ClipTower, sae: SAE, pixels: Tensor, latents: Tensor, exact: bool) -> None:
    expected = replayed(tower, sae, pixels, latents, exact)
    with torch.inference_mode():
        _, trace = tower(pixels, keys=True)
        w = sae.read_outs(latents)[0]
        found = {index: D for index, D, _ in attention_gradients(tower, trace, w, len(expected), exact)}
        last = next(attention_gradients(tower, tower(pixels)[1], w, 1, exact))  # one layer needs no keys
    assert sorted(found) == list(range(-len(expected), 0))
    for index, D in zip(sorted(found), expected, strict=True):
        error = (found[index] - D).abs().max() / D.abs().max()
        assert error < 1e-5, (index, float(error))
    torch.testing.assert_close(last[1], found[-1])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_autograd(shape: dict[str, Any], exact: bool) -> None:
    _, tower = random_tower(**shape)
    latents = torch.randint(0, 96, (3, 5), generator=torch.Generator().manual_seed(3))
    assert_equal(tower, random_sae(), random_pixels(tower, 3), latents, exact)


def test_equals_autograd_on_the_embedded_model() -> None:
    tower, sae = demo_tower(), load_sae("demo")
    assert_equal(tower, sae, random_pixels(tower, 2), torch.tensor([[0, 7, 33], [5, 1, 70]]), True)
