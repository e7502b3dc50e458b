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
    another_mif: Tensor
    """z as patches are taken out by the map of another target of the image, the one before; the first has the last's."""
    another_lif: Tensor

    @property
    def srg(self) -> Tensor:
        """float32 (B, n)."""
        return _gain(self.mif, self.lif)

    @property
    def srg_of_another(self) -> Tensor:
        """float32 (B, n): what another target's map would do. A method that tells targets apart has less here."""
        return _gain(self.another_mif, self.another_lif)


def order_of(maps: Tensor, seed: int = 0) -> Tensor:
    """Patches by falling value of maps (B, n, P), int64 (B, n, P); equal ones in an order that the seed draws."""
    drawn = torch.randperm(maps.shape[-1], generator=torch.Generator().manual_seed(seed)).to(maps.device)
    return drawn[maps[..., drawn].argsort(dim=-1, descending=True, stable=True)]


def curves(remove: Removal, order: Tensor, steps: int = STEPS, least: int = 0) -> Curves:
    """Both curves of each target, by the order of its own map, int64 (B, n, P), most important first.

    `least`: how many patches stay at the end, 1 for a model that needs one.
    """
    mif, lif = (_curves(remove, one, steps, least) for one in (order, order.flip(-1)))  # B, n orders, n targets, S + 1
    own, another = ([all_of.roll(by, 1).diagonal(dim1=1, dim2=2).mT for all_of in (mif, lif)] for by in (0, 1))
    return Curves(*own, *another)


def _gain(mif: Tensor, lif: Tensor) -> Tensor:
    return torch.trapezoid(lif - mif, dx=1 / (mif.shape[-1] - 1))


def _curves(remove: Removal, order: Tensor, steps: int, least: int) -> Tensor:
    """z of every target as patches are taken out by every order, (B, n orders, n targets, S + 1): all come of one forward."""
    n, P = order.shape[1:]
    values = []
    for step in range(steps + 1):
        gone = min(round(step * P / steps), P - least)
        kept = order[..., gone:]
        # All patches, or none: the same for all orders.
        values.append(remove(kept[:, :1]).expand(-1, n, -1) if gone in (0, P) else remove(kept))
    return torch.stack(values, -1)


# ---- Whether a map is its latent's own.


def alikeness(maps: Tensor) -> Tensor:
    """Mean |rank correlation| of each map with the others of its image, (B, n, P) -> float32 (B, n): near 1 where the method
    shows the same for every target. NaN for an image with one target."""
    n = maps.shape[1]
    if n == 1:
        return torch.full_like(maps[..., 0], torch.nan)
    return torch.stack([rank_correlation(maps, maps.roll(by, 1)).abs() for by in range(1, n)]).nanmean(0)
