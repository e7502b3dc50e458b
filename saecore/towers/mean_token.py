"""The gradient of read-outs of each layer's mean token by that layer's attention: what LeGrad as published makes of a CLIP.

For layer l with tokens x = y + MLP(LN2(y)), y = x_in + W_O o + b_O, the target is not read off the embedding but off that
layer's own, p_l = W LN(mean_i x_i): z^l = w(p_l) . p_l + c, the read-out of p_l, norms and all. With u that read-out pulled
back through the final LayerNorm at the mean token, each token carries 1/N of it:

    G_i = u / N       G_y,i = G_i + J_i' G_i       dz^l/dA_ij = (G_y,i W_O) . v_j  (by head)

All rows i of the attention matter here, so nothing collapses: a forward pass of the layers and k backward passes through their
MLPs. Still one pass over the tower below, and no autograd.

Shapes as in `saecore.towers.tower`: B images, k read-outs, N tokens, H heads, D width.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from saecore.towers.cls_path import by_head, mlp_vjp, product, slope
from saecore.towers.tower import ImageTower, Trace


def mean_token_gradients(
    tower: ImageTower, trace: Trace, read_outs: Callable[[Tensor], Tensor], layers: int, exact: bool = False
) -> Iterator[Tensor]:
    """See `ImageTower.own_targets`. `exact`: through the final LayerNorm's deviation too, as the published code does."""
    path = tower.path()
    for back in range(1, layers + 1):
        layer, entering, leaving = path[-back], trace.tokens[-back - 1], trace.tokens[-back]
        mean = leaving.float().mean(1)
        G = tower.pull_back(read_outs(tower.embed_cls(mean)), mean, exact).direction / leaving.shape[1]
        after = tower.attend(len(path) - back, entering)[0].flatten(0, 1)  # B * N tokens, D
        slopes = slope(layer, layer.mlp.fc1(layer.norm2(after)))
        v = by_head(trace.values[-back], tower.n_heads).transpose(1, 2).float()  # B H N Dh
        targets = []
        for column in range(G.shape[1]):  # one at a time: (B, N, 4 D) numbers each
            own = G[:, None, column].expand(-1, leaving.shape[1], -1)
            flat = own.flatten(0, 1)[:, None]
            G_y = own + mlp_vjp(layer, after, slopes, flat).squeeze(1).unflatten(0, leaving.shape[:2])
            G_o = by_head(product(G_y, layer.out), tower.n_heads).transpose(1, 2)  # B H N Dh
            targets.append((G_o @ v.mT).clamp(min=0).mean(2))
        yield torch.stack(targets, 1)
