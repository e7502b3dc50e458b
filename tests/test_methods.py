"""Every method of maps against its formula, on gradients and attention that autograd and a plain forward give in float64."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from saecore import relevance
from saecore.checkpoints import load_sae
from saecore.clip import ImageTower, load_tower
from saecore.inference import METHODS
from saecore.sae import SAE
from tests.test_cls_path import replayed
from tests.towers import SHAPES, random_pixels, random_sae, random_tower


class Oracle(NamedTuple):
    """By layer, in float64."""

    D: list[np.ndarray]  # (B, k, H, N)
    A: list[np.ndarray]  # (B, H, N)
    lam: np.ndarray  # (B, P)


def oracle(tower: ImageTower, sae: SAE, pixels: Tensor, latents: Tensor) -> Oracle:
    """Attention rows and Grad-ECLIP's weights from a plain forward, gradients from `replayed`."""
    gradients = [layer.numpy() for layer in replayed(tower, sae, pixels, latents, exact=False)]
    vision = tower.vision.double()
    with torch.no_grad():
        hidden = vision.pre_layrnorm(vision.embeddings(tower.normalise(pixels)))
        rows = []
        for layer in vision.encoder.layers:
            attention, normed = layer.self_attn, layer.layer_norm1(hidden)
            q, k, v = (
                projection(normed).unflatten(-1, (tower.n_heads, -1)).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            weights = torch.softmax(q @ k.transpose(2, 3) * attention.scale, -1)
            rows.append(weights[:, :, 0].numpy())
            hidden = hidden + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    tower.vision.float()
    query, keys = q.transpose(1, 2).flatten(2)[:, 0].numpy(), k.transpose(1, 2).flatten(2)[:, 1:].numpy()
    cosine = (
        np.einsum("bd,bpd->bp", query, keys) / np.linalg.norm(query, axis=1)[:, None] / np.linalg.norm(keys, axis=2)
    )
    low, high = cosine.min(1, keepdims=True), cosine.max(1, keepdims=True)
    return Oracle(gradients, rows, (cosine - low) / (high - low))


def by_formula(name: str, seen: Oracle) -> np.ndarray:
    """(B, k, P), written as the papers have it, with whole token-by-token matrices where they have those."""
    last_D, last_A = seen.D[-1], seen.A[-1][:, None]
    if name == "contrib_grad":
        return sum((A[:, None] * D).sum(2)[..., 1:] for A, D in zip(seen.A, seen.D, strict=True))
    if name == "chefer":
        return np.maximum(last_A * last_D, 0).mean(2)[..., 1:]
    if name == "legrad":
        return np.maximum(last_D, 0).mean(2)[..., 1:]
    if name == "gradeclip":
        return np.maximum(seen.lam[:, None] * last_D.sum(2)[..., 1:], 0)
    return np.broadcast_to(last_A.mean(2)[..., 1:], last_D.sum(2)[..., 1:].shape)


def all_layers(name: str, seen: Oracle) -> np.ndarray:
    """Chefer's rule with N x N matrices in which only the CLS row of each layer's is not zero; LeGrad's sum of layers."""
    if name == "legrad":
        return sum(np.maximum(D, 0).mean(2)[..., 1:] for D in seen.D)
    B, k, _, N = seen.D[0].shape
    R = np.broadcast_to(np.eye(N), (B, k, N, N)).copy()
    for A, D in zip(seen.A, seen.D, strict=True):
        cam = np.zeros((B, k, N, N))
        cam[:, :, 0] = np.maximum(A[:, None] * D, 0).mean(2)
        R = R + cam @ R
    return R[:, :, 0, 1:]


def assert_close(found: Tensor, expected: np.ndarray) -> None:
    assert np.abs(found.numpy() - expected).max() / np.abs(expected).max() < 1e-5


@pytest.mark.parametrize("model", [*range(len(SHAPES)), "demo"])
def test_every_method_equals_its_formula(model: Any) -> None:
    if model == "demo":
        tower, sae = load_tower("demo"), load_sae("demo")
    else:
        (_, tower), sae = random_tower(**SHAPES[model]), random_sae()
    pixels = random_pixels(tower, 3)
    latents = torch.randint(0, sae.config.n_latents, (3, 5), generator=torch.Generator().manual_seed(3))
    seen = oracle(tower, sae, pixels, latents)
    with torch.inference_mode():
        _, trace = tower(pixels, keys=True)
        read_outs = sae.read_outs(latents)
        for name in METHODS.keys() - {"contrib"}:
            assert_close(METHODS[name](tower, trace, *read_outs).relevance, by_formula(name, seen))
        for method in (relevance.chefer, relevance.legrad):
            found = method(tower, trace, *read_outs, layers=len(seen.D))
            assert_close(found.relevance, all_layers(method.__name__, seen))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_layers_gradient_is_that_of_the_full_model(shape: dict[str, Any]) -> None:
    """Of the whole N x N attention of the last layer, only the CLS row has a gradient, and it is ours."""
    _, tower = random_tower(**shape)
    sae, pixels = random_sae(), random_pixels(tower, 2)
    latents = torch.tensor([[1, 50], [7, 8]])
    ours = replayed(tower, sae, pixels, latents, exact=False)[-1]
    vision = tower.vision.double()
    hidden = vision.pre_layrnorm(vision.embeddings(tower.normalise(pixels)))
    for index, layer in enumerate(vision.encoder.layers):
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        q, k, v = (
            projection(normed).unflatten(-1, (tower.n_heads, -1)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) * attention.scale, -1)
        if index + 1 == len(vision.encoder.layers):
            weights = weights.detach().requires_grad_()
            last = weights
        hidden = hidden + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    cls, norm = hidden[:, 0], vision.post_layernorm
    deviation = (cls.var(-1, correction=0, keepdim=True) + norm.eps).sqrt().detach()
    embedding = (
        (cls - cls.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias
    ) @ tower.projection.weight.double().T
    z = (sae.read_outs(latents)[0].double() * embedding[:, None]).sum(-1)
    for column in range(2):
        full = torch.autograd.grad(z[:, column].sum(), last, retain_graph=True)[0]
        assert full[:, :, 1:].abs().max() == 0
        torch.testing.assert_close(full[:, :, 0], ours[:, column])
    tower.vision.float()


@pytest.mark.parametrize("shape", SHAPES)
def test_contrib_grad_and_its_remainder_add_up(shape: dict[str, Any]) -> None:
    _, tower = random_tower(**shape)
    sae = random_sae()
    with torch.inference_mode():
        embedding, trace = tower(random_pixels(tower, 4), keys=True)
        latents = torch.arange(96).expand(4, -1)
        maps = relevance.contrib_grad(tower, trace, *sae.read_outs(latents))
        assert relevance.completeness_error(maps, sae.pre_activations(embedding)).max() < 1e-5
        assert maps.relevance.sum(-1).std(0).mean() > 0.05


@pytest.mark.parametrize("name", METHODS)
def test_a_map_depends_on_its_image_and_its_read_out_only(name: str) -> None:
    """Batch and single, k = 1 and k = 64 agree."""
    _, tower = random_tower(**SHAPES[0])
    sae, pixels = random_sae(), random_pixels(tower, 5)
    latents = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(i))[:64] for i in range(5)])
    with torch.inference_mode():
        together = METHODS[name](tower, tower(pixels, keys=True)[1], *sae.read_outs(latents)).relevance
        for image in range(5):
            _, trace = tower(pixels[image : image + 1], keys=True)
            alone = METHODS[name](tower, trace, *sae.read_outs(latents[image : image + 1, 9:10])).relevance
            torch.testing.assert_close(alone[0, 0], together[image, 9], rtol=1e-4, atol=1e-5)
