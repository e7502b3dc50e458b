"""Shapley values of patches: what each is worth to a target, also where patches can stand in for each other.

    phi_i = the mean, over all orders in which patches come into the picture, of what z gains when patch i comes in

Taking out one patch shows nothing where another can replace it; the Shapley value divides what the two give together.

Shapes: B images, n targets of each, P patches, R orders of patches, K subsets along each order.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from saecore.removal.ways import Removal

PERMUTATIONS, AT_ONCE = 60, 4
"""Orders for Shapley values, and patches that come in together."""

GROUPS = 5
"""Parts of the orders that tell the error of Shapley values."""


SUBSETS = 3
"""Subsets for each patch, at least: with 2.3 of them, the errors of some values were a hundred times the values."""


def least_orders(n_patches: int, at_once: int = AT_ONCE) -> int:
    """How many orders are needed at least, so that the values are told without each part of the orders."""
    along = len(range(at_once, n_patches, at_once))
    return 2 * math.ceil(SUBSETS * n_patches / max(1, along) / 2 * GROUPS / (GROUPS - 1) + 1)


class Shapley(NamedTuple):
    """Shapley values by sampling."""

    values: Tensor
    """float32 (B, n, P); they add up to z of the whole picture less z without patches."""
    error: Tensor
    """float32 (B, n, P): their standard error, by a jackknife over parts of the orders."""


def shapley(
    remove: Removal,
    n_patches: int,
    images: int,
    permutations: int = PERMUTATIONS,
    at_once: int = AT_ONCE,
    seed: int = 0,
) -> Shapley:
    """Shapley values of all patches for all targets, which share the work: P / at_once shorter forwards for each order.

    The pictures along each order are so many samples of subsets of patches. The values are those of the additive model that is
    nearest to z on them by the Shapley kernel's weights, with the sum that z has (KernelSHAP, Lundberg and Lee 2017,
    arXiv:1705.07874; orders in pairs, each with its reverse, Covert and Lee 2021, arXiv:2012.01536). So they are exact where z
    is additive, and their error falls with the number of orders elsewhere. ValueError for fewer subsets than patches.
    """
    drawn = torch.Generator().manual_seed(seed)
    half = torch.stack([torch.randperm(n_patches, generator=drawn) for _ in range(max(GROUPS, permutations // 2))])
    order = torch.stack([half, half.flip(-1)], 1).flatten(0, 1)  # R, P: each beside its reverse
    everything = torch.arange(n_patches)[None, None].expand(images, -1, -1)
    whole, empty = (remove(everything[..., :m])[:, 0] for m in (n_patches, 0))
    values, members, weights = [], [], []
    for gone in range(at_once, n_patches, at_once):
        kept = order[:, gone:]
        values.append(remove(kept[None].expand(images, -1, -1)).transpose(1, 2) - empty[..., None])  # B n R
        members.append(torch.zeros(len(order), n_patches).scatter(1, kept, 1.0))
        weights.append(torch.full((len(order),), 1.0 / (gone * (n_patches - gone))))
    z, X, w = torch.stack(values, -1), torch.stack(members, 1), torch.stack(weights, 1)  # B n R K, R K P, R K
    total, group = whole - empty, torch.arange(len(order)) // 2 % GROUPS
    of_all = _nearest(z, X, w, total)
    without = torch.stack([_nearest(z[:, :, group != g], X[group != g], w[group != g], total) for g in range(GROUPS)])
    error = ((GROUPS - 1) / GROUPS * (without - without.mean(0)).square().sum(0)).sqrt()
    return Shapley(of_all.float(), error.float())


def _nearest(z: Tensor, X: Tensor, w: Tensor, total: Tensor) -> Tensor:
    """The additive model (B, n, P) nearest to z (B, n, R, K) on subsets X (R, K, P) by weights (R, K), with that sum."""
    X, w = (part.flatten(0, 1).to(z.device, torch.float64) for part in (X, w))
    if len(X) < SUBSETS * X.shape[1]:
        raise ValueError(f"{len(X)} subsets do not tell the values of {X.shape[1]} patches: more orders are needed")
    weighted = X * w[:, None]
    inverse = torch.linalg.inv(X.mT @ weighted)
    free = z.flatten(2).double() @ weighted @ inverse
    along = inverse.sum(0)
    return free + ((total.double() - free.sum(-1)) / along.sum())[..., None] * along
