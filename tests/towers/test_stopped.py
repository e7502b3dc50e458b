"""A tower as far as a layer: what CLS is there, to transformers; its maps, to float64; which sites it has."""

from typing import Any

import pytest
import torch

from saecore.methods import METHODS, OF_EMBEDDING, Options
from saecore.relevance.explain import explain_latents
from saecore.relevance.maps import completeness_error
from saecore.towers.stopped import stopped_at
from tests.helpers.derivations import plain_forward, plain_layers
from tests.helpers.towers import (
    SHAPES,
    SIGLIP_SHAPES,
    random_head,
    random_pixels,
    random_sae,
    random_siglip,
    random_tower,
)

LAYERS = [(shape, layer) for shape in SHAPES for layer in range(shape["layers"])]


@pytest.mark.parametrize(("shape", "layer"), LAYERS)
def test_the_embedding_is_that_of_transformers_hidden_states(shape: dict[str, Any], layer: int) -> None:
    model, whole = random_tower(**shape)
    tower, pixels = stopped_at(whole, layer), random_pixels(whole, 7)
    with torch.inference_mode():
        hidden = model(pixel_values=whole.normalise(pixels), output_hidden_states=True).hidden_states
        expected = hidden[layer + 1][:, 0]
        torch.testing.assert_close(tower.embed(pixels), expected, rtol=1e-5, atol=1e-5)
        embedding, trace = tower(pixels)
        torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tower.embed(pixels[3:4]), expected[3:4], rtol=1e-5, atol=1e-5)
    assert len(tower.path()) == len(trace.values) == layer + 1
    assert tower.n_outputs == shape["width"]
    assert tower.sha256() == whole.sha256()


def test_layers_above_are_not_computed() -> None:
    _, whole = random_tower(**SHAPES[2])
    tower, pixels = stopped_at(whole, 2), random_pixels(whole, 2)
    before = tower.embed(pixels)
    for layer in whole.vision.encoder.layers[3:]:
        layer.forward = layer.self_attn.forward = None
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    whole.projection.weight.fill_(torch.nan)
    torch.testing.assert_close(tower.embed(pixels), before, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("norm", ["frozen", "exact"])
def test_every_method_runs_there_and_sums_add_up(layer: int, norm: str) -> None:
    _, whole = random_tower(**SHAPES[0])
    tower = stopped_at(whole, layer)
    sae, pixels, latents = random_sae(tower.n_outputs), random_pixels(tower, 3), torch.arange(20).expand(3, -1)
    with torch.inference_mode():
        made = explain_latents(
            tower, sae, pixels, latents, OF_EMBEDDING, Options(norm=norm, subsets=60), head=random_head(tower)
        )
        pre = sae.pre_activations(tower.embed(pixels)).gather(1, latents)
    for name, maps in made.items():
        assert maps.relevance.isfinite().all(), name
        if METHODS[name].decomposes:
            assert completeness_error(maps, pre).max() < 1e-5, name
    assert made["contrib_grad"].gradient_error is not None


def test_occlusion_is_what_a_plain_forward_says_without_a_patch() -> None:
    _, whole = random_tower(**SHAPES[0])
    tower = stopped_at(whole, 1)
    sae, pixels, latents = random_sae(tower.n_outputs), random_pixels(tower, 2), torch.tensor([[1, 5, 9], [2, 5, 70]])
    with torch.inference_mode():
        maps = explain_latents(tower, sae, pixels, latents, ("occlusion",), Options(block=1))["occlusion"]
    first = plain_forward(tower, pixels)[0].entering.detach()

    def values(tokens: torch.Tensor) -> torch.Tensor:
        vision = tower.vision.double()
        e = plain_layers(vision, tokens)[-1].leaving[:, 0].detach()
        tower.vision.float()
        pre = ((e - sae.mean) * sae.scale - sae.pre_bias) @ sae.encoder.double() + sae.latent_bias
        return pre.gather(1, latents)

    whole_values = values(first)
    for patch in range(first.shape[1] - 1):
        kept = [token for token in range(first.shape[1]) if token != patch + 1]
        drop = whole_values - values(first[:, kept])
        torch.testing.assert_close(maps.relevance[:, :, patch].double(), drop, rtol=1e-4, atol=1e-4)


def test_sites_that_a_model_does_not_have() -> None:
    _, whole = random_tower(**SHAPES[0])
    with pytest.raises(ValueError, match="its image tower has the layers 0 to 2, and no layer 3"):
        stopped_at(whole, 3)
    _, siglip = random_siglip(**SIGLIP_SHAPES[0])
    with pytest.raises(ValueError, match="its image tower has no CLS token"):
        stopped_at(siglip, 0)
