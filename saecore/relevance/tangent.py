"""The derivative along the CLS path, taken forwards: a check of the gradient taken backwards (`saecore.towers.cls_path`).

Let every layer's CLS attention row be A (1 + t s), with fixed signs s = +1 or -1 for each layer, head and token. Then

    d/dt (w . x) = sum_l sum_h sum_i s A D          D the gradient by attention

Right: the terms that `contrib_grad` adds up, with signs. Left: one tangent for each query, pushed from layer to layer. Linear
maps act on the tangent itself; LayerNorms, softmax and activation function are the model's own, differentiated by differences
in float64. So no formula of the backward pass is used here, and a wrong gradient shows as a difference, even where its terms
add up to the right sum. Both sides use the same read-outs w.

Cost: one row a layer for each query, for all its read-outs together.

Shapes are those of `saecore.towers.cls_path`: B images, k read-outs, q queries, 1 or k, N tokens, H heads, D width.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from saecore.towers.cls_path import Passing, by_head, passing_of
from saecore.towers.tower import ImageTower, PathLayer, Trace

STEP = 1e-4
"""The step of a difference, relative to the length of the vector that is moved."""


@functools.lru_cache(maxsize=8)
def signs(layers: int, n_heads: int, n_tokens: int) -> Tensor:
    """s, float32 (layers, H, N) on the CPU, the same in every call."""
    drawn = torch.randint(2, (layers, n_heads, n_tokens), generator=torch.Generator().manual_seed(0))
    return drawn.float() * 2 - 1


def derivative(tower: ImageTower, trace: Trace, direction: Tensor, layers: int) -> Tensor:
    """d/dt of read-outs (B, k, D) of the query's final residual stream: float32 (B, k).

    Only the rows of the last `layers` layers depend on t. The trace must hold these layers, and their keys if they are several.
    """
    passings = [passing_of(tower, trace, index) for index in range(-layers, 0)]
    return derivative_along(tower.path()[-layers:], passings, tower.n_heads, direction)


def derivative_along(
    path: list[PathLayer], passings: list[Passing], n_heads: int, direction: Tensor, start: Tensor | None = None
) -> Tensor:
    """The same of queries that pass these layers: float32 (B, k).

    `start` (B, q, D) is the derivative of the streams that enter the first of the layers: none, if it is not given.
    """
    tangent = start
    s = signs(len(path), n_heads, passings[0].values.shape[1]).to(direction.device)
    for index, (layer, passing) in enumerate(zip(path, passings, strict=True)):
        tangent = _through(layer, passing, s[index], n_heads, tangent)
    assert tangent is not None  # there is one layer at least
    return (direction * tangent).sum(-1)


def _through(layer: PathLayer, passing: Passing, s: Tensor, n_heads: int, tangent: Tensor | None) -> Tensor:
    """The tangent (B, q, D) that enters a layer, or none -> the tangent that leaves it.

    A name with `d_` is the derivative by t of what its name says.
    """
    A, v = passing.attention, _heads(passing.values, n_heads)
    d_A = A * s[:, None]
    d_after = torch.zeros_like(passing.after, dtype=torch.float32)
    d_heads = torch.zeros_like(_heads(passing.q, n_heads))
    if tangent is not None:
        assert layer.entry is not None
        assert passing.keys is not None
        assert passing.own is not None
        entry, own = layer.entry, passing.own[:, None, :, None].expand(-1, n_heads, -1, 1)
        d_normed = _of_norm(entry.norm1, passing.before, tangent)
        d_q, d_k, d_v = (_heads(d_normed @ w.float().T, n_heads) for w in (entry.q, entry.k, entry.v))
        q, keys = _heads(passing.q, n_heads), _heads(passing.keys, n_heads)
        # Of keys and values, only the query's own move with it.
        d_scores = (d_q @ keys.mT).scatter_add(-1, own, (q * d_k).sum(-1, keepdim=True))
        scores = q @ keys.mT * entry.scale
        d_A = d_A + _derivative(functools.partial(torch.softmax, dim=-1), scores, d_scores * entry.scale)
        d_heads, d_after = A.gather(-1, own) * d_v, tangent
    d_heads = d_heads + d_A @ v
    d_after = d_after + d_heads.transpose(1, 2).flatten(2) @ layer.out.float().T
    d_inner = _of_norm(layer.norm2, passing.after, d_after) @ layer.mlp.fc1.weight.float().T
    d_active = _derivative(layer.mlp.activation_fn, passing.inner, d_inner)
    return d_after + d_active @ layer.mlp.fc2.weight.float().T


def _of_norm(norm: nn.LayerNorm, x: Tensor, tangent: Tensor) -> Tensor:
    weight, bias = norm.weight.double(), norm.bias.double()
    return _derivative(lambda at: layer_norm(at, at.shape[-1:], weight, bias, norm.eps), x, tangent)


def _derivative(f: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    """The derivative of f at x along a tangent: a central difference in float64, whose error is 1e-8 of the result."""
    x, tangent = x.double(), tangent.double()
    length, along = (torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp(min=STEP) for vector in (x, tangent))
    step = STEP * length / along
    return ((f(x + step * tangent) - f(x - step * tangent)) / (2 * step)).float()


def _heads(x: Tensor, n_heads: int) -> Tensor:
    """(B, n, D) -> float32 (B, H, n, Dh)."""
    return by_head(x, n_heads).transpose(1, 2).float()
