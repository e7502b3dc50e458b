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

Methods of `saecore.relevance.maps` use D^l = dz/dA^l. By head, dk_0 W_k is the same vector q W_k times a number for each
read-out. Cost: 22 D^2 + 8 N D FLOP for each read-out and layer.

Shapes as in `saecore.towers.tower`: B images, k read-outs, N tokens (CLS first), H heads, D width.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saecore.towers.tower import Entry, ImageTower, PathLayer, Trace


class Within(NamedTuple):
    """The gradient of k read-outs inside one layer."""

    G_y: Tensor
    """float32 (B, k, D), between attention and MLP."""
    G_o: Tensor
    """float32 (B, k, H, Dh), at what the heads give."""
    D: Tensor
    """float32 (B, k, H, N), by the attention."""


def attention_gradients(
    tower: ImageTower, trace: Trace, read_outs: Tensor, layers: int, exact: bool = False
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For the last `layers` layers, last first: their index (-1, -2, ..), D float32 (B, k, H, N), and G_y float32 (B, k, D).

    `exact`: the final LayerNorm's deviation is differentiated too, instead of held constant. The trace must hold as many
    layers, and their keys if `layers` is above 1.
    """
    G = tower.pull_back(read_outs, trace.query_final, exact).direction
    path = tower.path()
    for index in range(-1, -1 - layers, -1):
        layer = path[index]
        after, inner, values = trace.query_after[index], trace.query_inner[index], trace.values[index]
        inside = within_layer(layer, tower.n_heads, after, inner, values, G)
        yield index, inside.D, inside.G_y
        if index > -layers:
            assert layer.entry is not None  # a learned query has no layer below
            G = inside.G_y + _before_attention(tower, trace, index, layer.entry, inside)


def within_layer(layer: PathLayer, n_heads: int, after: Tensor, inner: Tensor, values: Tensor, G: Tensor) -> Within:
    """The gradient G (B, k, D) after a layer -> the gradient inside it.

    The query's stream is `after` (B, D) between attention and MLP, and `inner` (B, 4 D) inside the MLP; `values` (B, N, D).
    """
    G_y = G + mlp_vjp(layer, after, slope(layer, inner), G)
    G_o = by_head(product(G_y, layer.out), n_heads)
    v = by_head(values, n_heads).transpose(1, 2).float()  # B H N Dh
    return Within(G_y, G_o, (G_o.transpose(1, 2) @ v.mT).transpose(1, 2))


def _before_attention(tower: ImageTower, trace: Trace, index: int, entry: Entry, inside: Within) -> Tensor:
    """The gradient (B, k, D) at the CLS token before a layer, through its query, its key and its value."""
    A = trace.query_attention[index][:, :, None]  # B H 1 N
    D = inside.D.transpose(1, 2)  # B H k N
    dS = entry.scale * A * (D - (A * D).sum(-1, keepdim=True))
    keys = by_head(trace.keys[index], tower.n_heads).transpose(1, 2).float()  # B H N Dh
    dq = (dS @ keys).transpose(1, 2).flatten(2)
    q = by_head(trace.query_q[index], tower.n_heads).transpose(0, 1)  # H B Dh
    through_key = (q @ entry.k.unflatten(0, (tower.n_heads, -1))).float().transpose(0, 1)  # B H D
    dv = (A[..., 0].transpose(1, 2)[..., None] * inside.G_o).flatten(2)
    into = product(dq, entry.q) + dS[..., 0].transpose(1, 2) @ through_key + product(dv, entry.v)
    return _norm_vjp(entry.norm1, trace.query_before[index], into)


def mlp_vjp(layer: PathLayer, after: Tensor, slope: Tensor, G: Tensor) -> Tensor:
    """J_LN2' J_MLP' G (B, k, D) at tokens `after` (B, D), between a layer's attention and its MLP; `slope` (B, 4 D)."""
    back = product(product(G, layer.mlp.fc2.weight) * slope[:, None], layer.mlp.fc1.weight)
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
    """J' g of a LayerNorm at x (B, D), for g (B, k, D)."""
    x, g = x.float(), g * norm.weight.float()
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    normed = (centred / deviation)[:, None]
    g = g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)
    return g / deviation[:, None]


def product(g: Tensor, weight: Tensor) -> Tensor:
    """g @ weight in the tower's precision, the result in float32."""
    return (g.to(weight.dtype) @ weight).float()


def by_head(x: Tensor, n_heads: int) -> Tensor:
    """(.., D) -> (.., H, Dh)."""
    return x.unflatten(-1, (n_heads, -1))
