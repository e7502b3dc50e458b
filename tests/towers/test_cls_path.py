"""The hand-written gradient along the CLS path against autograd in float64, on every shape and on the embedded model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from saecore.sae.checkpoints import load_sae
from saecore.sae.model import SAE
from saecore.towers.clip import ClipTower
from saecore.towers.cls_path import attention_gradients
from tests.helpers.towers import SHAPES, demo_tower, random_pixels, random_sae, random_tower


def replayed(tower: ClipTower, sae: SAE, pixels: Tensor, latents: Tensor, exact: bool) -> list[Tensor]:
    """dz/dA^l (B, k, H, N) by autograd: patch tokens are constants, the CLS token runs through all layers over them.

    A bump of zeros is added to each layer's CLS attention row, and z is differentiated by it.
    """
    vision = tower.vision.double()
    hidden = vision.pre_layrnorm(vision.embeddings(tower.normalise(pixels)))
    cls, bumps = hidden[:, 0], []
    for layer in vision.encoder.layers:
        attention = layer.self_attn
        normed, own = layer.layer_norm1(hidden), layer.layer_norm1(cls)[:, None]
        split = lambda t: t.unflatten(-1, (tower.n_heads, -1)).transpose(1, 2)  # noqa: E731
        tokens = torch.cat([own, normed[:, 1:]], dim=1)
        q, k, v = split(attention.q_proj(own)), split(attention.k_proj(tokens)), split(attention.v_proj(tokens))
        row = torch.softmax(q @ k.transpose(2, 3) * attention.scale, -1)
        bump = torch.zeros_like(row).requires_grad_()
        bumps.append(bump)
        after = cls + attention.out_proj(((row + bump) @ v).transpose(1, 2).flatten(2))[:, 0]
        cls = after + layer.mlp(layer.layer_norm2(after))
        # The patches go on as they do, without a graph.
        with torch.no_grad():
            every = [split(projection(normed)) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
            mixed = torch.softmax(every[0] @ every[1].transpose(2, 3) * attention.scale, -1) @ every[2]
            hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    norm = vision.post_layernorm
    deviation = (cls.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    deviation = deviation if exact else deviation.detach()
    embedding = (
        (cls - cls.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias
    ) @ tower.projection.weight.double().T
    w = sae.read_outs(latents)[0].double()
    z = (w * embedding[:, None]).sum(-1)
    found = []
    for column in range(latents.shape[1]):
        found.append(torch.autograd.grad(z[:, column].sum(), bumps, retain_graph=True))
    tower.vision.float()
    return [torch.stack(layer, 1).squeeze(3) for layer in zip(*found, strict=True)]


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
