"""Gradient-weighted attention rollout, the map of the classic one-latent scripts.

    r <- r N(I + keep(mean_h A mean_h dz/dA)), from the last layer to the first; r begins as CLS's row; N normalises rows

It costs a forward with plain attention, and for each target a backward through all layers. The images of a batch share both.

Shapes are those of `saecore.relevance.maps`.
"""

import torch
from torch import Tensor

from saecore.relevance.maps import Batch, Maps


def rollout(batch: Batch) -> Maps:
    """Gradient-weighted attention rollout over all layers with a discard ratio: the map of the classic one-latent scripts.

    Abnar and Zuidema 2020 (arXiv:2005.00928), weighted as those scripts do. In each layer, the head means of attention and of
    its gradient are multiplied; of the N x N products, the share `discard`, the smallest, is dropped, and then what is
    negative; the identity is added, and rows are normalised. The layers' matrices are multiplied. Maps have no units and are
    never negative. For SigLIP, the row of its pooling comes last, without the identity, since the learned query is no token.

    Differs from the scripts (relevancy_map_SAE) in two ways. It explains the pre-activation, which has a gradient where a
    latent is off. And it has a gradient at all: their hook sits on a view of the attention that the output never passes, so
    that their map is that of the plain attention, the same for every latent. Here the map is what the scripts meant.
    """
    with torch.inference_mode(False), torch.enable_grad():
        pixels, read_outs = batch.pixels.clone(), batch.read_outs.clone()
        with torch.no_grad():
            first = batch.tower.first_tokens(pixels)
        pooled, attention = batch.tower.attend_plainly(first)
        direction = batch.tower.pull_back(read_outs, pooled.detach(), batch.exact).direction
        # (B, k), without the constant of the read-out, which changes no gradient.
        z = (direction @ pooled.float()[..., None]).squeeze(-1)
        rows = []
        for column in range(z.shape[1]):
            gradients = torch.autograd.grad(z[:, column].sum(), attention, retain_graph=column + 1 < z.shape[1])
            rows.append(_rolled([a.detach() for a in attention], gradients, batch.options.discard))
    relevance = torch.stack(rows, 1)[..., batch.tower.n_own :]
    return Maps(relevance, torch.full_like(batch.offsets, torch.nan))


def _rolled(attention: list[Tensor], gradients: tuple[Tensor, ...], discard: float) -> Tensor:
    """Attention and gradients of all layers, (B, H, N, N), the last perhaps (B, H, 1, N) -> the query's row (B, N)."""
    images, _, queries, _ = attention[-1].shape
    row = torch.zeros((images, 1, queries), device=attention[-1].device)
    row[..., 0] = 1  # CLS, or the learned query, which is the only one
    for a, g in zip(reversed(attention), reversed(gradients), strict=True):
        weights = a.mean(1) * g.float().mean(1)
        flat = weights.flatten(1)
        if drop := int(discard * flat.shape[1]):
            weights = weights * (weights > flat.kthvalue(drop, dim=1).values[:, None, None])
        mixed = weights.clamp(min=0)
        if a.shape[2] == a.shape[3]:  # A learned query is no token, so it has no residual stream of its own.
            mixed = mixed + torch.eye(a.shape[3], device=a.device)
        row = row @ (mixed / mixed.sum(-1, keepdim=True).clamp(min=torch.finfo(mixed.dtype).tiny))
    return row.squeeze(1)
