"""The gradient of read-outs along the CLS path: through every later step of the CLS token, with patch tokens held constant.

For the last layer this is the true gradient, since only the CLS row of its attention reaches the embedding. So it is for
SigLIP's pooling, the only layer on the path of its learned query, which takes the place of CLS (`saecore.towers.siglip`). For
the layers below, it contains every later MLP and every later change of the CLS token's query, key and value, and omits what
patches do to each other. It is a hand-written vector-Jacobian product for all k read-outs at once, top-down, without autograd.
One layer is

    o = sum_i A_i v_i,  A = softmax(s q . k_i)        y = x + W_O o + b_O        x' = y + MLP(LN2(y))

and with G = dz/dx' (a row for each read-out):

    G_y = G + J_LN2' J_MLP' G        G_o = G_y W_O        D_i = G_o . v_i  (by head)
    dS = A (D - sum_j A_j D_j)       dq = s sum_i dS_i k_i,   dk_0 = s dS_0 q,   dv_0 = A_0 G_o
    dz/dx = G_y + J_LN1' (dq W_q + dk_0 W_k + dv_0 W_v)

Methods of `saecore.relevance.maps` use D^l = dz/dA^l. Cost: 24 D^2 + 8 N D FLOP for each read-out and layer.

The same holds along the path of any other token (`saecore.relevance.tokens`), with its number in the place of 0. Then each
read-out has a token of its own, and what follows is that of q = k queries in place of one that all read-outs share.

Shapes as in `saecore.towers.tower`: B images, k read-outs, q queries, 1 or k, N tokens, H heads, D width.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saecore.towers.tower import ImageTower, PathLayer, Trace


class Passing(NamedTuple):
    """What one layer did to the queries."""

    before: Tensor
    """(B, q, D) residual streams where they enter the layer."""
    after: Tensor
    """(B, q, D) the same between attention and MLP."""
    inner: Tensor
    """(B, q, 4 D) the same inside the MLP, before its activation function."""
    attention: Tensor
    """float32 (B, H, q, N): by which the queries look at all tokens."""
    q: Tensor
    """(B, q, D)."""
    keys: Tensor | None
    """(B, N, D); None if no gradient passes to the layer below."""
    values: Tensor
    """(B, N, D)."""
    own: Tensor | None
    """int64 (B, q): which of the tokens each query is; None for a learned query, which is none."""


class Within(NamedTuple):
    """The gradient of k read-outs inside one layer."""

    G_y: Tensor
    """float32 (B, k, D), between attention and MLP."""
    G_o: Tensor
    """float32 (B, k, H, Dh), at what the heads give."""
    D: Tensor
    """float32 (B, k, H, N), by the attention."""


def passing_of(tower: ImageTower, trace: Trace, index: int) -> Passing:
    """What the layer of that index, -1 for the last, did to the tower's one query."""
    q = trace.query_q[index][:, None]
    return Passing(
        before=trace.query_before[index][:, None],
        after=trace.query_after[index][:, None],
        inner=trace.query_inner[index][:, None],
        attention=trace.query_attention[index][:, :, None],
        q=q,
        keys=trace.keys[index] if trace.keys else None,
        values=trace.values[index],
        own=torch.zeros(len(q), 1, dtype=torch.int64, device=q.device) if tower.n_own else None,
    )


