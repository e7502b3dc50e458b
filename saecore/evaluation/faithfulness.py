"""Is a map faithful? What becomes of a target as patches are taken out in the order of its map.

    MIF          z without the most important r patches, r = 0 .. P: a faithful map's curve falls at once
    LIF          z without the least important r patches: a faithful map's curve stays
    SRG          area under LIF - area under MIF, over the share of patches that are gone, by the trapezoid rule

SRG (symmetric relevance gain, Bluecher et al., TMLR 2024, arXiv:2401.06654) is in the units of z. A random order has 0, and an
order turned round has minus the same. It compares orders only: a map's scale, and by how much one patch exceeds another, do not
enter it. Patches of equal value are taken in an order that is drawn once, so that a flat map scores as chance.

    Shapley      the mean, over orders in which patches come into the picture, of what z gains when a patch comes in

The Shapley value is the reference for what a patch is worth where patches can stand in for each other: there, taking out one
patch shows nothing.

`saecore.evaluation.removal` says what taking out means. All functions take a `Removal`, so that they hold for any model.

Shapes: B images, n targets of each, P patches, S steps, R sets of patches.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saecore.evaluation.removal import Removal
from saecore.relevance.agreement import rank_correlation

STEPS = 10
"""S: patches are taken out in so many parts of equal size. Both ends count, so a curve has one point more."""

PERMUTATIONS, AT_ONCE = 60, 4
"""Orders for Shapley values, and patches that come in together."""

GROUPS = 5
"""Parts of the orders that tell the error of Shapley values."""


class Curves(NamedTuple):
    """z as patches are taken out, float32 (B, n, S + 1): of the whole picture first, without any patch last."""

    mif: Tensor
    lif: Tensor

    @property
    def srg(self) -> Tensor:
        """float32 (B, n)."""
        return torch.trapezoid(self.lif - self.mif, dx=1 / (self.mif.shape[-1] - 1))


def order_of(maps: Tensor, seed: int = 0) -> Tensor:
    """Patches by falling value of maps (B, n, P), int64 (B, n, P); equal ones in an order that the seed draws."""
    drawn = torch.randperm(maps.shape[-1], generator=torch.Generator().manual_seed(seed)).to(maps.device)
    return drawn[maps[..., drawn].argsort(dim=-1, descending=True, stable=True)]


def curves(remove: Removal, order: Tensor, steps: int = STEPS, least: int = 0) -> Curves:
    """Both curves of each target, by the order of its own map, int64 (B, n, P), most important first.

    `least`: how many patches stay at the end, 1 for a model that needs one.
    """
    return Curves(*(_curve(remove, one, steps, least) for one in (order, order.flip(-1))))


def _curve(remove: Removal, order: Tensor, steps: int, least: int) -> Tensor:
    """z (B, n, S + 1) as patches are taken out, those that come first in the order first."""
    P = order.shape[-1]
    values = []
    for step in range(steps + 1):
        gone = min(round(step * P / steps), P - least)
        kept = order[..., gone:]
        if gone in (0, P):  # the same patches for all targets: all, or none
            values.append(remove(kept[:, :1])[:, 0])
        else:
            values.append(remove(kept).diagonal(dim1=1, dim2=2))
    return torch.stack(values, -1)


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
    if len(X) < X.shape[1]:
        raise ValueError(f"{len(X)} subsets do not tell the values of {X.shape[1]} patches: more orders are needed")
    weighted = X * w[:, None]
    inverse = torch.linalg.inv(X.mT @ weighted)
    free = z.flatten(2).double() @ weighted @ inverse
    along = inverse.sum(0)
    return free + ((total.double() - free.sum(-1)) / along.sum())[..., None] * along


# ---- Whether a map is its latent's own.


def alikeness(maps: Tensor) -> Tensor:
    """Mean |rank correlation| of the maps of each image with each other, (B, n, P) -> float32 (B,): near 1 where the method
    shows the same for every target. NaN for an image with one target."""
    n = maps.shape[1]
    one, other = torch.triu_indices(n, n, offset=1, device=maps.device)
    return rank_correlation(maps[:, one], maps[:, other]).abs().nanmean(1)


def swapped(order: Tensor) -> Tensor:
    """Orders of targets (B, n, P), of which each target gets that of the next: their SRG says what another's map would do."""
    return order.roll(1, dims=1)
