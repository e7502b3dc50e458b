"""How far two maps of one latent lie apart: where it is active, and what causes its value.

A latent's activation often lies on other patches than what it depends on (arXiv:2509.00749), so a run tells both figures for
each map of a cause.

Shapes: any leading dimensions, P patches.
"""

import torch
from torch import Tensor


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's rank correlation over the last dimension; equal values share their mean rank. NaN if a map is constant."""
    a, b = (ranks - ranks.mean(-1, keepdim=True) for ranks in (_ranks(one), _ranks(other)))
    size = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(size > 0, (a * b).sum(-1) / size, torch.nan)


def _ranks(values: Tensor) -> Tensor:
    in_order = values.contiguous().sort(-1).values
    first, past = (torch.searchsorted(in_order, values.contiguous(), right=right) for right in (False, True))
    return (first + past).to(torch.float32)  # twice the mean rank, and a constant


def peak_distance(one: Tensor, other: Tensor, grid: tuple[int, int]) -> Tensor:
    """The distance of the largest values of two maps (.., P), in patches; NaN if a map is constant.

    Of several largest values of one map, the first counts, row by row.
    """
    places = []
    for values in (one, other):
        peak = values.argmax(-1)
        places.append((peak // grid[1], peak % grid[1]))
    (row, column), (other_row, other_column) = places
    distance = torch.hypot((row - other_row).float(), (column - other_column).float())
    flat = (one.amax(-1) == one.amin(-1)) | (other.amax(-1) == other.amin(-1))
    return distance.masked_fill(flat, torch.nan)
