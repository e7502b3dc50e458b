"""The derivative along the CLS path, taken forwards: a check of the gradient taken backwards (`saecore.towers.cls_path`).

Let every layer's CLS attention row be A (1 + t s), with fixed signs s = +1 or -1 for each layer, head and token. Then

    d/dt (w . x) = sum_l sum_h sum_i s A D          D the gradient by attention

Right: the terms that `contrib_grad` adds up, with signs. Left: one tangent for each image, pushed from layer to layer. Linear
maps act on the tangent itself; LayerNorms, softmax and activation function are the model's own, differentiated by differences
in float64. So no formula of the backward pass is used here, and a wrong gradient shows as a difference, even where its terms
add up to the right sum. Both sides use the same read-outs w.

Cost: one row a layer, for all read-outs together.

Shapes are those of `saecore.towers.tower`: B images, k read-outs, N tokens, H heads, D width.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

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
    tangent = torch.zeros_like(trace.query_final, dtype=torch.float32)
    s = signs(layers, tower.n_heads, trace.values[-1].shape[1]).to(tangent.device)
    for index, layer in zip(range(-layers, 0), tower.path()[-layers:], strict=True):
        tangent = _through(tower, trace, index, layer, s[index], tangent, is_first=index == -layers)
    return (direction @ tangent[..., None]).squeeze(-1)


def _through(
    tower: ImageTower, trace: Trace, index: int, layer: PathLayer, s: Tensor, tangent: Tensor, is_first: bool
) -> Tensor:
    """The tangent (B, D) that enters a layer -> the tangent that leaves it. It is zero when it enters the first layer.

    A name with `d_` is the derivative by t of what its name says.
    """
    A, v = trace.query_attention[index], _heads(tower, trace.values[index])
    d_A, d_heads = A * s, torch.zeros_like(v[:, :, 0])
    if not is_first:
        assert layer.entry is not None  # A learned query has no layer below it.
        entry = layer.entry
        d_normed = _of_norm(entry.norm1, trace.query_before[index], tangent)
        d_q, d_k, d_v = (_heads(tower, d_normed[:, None] @ w.float().T) for w in (entry.q, entry.k, entry.v))
        q, keys = _heads(tower, trace.query_q[index][:, None]), _heads(tower, trace.keys[index])
        # CLS is token 0: only its own key and value move with it.
        d_scores = (keys * d_q).sum(-1)
        d_scores[..., 0] += (q * d_k).sum((2, 3))
        scores = (keys * q).sum(-1) * entry.scale
        d_A = d_A + _derivative(functools.partial(torch.softmax, dim=-1), scores, d_scores * entry.scale)
        d_heads = A[..., :1] * d_v[:, :, 0]
    d_heads = d_heads + (d_A[:, :, None] @ v).squeeze(2)
    d_after = tangent + d_heads.flatten(1) @ layer.out.float().T
    d_inner = _of_norm(layer.norm2, trace.query_after[index], d_after) @ layer.mlp.fc1.weight.float().T
    d_active = _derivative(layer.mlp.activation_fn, trace.query_inner[index], d_inner)
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


def _heads(tower: ImageTower, x: Tensor) -> Tensor:
    """(B, n, D) -> float32 (B, H, n, Dh)."""
    return x.unflatten(-1, (tower.n_heads, -1)).transpose(1, 2).float()
