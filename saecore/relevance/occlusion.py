"""What removing patches does to each target: alone, or on average over what else is there.

    occlusion      R_b = (z(x) - z(x without the patches of b)) / |b|      b: a square of patches, one patch by default
    shapley        R_i = w . phi_i                                         phi_i by sampling (`saecore.removal.shapley`)
    removal        R_i = w . phi_i                                         phi_i by a trained head (`saecore.removal.head`)

phi_i is the Shapley value of patch i for the embedding, a vector, with sum_i phi_i = e(x) - e(no patches), and z = w . e + c a
read-out of the embedding. Shapley values are linear in the function that they divide, so w . phi_i is the Shapley value for
w . e + c, for every latent, concept and text at once. Norms of a sample (a text's |e|, an SAE's own normaliser) are held at the
image's values, as in `contrib`; without them it is the Shapley value of the target itself.

Occlusion costs one forward for each square, which all targets share; shapley one shorter forward for each subset.
`Options.block` is the side of a square.

Shapes are those of `saecore.relevance.maps`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from saecore.relevance.maps import Batch, Maps
from saecore.removal.head import nothing
from saecore.removal.shapley import shapley
from saecore.removal.ways import ROWS, ROWS_ON_CPU, dropping
from saecore.towers.tower import ImageTower


def occlusion(batch: Batch) -> Maps:
    """What each target loses if patches are taken out of the sequence: no grey square, no imputation.

    The other patches keep their positions. With a larger `Options.block`, squares of patches are dropped at once, and each
    patch of a square gets an equal part of the change. The targets' values are computed anew, normalisers included. Maps are
    signed and in pre-activation units, but no decomposition: if two patches can replace each other, neither shows its effect.
    """
    targets, whole = batch.targets, batch.targets.values(batch.embedding[:, None])[:, 0]  # (B, k)
    relevance = losses(batch.tower, batch.pixels, whole, lambda rest, _: targets.values(rest), batch.options.block)
    return Maps(relevance, torch.full_like(whole, torch.nan))


def sampled(batch: Batch) -> Maps:
    """Shapley values by `Options.subsets` sampled subsets, which all targets share. The remainder is the target without any
    patch: map and remainder add up to the pre-activation."""
    w, c = batch.read_outs, batch.offsets
    remove = dropping(batch.tower, batch.pixels, lambda embeddings: embeddings @ w.mT + c[:, None])
    images, n_patches = len(batch.pixels), batch.tower.grid[0] * batch.tower.grid[1]
    found = shapley(remove, n_patches, images, batch.options.subsets)
    return Maps(found.values, _without_patches(batch, nothing(batch.tower)), standard_error=found.error)


def predicted(batch: Batch) -> Maps:
    """Shapley values by the batch's head, from the forward that the other methods share: read-outs of one vector for each
    patch. ValueError without a head."""
    if batch.head is None:
        raise ValueError("removal needs a head")
    phi = batch.head(batch.tower, batch.trace, batch.embedding)
    return Maps(batch.read_outs @ phi.mT, _without_patches(batch, batch.head.empty))


def _without_patches(batch: Batch, empty: Tensor) -> Tensor:
    """What the embedding without patches (E,) gives the targets, (B, k)."""
    return batch.read_outs @ empty + batch.offsets


def losses(
    tower: ImageTower, pixels: Tensor, whole: Tensor, values: Callable[[Tensor, Tensor], Tensor], side: int
) -> Tensor:
    """What k targets with the values `whole` (B, k) lose with each patch, (B, k, P), by squares of `side` patches.

    `values` makes (B, R, k) of what the tower makes of R sets of tokens, (B, R, ..), and of the tokens' numbers (R, M).
    """
    first = tower.first_tokens(pixels)
    height, width = tower.grid
    relevance = torch.zeros((*whole.shape, height * width), device=whole.device)
    # Blocks at the edge may be smaller, and one forward takes only sequences of one length.
    by_size: dict[int, list[Tensor]] = {}
    for block in _blocks(height, width, side):
        by_size.setdefault(len(block), []).append(block.to(whole.device))
    at_once = max(1, (ROWS_ON_CPU if first.device.type == "cpu" else ROWS) // len(first))
    for size, blocks in by_size.items():
        for start in range(0, len(blocks), at_once):
            dropped = torch.stack(blocks[start : start + at_once])  # (R, size) patches
            rest = _others(dropped + tower.n_own, first.shape[1])  # (R, N - size) tokens
            embedded = tower.embed_tokens(first[:, rest].flatten(0, 1)).unflatten(0, (len(first), len(dropped)))
            loss = whole[:, None] - values(embedded, rest)  # (B, R, k)
            relevance[:, :, dropped] = (loss / size).transpose(1, 2)[..., None].expand(-1, -1, -1, size)
    return relevance


def _blocks(height: int, width: int, side: int) -> list[Tensor]:
    """The patch numbers of each square of `side` x `side` patches; squares at the right and lower edge may be smaller."""
    grid = torch.arange(height * width).view(height, width)
    return [
        grid[top : top + side, left : left + side].flatten()
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def _others(dropped: Tensor, n_tokens: int) -> Tensor:
    """Token numbers (R, size) -> the numbers of all other tokens, in order, (R, n_tokens - size)."""
    stays = torch.ones((len(dropped), n_tokens), dtype=torch.bool, device=dropped.device).scatter(1, dropped, False)
    return stays.nonzero()[:, 1].view(len(dropped), -1)
