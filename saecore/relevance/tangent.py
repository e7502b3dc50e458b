"""The forward derivative along the CLS path, which the gradient taken backwards (`saecore.towers.cls_path`) must agree with.

Let every layer's CLS attention row be A (1 + t s), with fixed signs s = +1 or -1 for each layer, head and token. Then

    d/dt (w . x) = sum_l sum_h sum_i s A D          D the gradient by attention

Right: the terms that `contrib_grad` adds up, with signs. Left: one tangent for each image, pushed from layer to layer. What is
linear takes it as it is, and the model's own LayerNorms, softmax and activation function by differences in float64, so that
no formula of the backward pass is in it. A wrong gradient, which may add up for all that, is a difference here. Read-outs w are
the same in both.

Cost: one row a layer, for all read-outs together.

Shapes as in `saecore.towers.tower`: B images, k read-outs, N tokens, H heads, D width.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from saecore.towers.tower import ImageTower, PathLayer, Trace

STEP = 1e-4
"""Of a difference, relative to the length of what is moved."""


@functools.lru_cache(maxsize=8)
def signs(layers: int, n_heads: int, n_tokens: int) -> Tensor:
    """s, float32 (layers, H, N) on the CPU: always the same."""
    drawn = torch.randint(2, (layers, n_heads, n_tokens), generator=torch.Generator().manual_seed(0))
    return drawn.float() * 2 - 1


def derivative(tower: ImageTower, trace: Trace, direction: Tensor, layers: int) -> Tensor:
    """d/dt of read-outs (B, k, D) of the query's final residual stream, by the last `layers` layers' rows: float32 (B, k).

    The trace must hold as many layers, and their keys if there are several.
    """
    tangent = torch.zeros_like(trace.query_final, dtype=torch.float32)
    s = signs(layers, tower.n_heads, trace.values[-1].shape[1]).to(tangent.device)
    for index, layer in zip(range(-layers, 0), tower.path()[-layers:], strict=True):
        tangent = _through(tower, trace, index, layer, s[index], tangent, entered=index > -layers)
    return (direction @ tangent[..., None]).squeeze(-1)


def _through(
    tower: ImageTower, trace: Trace, index: int, layer: PathLayer, s: Tensor, tangent: Tensor, entered: bool
) -> Tensor:
    """The tangent (B, D) entering a layer -> leaving it; not `entered`: it is nothing yet."""
    A, v = trace.query_attention[index], _heads(tower, trace.values[index])
    moved, given = A * s, torch.zeros_like(v[:, :, 0])
    if entered:
        assert layer.entry is not None  # a learned query has no layer below
        entry, norm = layer.entry, layer.entry.norm1
        normed = _of_norm(norm, trace.query_before[index], tangent)
        q, k_own, v_own = (_heads(tower, normed[:, None] @ w.float().T) for w in (entry.q, entry.k, entry.v))
        q_held, keys = _heads(tower, trace.query_q[index][:, None]), _heads(tower, trace.keys[index])
        scores = (keys * q).sum(-1)
        scores[..., 0] += (q_held * k_own).sum((2, 3))
        held = (keys * q_held).sum(-1) * entry.scale
        moved = moved + _moved(functools.partial(torch.softmax, dim=-1), held, scores * entry.scale)
        given = A[..., :1] * v_own[:, :, 0]
    given = given + (moved[:, :, None] @ v).squeeze(2)
    after = tangent + given.flatten(1) @ layer.out.float().T
    inner = _of_norm(layer.norm2, trace.query_after[index], after) @ layer.mlp.fc1.weight.float().T
    out = _moved(layer.mlp.activation_fn, trace.query_inner[index], inner)
    return after + out @ layer.mlp.fc2.weight.float().T


def _of_norm(norm: nn.LayerNorm, x: Tensor, tangent: Tensor) -> Tensor:
    weight, bias = norm.weight.double(), norm.bias.double()
    return _moved(lambda at: layer_norm(at, at.shape[-1:], weight, bias, norm.eps), x, tangent)


def _moved(f: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    """How f moves where x moves along a tangent: a central difference in float64, whose error is 1e-8 of the result."""
    x, tangent = x.double(), tangent.double()
    length, along = (torch.linalg.vector_norm(one, dim=-1, keepdim=True).clamp(min=STEP) for one in (x, tangent))
    step = STEP * length / along
    return ((f(x + step * tangent) - f(x - step * tangent)) / (2 * step)).float()


def _heads(tower: ImageTower, x: Tensor) -> Tensor:
    """(B, n, D) -> float32 (B, H, n, Dh)."""
    return x.unflatten(-1, (tower.n_heads, -1)).transpose(1, 2).float()
