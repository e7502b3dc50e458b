"""LeGrad as published: each layer's own target, which sees this layer and none after it, and its gradient by attention.

The target z^l of layer l is read off an embedding p_l made of this layer's tokens x_i, and not off the model's embedding. It
is the read-out w(p_l) . p_l + c, with the norms of p_l. What p_l is depends on the model:

    CLIP      p_l = W LN(mean_i x_i)        A: the layer's own attention, all rows of it
    SigLIP    p_l = pool(x_i)               A: the pooling's attention; the published code omits the LayerNorm before it

For CLIP let x = y + MLP(LN2(y)), y = x_in + W_O o + b_O, and u the read-out pulled back through the final LayerNorm at the mean
token. Each token carries 1/N of it:

    G_i = u / N       G_y,i = G_i + J_i' G_i       dz^l/dA_ij = (G_y,i W_O) . v_j  (by head)

All rows i of the attention matter here, so nothing collapses: a forward pass of the layers and k backward passes through their
MLPs. It is still one pass over the tower below, and no autograd.

Shapes as in `saecore.towers.tower`: B images, k read-outs, N tokens, H heads, D width.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from saecore.towers.cls_path import by_head, mlp_vjp, product, slope, within_layer
from saecore.towers.siglip import SiglipTower
from saecore.towers.tower import ImageTower, Trace

ReadOuts = Callable[[Tensor], Tensor]
"""Of an embedding (B, E) the read-outs w (B, k, E), whose norms are those of that embedding."""


def own_target_gradients(
    tower: ImageTower, trace: Trace, read_outs: ReadOuts, layers: int, exact: bool = False
) -> Iterator[Tensor]:
    """max(dz^l/dA^l, 0) of the last `layers` layers, last first, averaged over rows of attention: float32 (B, k, H, N).

    `exact`: through the final LayerNorm's deviation too, as the published code does. The trace must hold the last `layers` + 1
    residual streams.
    """
    if isinstance(tower, SiglipTower):
        return _of_pooling(tower, trace, read_outs, layers)
    return _of_mean_token(tower, trace, read_outs, layers, exact)


def _of_mean_token(tower: ImageTower, trace: Trace, read_outs: ReadOuts, layers: int, exact: bool) -> Iterator[Tensor]:
    path = tower.path()
    for back in range(1, layers + 1):
        layer, entering, leaving = path[-back], trace.tokens[-back - 1], trace.tokens[-back]
        mean = leaving.float().mean(1)
        G = tower.pull_back(read_outs(tower.embed_query(mean)), mean, exact).direction / leaving.shape[1]
        after = tower.attend(len(path) - back, entering)[0]
        slopes = slope(layer, layer.mlp.fc1(layer.norm2(after)))
        v = by_head(trace.values[-back], tower.n_heads).transpose(1, 2).float()  # B H N Dh
        gradients = []
        for column in range(G.shape[1]):  # one at a time: (B, N, 4 D) numbers each
            own = G[:, None, column].expand(-1, leaving.shape[1], -1)
            G_y = own + mlp_vjp(layer, after, slopes, own)
            G_o = by_head(product(G_y, layer.out), tower.n_heads).transpose(1, 2)  # B H N Dh
            gradients.append((G_o @ v.mT).clamp(min=0).mean(2))
        yield torch.stack(gradients, 1)


def _of_pooling(tower: SiglipTower, trace: Trace, read_outs: ReadOuts, layers: int) -> Iterator[Tensor]:
    for tokens in reversed(trace.tokens[-layers:]):
        step = tower.pool_unnormed(tokens)
        layer = tower.path()[0]
        w = read_outs(step.leaving[:, 0])
        yield within_layer(layer, tower.n_heads, step.after, step.inner, step.v, w).D.clamp(min=0)
