"""A tower as far as a layer goes on to the image embedding, from any layer, the last one too."""

from typing import Any

import pytest
import torch

from saecore.towers.stopped import stopped_at
from saecore.towers.tokens import tokens_at
from tests.helpers.towers import SHAPES, SIGLIP_SHAPES, random_pixels, random_siglip, random_tower

TOWERS = [(random_tower, SHAPES[0]), (random_tower, SHAPES[1]), (random_siglip, SIGLIP_SHAPES[0])]


@pytest.mark.parametrize(("make", "shape"), TOWERS)
def test_the_rest_of_the_tower_makes_the_embedding(make: Any, shape: dict[str, Any]) -> None:
    whole = make(**shape)[1]
    pixels = random_pixels(whole, 3)
    with torch.inference_mode():
        expected = whole.embed(pixels)
        for layer in range(whole.n_layers):
            tower = tokens_at(whole, layer, "patches")
            streams, _ = tower.streams(pixels, 1)
            found = tower.whole.embed_tokens(streams, tower.start)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            if whole.n_own:
                stopped = stopped_at(whole, layer)
                _, trace = stopped(pixels, tokens=1)
                found = stopped.whole.embed_tokens(trace.tokens[-1], stopped.start)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_that_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="has the layers 0 to 2, and no layer 3"):
        tokens_at(random_siglip(**SIGLIP_SHAPES[0])[1], 3, "patches")


@pytest.mark.parametrize(("make", "shape"), [TOWERS[0], TOWERS[2]])
def test_it_runs_in_bfloat16(make: Any, shape: dict[str, Any]) -> None:
    """The layers do, and what they leave is float32."""
    whole = make(**shape)[1]
    tower, pixels = tokens_at(whole, 1, "patches"), random_pixels(whole, 2)
    exact = tower.embed(pixels)
    tower.run_in(torch.bfloat16)
    rough = tower.embed(pixels)
    assert rough.dtype == torch.float32
    assert tower.vision.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 0.05
