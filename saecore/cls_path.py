"""The gradient of read-outs along the CLS path: through every later step of the CLS token, with patch tokens held constant.

Of the last layer this is the true gradient, since nothing but the CLS row of its attention reaches the embedding. Below, it
contains every later MLP and every later change of the CLS token's query, key and value, and leaves out what patches do to
each other. A hand-written vector-Jacobian product for all k read-outs at once, top-down, without autograd; one layer is

    o = sum_i A_i v_i,  A = softmax(s q . k_i)        y = x + W_O o + b_O        x' = y + MLP(LN2(y))

and with G = dz/dx' (a row for each read-out):

    G_y = G + J_LN2' J_MLP' G        G_o = G_y W_O        D_i = G_o . v_i  (by head)
    dS = A (D - sum_j A_j D_j)       dq = s sum_i dS_i k_i,   dk_0 = s dS_0 q,   dv_0 = A_0 G_o
    dz/dx = G_y + J_LN1' (dq W_q + dk_0 W_k + dv_0 W_v)

D^l = dz/dA^l is what methods of `saecore.relevance` are made of. Cost: 24 D^2 + 8 N D FLOP a read-out and layer.

Shapes as in `saecore.clip`: B images, k read-outs, N = 1 + P tokens, H heads, D width.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from saecore.clip import ImageTower, PathLayer, Trace


def attention_gradients(
    tower: ImageTower, trace: Trace, read_outs: Tensor, layers: int, exact: bool = False
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of the last `layers` layers, last first: (index, D float32 (B, k, H, N), G_y float32 (B, k, D)).

    `exact`: through the final LayerNorm's deviation too, instead of holding it constant. The trace must hold keys if `layers`
    is above 1.
    """
    G = tower.pull_back(read_outs, trace.cls_final, exact).direction
    path = tower.path()
    depth = len(path)
    for index in range(depth - 1, depth - 1 - layers, -1):
        layer = path[index]
        G_y = G + mlp_vjp(layer, trace.cls_after[index], G)
        G_o = by_head(product(G_y, layer.out), tower.n_heads)  # B k H Dh
        v = by_head(trace.values[index], tower.n_heads).transpose(1, 2).float()  # B H N Dh
        D = (G_o.transpose(1, 2) @ v.mT).transpose(1, 2)
        yield index, D, G_y
        if index > depth - layers:
            G = G_y + _before_attention(tower, trace, index, layer, G_o, D)


def _before_attention(tower: ImageTower, trace: Trace, index: int, layer: PathLayer, G_o: Tensor, D: Tensor) -> Tensor:
    """What reaches the CLS token before a layer through its query, its key and its value (B, k, D)."""
    A = trace.cls_attention[index][:, None]  # B 1 H N
    dS = A * (D - (A * D).sum(-1, keepdim=True))
    keys = by_head(trace.keys[index], tower.n_heads).transpose(1, 2).float()  # B H N Dh
    q = by_head(trace.cls_query[index], tower.n_heads).float()  # B H Dh
    dq = layer.scale * (dS.transpose(1, 2) @ keys).transpose(1, 2)  # B k H Dh
    dk = layer.scale * dS[..., :1] * q[:, None]
    dv = A[..., :1] * G_o
    inside = sum(product(part.flatten(2), weight) for part, weight in ((dq, layer.q), (dk, layer.k), (dv, layer.v)))
    assert isinstance(inside, Tensor)
    return _norm_vjp(layer.norm1, trace.cls_before[index], inside)


def mlp_vjp(layer: PathLayer, after: Tensor, G: Tensor) -> Tensor:
    """J_LN2' J_MLP' G (B, k, D) at tokens `after` (B, D), between a layer's attention and its MLP."""
    hidden = layer.mlp.fc1(layer.norm2(after)).float()
    slope = _slope(layer.mlp.activation_fn, hidden)
    back = product(product(G, layer.mlp.fc2.weight) * slope[:, None], layer.mlp.fc1.weight)
    return _norm_vjp(layer.norm2, after, back)


def _slope(activation: nn.Module, x: Tensor) -> Tensor:
    """Derivative of a tower's activation function."""
    name = type(activation).__name__
    if name == "QuickGELUActivation":
        gate = torch.sigmoid(1.702 * x)
        return gate * (1 + 1.702 * x * (1 - gate))
    if name in ("GELUActivation", "GELU"):
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    raise ValueError(f"the gradient of {name} is not known here; supported are quick_gelu and gelu")


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
