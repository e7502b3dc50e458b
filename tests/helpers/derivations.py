"""Second derivations that several test files hold the library against: the towers written plainly, in float64, by autograd.

    plain_layers     every layer as the papers write it, each with its whole attention A, by which one can differentiate
    embed, read      what follows the layers: final LayerNorm and projection, then pre-activations of an SAE
    replayed         dz/dA along the CLS path, the patches being constants
    fused            one layer of the classic scripts of rollout

Nothing here calls what it is a derivation of, except `ours`, which asks the library for its answer.

Shapes: B images, k latents, H heads, N tokens, P patches, D width.
"""

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saecore.methods import Options
from saecore.relevance.explain import explain_latents
from saecore.relevance.targets import WordTargets
from saecore.sae.model import SAE
from saecore.towers.clip import ClipTower
from saecore.towers.tower import ImageTower


class Layer(NamedTuple):
    """One layer of a plain forward in float64, with autograd's graph: all tokens, the whole attention."""

    entering: Tensor
    A: Tensor  # (B, H, N, N)
    leaving: Tensor
    q: Tensor  # (B, N, D)
    k: Tensor


def plain_forward(tower: ClipTower, pixels: Tensor) -> list[Layer]:
    """All layers over pixels."""
    vision = copy.deepcopy(tower.vision).double()
    return plain_layers(vision, vision.pre_layrnorm(vision.embeddings(tower.normalise(pixels))))


def plain_layers(vision: Any, hidden: Tensor) -> list[Layer]:
    """Attention as written in the paper; every layer's A is a variable that can be differentiated by."""
    layers = []
    for layer in vision.encoder.layers:
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        flat = [part(normed) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        q, k, v = (part.unflatten(-1, (vision.config.num_attention_heads, -1)).transpose(1, 2) for part in flat)
        A = torch.softmax(q @ k.transpose(2, 3) * attention.scale, -1)
        A = A if A.requires_grad else A.requires_grad_()
        after = hidden + attention.out_proj((A @ v).transpose(1, 2).flatten(2))
        leaving = after + layer.mlp(layer.layer_norm2(after))
        layers.append(Layer(hidden, A, leaving, flat[0], flat[1]))
        hidden = leaving
    return layers


def embed(tower: ClipTower, token: Tensor, exact: bool) -> Tensor:
    """Final LayerNorm and projection, float64; the deviation is a constant to autograd unless `exact`."""
    norm = tower.vision.post_layernorm
    deviation = (token.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    normed = (token - token.mean(-1, keepdim=True)) / (deviation if exact else deviation.detach())
    return (normed * norm.weight.double() + norm.bias.double()) @ tower.projection.weight.double().T


def read(sae: SAE, embedding: Tensor, latents: Tensor) -> Tensor:
    """Pre-activations (B, k) of an embedding, float64."""
    pre = ((embedding - sae.mean) * sae.scale - sae.pre_bias) @ sae.encoder.double() + sae.latent_bias
    return pre.gather(1, latents)


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
    gradients = []
    for column in range(latents.shape[1]):
        gradients.append(torch.autograd.grad(z[:, column].sum(), bumps, retain_graph=True))
    tower.vision.float()
    return [torch.stack(layer, 1).squeeze(3) for layer in zip(*gradients, strict=True)]


def fused(A: np.ndarray, G: np.ndarray, discard: float) -> np.ndarray:
    """(H, n, N) each -> what rollout keeps of their product (n, N)."""
    product = A.mean(0) * G.mean(0)
    flat = product.ravel().copy()
    flat[np.argsort(flat)[: int(discard * flat.size)]] = 0
    return np.maximum(flat, 0).reshape(product.shape)


def some_latents(sae: SAE, images: int, k: int) -> Tensor:
    """int64 (images, k), always the same ones."""
    return torch.randint(0, sae.config.n_latents, (images, k), generator=torch.Generator().manual_seed(3))


def ours(
    tower: ImageTower,
    sae: SAE,
    pixels: Tensor,
    latents: Tensor,
    method: str,
    words: WordTargets | None = None,
    **options: Any,
) -> Tensor:
    """The library's maps (B, k, P) by one method."""
    with torch.inference_mode():
        return explain_latents(tower, sae, pixels, latents, (method,), Options(**options), words)[method].relevance


def assert_close(maps: Tensor, expected: Any) -> None:
    """Within 1e-5 of the largest value: what every gradient method promises in float32."""
    expected = np.asarray(expected)
    assert np.abs(maps.numpy() - expected).max() / np.abs(expected).max() < 1e-5
