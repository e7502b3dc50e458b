"""Is a map faithful? What becomes of a target as patches are taken out in the order of its map.

    MIF          z without the most important r patches, r = 0 .. P: a faithful map's curve falls at once
    LIF          z without the least important r patches: a faithful map's curve stays
    SRG          area under LIF - area under MIF, over the share of patches that are gone, by the trapezoid rule

SRG (symmetric relevance gain, Bluecher et al., TMLR 2024, arXiv:2401.06654) is in the units of z. A random order has 0, and an
order turned round has minus the same. It compares orders only: a map's scale, and by how much one patch exceeds another, do not
enter it. Patches of equal value are taken in an order that is drawn once, so that a flat map scores as chance.

`saecore.removal.ways` says what taking out means. All functions take a `Removal`, so that they hold for any model.

Shapes: B images, n targets of each, P patches, S steps.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saecore.relevance.agreement import rank_correlation
from saecore.removal.ways import Removal

STEPS = 10
"""S: patches are taken out in so many parts of equal size. Both ends count, so a curve has one point more."""


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
