"""`contrib` against its invariant and a derivation by autograd on a linearised model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from saecore.relevance import maps as relevance
from saecore.relevance.explain import explain_latents
from saecore.sae.checkpoints import load_sae
from saecore.sae.model import SAE
from saecore.towers.clip import ClipTower
from saecore.towers.stopped import StoppedTower, stopped_at
from tests.helpers.towers import SHAPES, demo_tower, random_pixels, random_sae, random_tower


def maps_of(tower: ClipTower, sae: SAE, pixels: Tensor, latents: Tensor) -> tuple[relevance.Maps, Tensor]:
    """Maps of the given latents (B, k), and their pre-activations as the SAE computes them."""
    with torch.inference_mode():
        maps = explain_latents(tower, sae, pixels, latents)["contrib"]
        return maps, sae.pre_activations(tower.embed(pixels)).gather(1, latents)


def linearised(tower: ClipTower, sae: SAE, pixels: Tensor, latents: Tensor) -> Tensor:
    """R (B, k, P) derived another way, float64: gradient x input of a model in which nothing but the patches' path is live.

    Each layer's CLS attention output is a sum over tokens of g_i times its term; the gates g (one per layer and patch) are
    inputs, all 1. Attention rows, values, MLP outputs and the final LayerNorm's mean and deviation are constants, so the
    model is linear in g, and dz/dg_i summed over layers is patch i's contribution. Everything is autograd's work.
    """
    vision = tower.vision.double()
    hidden = vision.pre_layrnorm(vision.embeddings(tower.normalise(pixels)))
    gates, cls_path = [], hidden[:, 0]
    for layer in vision.encoder.layers:
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        q, k, v = (
            projection(normed).unflatten(-1, (tower.n_heads, -1)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) * attention.scale, -1)
        gate = torch.ones(*normed.shape[:2], dtype=torch.float64, requires_grad=True)
        gates.append(gate)
        gated = ((weights[:, :, 0] * gate[:, None]).unsqueeze(2) @ v).squeeze(2).flatten(1)
        after = hidden + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        leaving = after + layer.mlp(layer.layer_norm2(after))
        cls_path = cls_path + attention.out_proj(gated) + (leaving - after)[:, 0]
        hidden = leaving
    embedding = cls_path
    if not isinstance(tower, StoppedTower):
        norm, final = vision.post_layernorm, hidden[:, 0]
        deviation = (final.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        normed = (cls_path - cls_path.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias
        embedding = normed @ tower.projection.weight.double().T
    pre = ((embedding - sae.mean) * sae.scale - sae.pre_bias) @ sae.encoder.double() + sae.latent_bias
    rows = []
    for column in range(latents.shape[1]):
        target = pre.gather(1, latents[:, column : column + 1]).sum()
        gradients = torch.autograd.grad(target, gates, retain_graph=True)
        rows.append(torch.stack(gradients).sum(0)[:, 1:])
    tower.vision.float()
    return torch.stack(rows, 1)


TOWERS = [*((shape, None) for shape in SHAPES), (SHAPES[0], 0), (SHAPES[0], 2), (SHAPES[2], 3)]
"""Shapes, and the layer at which the tower is stopped, if it is."""


def models(shape: dict[str, Any], layer: int | None) -> tuple[ClipTower, SAE]:
    _, tower = random_tower(**shape)
    tower = tower if layer is None else stopped_at(tower, layer)
    return tower, random_sae(n_inputs=tower.n_outputs)


@pytest.mark.parametrize(("shape", "layer"), TOWERS)
def test_patches_and_remainder_add_up_to_the_pre_activation(shape: dict[str, Any], layer: int | None) -> None:
    tower, sae = models(shape, layer)
    pixels = random_pixels(tower, 6)
    maps, pre = maps_of(tower, sae, pixels, torch.arange(96).expand(6, -1))
    # The stream of a layer is longer than an embedding: its terms cancel, and so round, more.
    assert relevance.completeness_error(maps, pre).max() < (1e-5 if layer is None else 2e-5)
    # The patches' part is not a rounding of nothing: it differs between images and carries much of the pre-activation.
    assert maps.relevance.sum(-1).std(0).mean() > 0.05


@pytest.mark.parametrize(("shape", "layer"), TOWERS)
def test_equals_autograd_on_the_linearised_model(shape: dict[str, Any], layer: int | None) -> None:
    tower, sae = models(shape, layer)
    pixels = random_pixels(tower, 4)
    latents = torch.randint(0, 96, (4, 7), generator=torch.Generator().manual_seed(3))
    expected = linearised(tower, sae, pixels, latents)
    maps, _ = maps_of(tower, sae, pixels, latents)
    error = (maps.relevance - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_on_the_embedded_model() -> None:
    tower, sae = demo_tower(), load_sae("demo")
    pixels = random_pixels(tower, 8)
    latents = torch.topk(sae.pre_activations(tower.embed(pixels)), sae.config.k).indices
    maps, pre = maps_of(tower, sae, pixels, latents)
    assert relevance.completeness_error(maps, pre).max() < 1e-5
    expected = linearised(tower, sae, pixels[:2], latents[:2, :4])
    error = (maps.relevance[:2, :4] - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_a_latent_has_one_map_however_many_are_asked_for() -> None:
    _, tower = random_tower()
    sae, pixels = random_sae(), random_pixels(tower, 3)
    many, _ = maps_of(tower, sae, pixels, torch.arange(64).expand(3, -1))
    alone, _ = maps_of(tower, sae, pixels, torch.full((3, 1), 41))
    torch.testing.assert_close(alone.relevance[:, 0], many.relevance[:, 41], rtol=1e-5, atol=1e-6)
    single, _ = maps_of(tower, sae, pixels[1:2], torch.full((1, 1), 41))
    torch.testing.assert_close(single.relevance[0, 0], many.relevance[1, 41], rtol=1e-5, atol=1e-6)


def test_sink_share_by_hand() -> None:
    maps = relevance.Maps(torch.tensor([[[1.0, -2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]), torch.zeros(1, 2))
    sinks = torch.tensor([[False, True, False, True]])
    torch.testing.assert_close(relevance.sink_share(maps, sinks), torch.tensor([[2 / 6, 0.0]]))