def attention_gradients(
    tower: ImageTower, trace: Trace, read_outs: Tensor, layers: int, exact: bool = False
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For the last `layers` layers, last first: their index (-1, -2, ..), D float32 (B, k, H, N), and G_y float32 (B, k, D).

    `exact`: the final LayerNorm's deviation is differentiated too, instead of held constant. The trace must hold as many
    layers, and their keys if `layers` is above 1.
    """
    G = tower.pull_back(read_outs, trace.query_final, exact).direction
    passings = [passing_of(tower, trace, index) for index in range(-layers, 0)]
    for index, inside in gradients_along(tower.path()[-layers:], passings, tower.n_heads, G):
        yield index - layers, inside.D, inside.G_y


def gradients_along(
    path: list[PathLayer], passings: list[Passing], n_heads: int, G: Tensor
) -> Iterator[tuple[int, Within]]:
    """The gradient G (B, k, D) after the last of some layers -> that inside each, last first, with the layer's index."""
    for index in range(len(path) - 1, -1, -1):
        passing = passings[index]
        inside = within_layer(path[index], n_heads, passing.after, passing.inner, passing.values, G)
        yield index, inside
        if index:
            G = before_layer(path[index], passing, inside)


def within_layer(layer: PathLayer, n_heads: int, after: Tensor, inner: Tensor, values: Tensor, G: Tensor) -> Within:
    """The gradient G (B, k, D) after a layer -> the gradient inside it.

    The queries' streams are `after` (B, q, D) between attention and MLP, and `inner` (B, q, 4 D) inside the MLP; `values`
    (B, N, D).
    """
    G_y = G + mlp_vjp(layer, after, slope(layer, inner), G)
    G_o = by_head(product(G_y, layer.out), n_heads)
    v = by_head(values, n_heads).transpose(1, 2).float()  # B H N Dh
    return Within(G_y, G_o, (G_o.transpose(1, 2) @ v.mT).transpose(1, 2))


def before_layer(layer: PathLayer, passing: Passing, inside: Within) -> Tensor:
    """The gradient (B, k, D) at the queries before a layer: past its attention, and through their query, key and value."""
    entry, keys, own = layer.entry, passing.keys, passing.own
    assert entry is not None  # a learned query has no layer below
    assert keys is not None
    assert own is not None
    A, D, n_heads = passing.attention, inside.D.transpose(1, 2), inside.D.shape[2]
    dS = entry.scale * A * (D - (A * D).sum(-1, keepdim=True))  # B H k N
    dq = (dS @ by_head(keys, n_heads).transpose(1, 2).float()).transpose(1, 2).flatten(2)
    dk = (_of_own(dS, own) * by_head(passing.q, n_heads)).flatten(2)
    dv = (_of_own(A, own) * inside.G_o).flatten(2)
    into = product(dq, entry.q) + product(dk, entry.k) + product(dv, entry.v)
    return inside.G_y + _norm_vjp(entry.norm1, passing.before, into)


def _of_own(rows: Tensor, own: Tensor) -> Tensor:
    """Rows over tokens (B, H, k, N) -> their values at the token that each query is, (B, k, H, 1)."""
    index = own[:, None, :, None].expand(-1, rows.shape[1], rows.shape[2], 1)
    return rows.gather(-1, index).transpose(1, 2)


def mlp_vjp(layer: PathLayer, after: Tensor, slope: Tensor, G: Tensor) -> Tensor:
    """J_LN2' J_MLP' G (B, k, D) at streams `after` (B, q, D), between a layer's attention and its MLP; `slope` (B, q, 4 D)."""
    back = product(product(G, layer.mlp.fc2.weight) * slope, layer.mlp.fc1.weight)
    return _norm_vjp(layer.norm2, after, back)


def slope(layer: PathLayer, inner: Tensor) -> Tensor:
    """The derivative of a layer's activation function at `inner`, what fc1 of its MLP gives (.., 4 D), float32."""
    name, x = type(layer.mlp.activation_fn).__name__, inner.float()
    if name == "QuickGELUActivation":
        gate = torch.sigmoid(1.702 * x)
        return gate * (1 + 1.702 * x * (1 - gate))
    if name in ("GELUActivation", "GELU"):
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    if name in ("GELUTanh", "PytorchGELUTanh"):  # transformers 5's name, and 4's
        t = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x.square())
    raise ValueError(f"the gradient of {name} is not known here; supported are quick_gelu, gelu and gelu_pytorch_tanh")


def _norm_vjp(norm: nn.LayerNorm, x: Tensor, g: Tensor) -> Tensor:
    """J' g of a LayerNorm at x (B, q, D), for g (B, k, D)."""
    x, g = x.float(), g * norm.weight.float()
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    normed = centred / deviation
    g = g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)
    return g / deviation


def product(g: Tensor, weight: Tensor) -> Tensor:
    """g @ weight in the tower's precision, the result in float32."""
    return (g.to(weight.dtype) @ weight).float()


def by_head(x: Tensor, n_heads: int) -> Tensor:
    """(.., D) -> (.., H, Dh)."""
    return x.unflatten(-1, (n_heads, -1))
