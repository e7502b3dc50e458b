"""Maps that need more than the one forward: token-drop occlusion, the reference truth, and gradient rollout, the classic.

    occlusion   R_b = (z(x) - z(x without the patches of b)) / |b|      all targets share the forwards
    rollout     r <- r N(I + keep(mean_h A mean_h dz/dA)), from the top down, r = CLS's row      a backward for each target

Both explain the targets of a whole batch; the batch's options say how.

Shapes as in `saecore.relevance.maps`.
"""

import torch
from torch import Tensor

from saecore.relevance.maps import Batch, Maps

ROWS, ROWS_ON_CPU = 256, 16
"""Token sequences in one forward of occlusion, at least as many as there are images: bounds its memory, not its results. What
is in use should fit a CPU's caches: with 256 there it took 70 forwards on B/32 and 89 on B/16, with 16 it took 47 and 53."""


def occlusion(batch: Batch) -> Maps:
    """What each target loses when patches are taken out of the sequence: no grey square, no imputation.

    Positions of the others stay. `Options.block` drops squares of patches at once, each patch of one getting an equal part of
    what the square changes. Values are the targets' own, normalisers recomputed. Signed, in pre-activation units, but no
    decomposition: effects of patches that stand in for each other are in none of them.
    """
    tower = batch.tower
    first = tower.first_tokens(batch.pixels)
    whole = batch.targets.values(batch.embedding[:, None])[:, 0]  # (B, k)
    height, width = tower.grid
    relevance = torch.zeros((*whole.shape, height * width), device=whole.device)
    by_size: dict[
        int, list[Tensor]
    ] = {}  # blocks at the edge may be smaller; one forward takes sequences of one length
    for block in _blocks(height, width, batch.options.block):
        by_size.setdefault(len(block), []).append(block.to(whole.device))
    at_once = max(1, (ROWS_ON_CPU if first.device.type == "cpu" else ROWS) // len(first))
    for size, blocks in by_size.items():
        for start in range(0, len(blocks), at_once):
            some = torch.stack(blocks[start : start + at_once])  # (R, size) patches
            left = _others(some + tower.n_own, first.shape[1])  # (R, N - size) tokens
            embeddings = tower.embed_tokens(first[:, left].flatten(0, 1)).unflatten(0, (len(first), len(some)))
            lost = whole[:, None] - batch.targets.values(embeddings)  # (B, R, k)
            relevance[:, :, some] = (lost / size).transpose(1, 2)[..., None].expand(-1, -1, -1, size)
    return Maps(relevance, torch.full_like(whole, torch.nan))


def _blocks(height: int, width: int, side: int) -> list[Tensor]:
    """Patch numbers of each square of `side` patches, smaller at the right and lower edge."""
    grid = torch.arange(height * width).view(height, width)
    return [
        grid[top : top + side, left : left + side].flatten()
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def _others(dropped: Tensor, n_tokens: int) -> Tensor:
    """(R, size) numbers -> (R, n_tokens - size): the others, in order."""
    stays = torch.ones((len(dropped), n_tokens), dtype=torch.bool, device=dropped.device).scatter(1, dropped, False)
    return stays.nonzero()[:, 1].view(len(dropped), -1)


def rollout(batch: Batch) -> Maps:
    """Gradient-weighted attention rollout over all layers with a discard ratio: the map of the classic one-latent scripts.

    Abnar and Zuidema 2020 (arXiv:2005.00928), weighted as those scripts do: head means of attention and of its gradient are
    taken apart and multiplied; the `discard` smallest of a layer's N x N products are dropped, and what is negative then; the
    identity is added, rows are normalised, layers multiplied. No units, never negative. On top of SigLIP's layers lies its
    pooling's row, without the identity: the learned query is none of the tokens. Differs from theirs (relevancy_map_SAE's) in
    explaining the pre-activation, which has a gradient where a latent is off, and in having a gradient at all: their hook sits
    on a view of the attention that the output never passes, so that their map is the plain attention's, the same for every
    latent. This is what it was meant to be. Costs a forward with plain attention and, for each target, a
    backward through all layers; the images of the batch share them.
    """
    with torch.inference_mode(False), torch.enable_grad():
        pixels, read_outs = batch.pixels.clone(), batch.read_outs.clone()
        with torch.no_grad():
            first = batch.tower.first_tokens(pixels)
        pooled, attention = batch.tower.attend_plainly(first)
        direction = batch.tower.pull_back(read_outs, pooled.detach(), batch.exact).direction
        z = (direction @ pooled.float()[..., None]).squeeze(
            -1
        )  # (B, k): the gradient is what its constant leaves alone
        found = []
        for column in range(z.shape[1]):
            gradients = torch.autograd.grad(z[:, column].sum(), attention, retain_graph=column + 1 < z.shape[1])
            found.append(_rolled([a.detach() for a in attention], gradients, batch.options.discard))
    relevance = torch.stack(found, 1)[..., batch.tower.n_own :]
    return Maps(relevance, torch.full_like(batch.offsets, torch.nan))


def _rolled(attention: list[Tensor], gradients: tuple[Tensor, ...], discard: float) -> Tensor:
    """Attention and gradients of all layers (B, H, N, N), the last's perhaps (B, H, 1, N) -> the query's row (B, N)."""
    images, _, queries, _ = attention[-1].shape
    row = torch.zeros((images, 1, queries), device=attention[-1].device)
    row[..., 0] = 1  # CLS, or the only query there is
    for a, g in zip(reversed(attention), reversed(gradients), strict=True):
        weights = a.mean(1) * g.float().mean(1)
        flat = weights.flatten(1)
        if drop := int(discard * flat.shape[1]):
            weights = weights * (weights > flat.kthvalue(drop, dim=1).values[:, None, None])
        mixed = weights.clamp(min=0)
        if a.shape[2] == a.shape[3]:  # a learned query is no token that could stay what it is
            mixed = mixed + torch.eye(a.shape[3], device=a.device)
        row = row @ (mixed / mixed.sum(-1, keepdim=True).clamp(min=torch.finfo(mixed.dtype).tiny))
    return row.squeeze(1)
