"""Shapley values of patches: what each is worth to a target, also where patches can stand in for each other.

    phi_i = the mean, over all orders in which patches come into the picture, of what z gains when patch i comes in

Taking out one patch shows nothing where another can replace it; the Shapley value divides what the two give together.

A target may be a coordinate of the embedding. The values are linear in z, so those of all coordinates hold the values of
whatever is read linearly from the embedding.

Shapes: B images, n targets of each, P patches, K subsets of patches.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saecore.methods import DEFAULT_OPTIONS
from saecore.removal.ways import Removal

SUBSETS = DEFAULT_OPTIONS.subsets
"""Pictures without some of their patches, for Shapley values: about half as many forwards."""

GROUPS = 5
"""Parts of the subsets that tell the error of Shapley values."""


LEAST, ENOUGH = 3, 15
"""Subsets for each patch: with 2.3 of them, the errors of some values were a hundred times the values. With 15, two samples
agree in ranks by 0.6 in the demo."""


class Shapley(NamedTuple):
    """Shapley values by sampling."""

    values: Tensor
    """float32 (B, n, P); they add up to z of the whole picture less z without patches."""
    error: Tensor
    """float32 (B, n, P): their standard error, by a jackknife over parts of the subsets."""


def shapley(remove: Removal, n_patches: int, images: int, subsets: int = SUBSETS, seed: int = 0) -> Shapley:
    """Shapley values of all patches for all targets, which share the work: a shorter forward for each subset.

    The values are those of the additive model that is nearest to z on sampled subsets by the Shapley kernel's weights, with the
    sum that z has (KernelSHAP, Lundberg and Lee 2017, arXiv:1705.07874). Subsets come by the sizes that the kernel gives them,
    each with the patches that it lacks (Covert and Lee 2021, arXiv:2012.01536), and those of one size are disjoint as far as
    they can be. So the values are exact where z is additive, and elsewhere their error falls with the number of subsets.
    ValueError for fewer subsets than patches.
    """
    if subsets < n_patches:
        raise ValueError(f"{subsets} subsets do not tell the values of {n_patches} patches: more are needed")
    drawn = torch.Generator().manual_seed(seed)
    everything = torch.arange(n_patches)[None, None].expand(images, -1, -1)
    whole, empty = (remove(everything[..., :m])[:, 0] for m in (n_patches, 0))
    sizes = torch.arange(1, n_patches)
    kernel = 1.0 / (sizes * (n_patches - sizes))
    kernel = kernel / kernel.sum()
    values, members, weights, groups = [], [], [], []
    for size in range(1, n_patches // 2 + 1):
        share = float(kernel[size - 1])
        is_half = 2 * size == n_patches  # then both of a pair are of this size
        pairs = max(1, round(subsets * share / (1 + is_half)))
        for kept in pairs_of(size, n_patches, pairs, drawn):
            values.append(remove(kept[None].expand(images, -1, -1)).transpose(1, 2) - empty[..., None])  # B n R
            members.append(torch.zeros(pairs, n_patches).scatter(1, kept, 1.0))
            weights.append(torch.full((pairs,), share / (1 + is_half) / pairs))
            groups.append((torch.arange(pairs) + size) % GROUPS)
    z, X, w, group = torch.cat(values, -1), torch.cat(members), torch.cat(weights), torch.cat(groups)
    total = whole - empty
    of_all = _nearest(z, X, w, total)
    without = torch.stack([_nearest(z[..., group != g], X[group != g], w[group != g], total) for g in range(GROUPS)])
    error = ((GROUPS - 1) / GROUPS * (without - without.mean(0)).square().sum(0)).sqrt()
    return Shapley(of_all.float(), error.float())


def pairs_of(size: int, n_patches: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """So many subsets of one size, int64 (pairs, size), and the patches that each lacks, (pairs, P - size).

    They are cut from orders of all patches, so that each patch is in about as many.
    """
    each = n_patches // size
    orders = torch.stack([torch.randperm(n_patches, generator=generator) for _ in range(-(-pairs // each))])
    kept = orders[:, : each * size].reshape(-1, size)[:pairs]
    lacks = torch.ones(pairs, n_patches, dtype=torch.bool).scatter(1, kept, False)
    return kept, lacks.nonzero()[:, 1].view(pairs, -1)


def _nearest(z: Tensor, X: Tensor, w: Tensor, total: Tensor) -> Tensor:
    """The additive model (B, n, P) nearest to z (B, n, K) on subsets X (K, P) by weights (K,), with that sum (B, n)."""
    X, w = (part.to(z.device, torch.float64) for part in (X, w))
    weighted = X * w[:, None]
    # Few subsets do not tell all patches apart: then the nearest of least size, and an error that says so.
    inverse = torch.linalg.pinv(X.mT @ weighted, hermitian=True)
    free = z.double() @ weighted @ inverse
    along = inverse.sum(0)
    return free + ((total.double() - free.sum(-1)) / along.sum())[..., None] * along
