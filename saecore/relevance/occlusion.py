"""Token-drop occlusion: what each target loses when patches are taken out of the sequence. The reference for other methods.

    R_b = (z(x) - z(x without the patches of b)) / |b|      b: a square of patches; all targets share the forwards

Costs a forward for each patch or square. The batch's options say how large the squares are.

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
    # Blocks at the edge may be smaller; one forward takes sequences of one length.
    by_size: dict[int, list[Tensor]] = {}
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
