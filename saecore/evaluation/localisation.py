"""Does a map lie on the object? Scores of maps against true masks, baselines without a model, and the certainty of a mean.

For maps R and coverage c of the P patches of one picture (c in [0, 1]: the share of a patch that the object fills; a patch
is on the object if c >= 1/2):

    pointing           is the patch of the largest R on the object?
    mass               sum_i c_i max(R_i, 0) / sum_i max(R_i, 0)
    average precision  mean over the object's patches of the precision among all patches with at least their R
    mIoU               mean of the IoU of {R > mean R} with the object, and of the IoU of the two complements

Pointing (Zhang et al. 2018, arXiv:1608.00507) looks at one patch. Mass (relevance mass accuracy, Arras et al. 2022,
arXiv:2003.07258) looks at how much relevance lies where. Average precision looks only at the order of the patches: it needs no
threshold and knows no scale. mIoU is what many papers tell (Chefer et al. 2021, arXiv:2012.09838, cut maps at their mean too,
but sum over the pixels of all pictures). That cut favours maps that mark as much as the object fills. No score sees whether a
map is faithful: a model may look at something next to the object. Scores are taken on the patch grid, never on an interpolated
map.

Patches of equal value share the score that they would get, so that a constant map scores as chance; in mIoU it marks nothing.

Left out: reading masks (`saecore.evaluation.masks`).

Shapes: n maps, P = H W patches, row-major.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from scipy.stats import rankdata

ON = 0.5
"""The least coverage of a patch that is on the object."""


def per_patch(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Mean of each patch: (n, height, width), multiples of the grid's sizes, -> float64 (n, P); for masks, the coverage."""
    n, height, width = values.shape
    rows, columns = grid
    if height % rows or width % columns:
        raise ValueError(f"{width} x {height} pixels cannot be cut into {columns} x {rows} equal patches")
    patches = values.reshape(n, rows, height // rows, columns, width // columns)
    return patches.mean(axis=(2, 4), dtype=np.float64).reshape(n, -1)


def pointing(maps: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Whether the maximum lies on the object, float64 (n,): 1, 0, or a share if several patches have the maximum."""
    best = maps == maps.max(axis=-1, keepdims=True)
    return (best & (covered >= ON)).sum(axis=-1) / best.sum(axis=-1)


def mass(maps: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """The share of positive relevance that lies on the object, float64 (n,); a map without any scores as a flat map."""
    positive = maps.clip(min=0)
    positive = np.where(positive.any(axis=-1, keepdims=True), positive, 1.0)
    return (positive * covered).sum(axis=-1) / positive.sum(axis=-1)


def average_precision(maps: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve over a map's patches, float64 (n,); NaN where no patch is on the object."""
    order = np.argsort(-maps, axis=-1)
    values, hits = np.take_along_axis(maps, order, -1), np.take_along_axis(covered >= ON, order, -1)
    ranks = np.arange(maps.shape[-1])
    # The last rank that has the same value as each rank: there, all tied patches are counted.
    is_last = np.append(values[:, 1:] != values[:, :-1], np.ones((len(values), 1), bool), axis=-1)
    ends = np.minimum.accumulate(np.where(is_last, ranks, ranks[-1])[:, ::-1], axis=-1)[:, ::-1]
    precision = np.take_along_axis(hits.cumsum(axis=-1) / (ranks + 1), ends, -1)
    n_on = hits.sum(axis=-1)
    return np.divide((precision * hits).sum(axis=-1), n_on, out=np.full(len(maps), np.nan), where=n_on > 0)


def mean_iou(maps: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """IoU of the patches above a map's mean with the object, and of the others with the background, averaged: float64 (n,).

    NaN where no patch is on the object, or all are.
    """
    # The mean of equal values may be one bit below them.
    threshold = np.maximum(maps.mean(axis=-1, keepdims=True), maps.min(axis=-1, keepdims=True))
    marked, on = maps > threshold, covered >= ON
    both = [(marked & on).sum(-1), (~marked & ~on).sum(-1)]
    either = [(marked | on).sum(-1), (~marked | ~on).sum(-1)]
    told = on.any(-1) & ~on.all(-1)
    parts = [np.divide(b, e, out=np.full(len(maps), np.nan), where=told) for b, e in zip(both, either, strict=True)]
    return (parts[0] + parts[1]) / 2


SCORES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "pointing": pointing,
    "mass": mass,
    "average precision": average_precision,
    "mIoU": mean_iou,
}
"""Scores of maps (n, P) by the coverage of their patches (n, P)."""


def agreement(maps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each map with its partner, float64 (n,); NaN where one of them is constant."""
    a, b = (rankdata(m, axis=-1) - (m.shape[-1] + 1) / 2 for m in (maps, others))
    spread = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), spread, out=np.full(len(maps), np.nan), where=spread > 0)


# ---- Baselines, which a map has to beat.


def centre(n: int, grid: tuple[int, int]) -> np.ndarray:
    """A Gaussian in the middle of the picture, whose deviation is a quarter of its side: float64 (n, P)."""
    down, across = (np.exp(-(((np.arange(m) + 0.5) / m - 0.5) ** 2) / (2 * 0.25**2)) for m in grid)
    return np.tile(np.outer(down, across).ravel(), (n, 1))


def edges(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Mean length of the Sobel gradient of each patch: uint8 (n, height, width, 3) -> float64 (n, P)."""
    lengths = []
    for picture in pixels:
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
        lengths.append(np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)))
    return per_patch(np.stack(lengths), grid)


def noise(n: int, grid: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Independent uniform values: float64 (n, P)."""
    return np.random.default_rng(seed).random((n, grid[0] * grid[1]))


# ---- Which latent stands for an object.

FEWEST = 5
"""A label is followed by a latent only if so many images show it, and as many do not."""

LATENTS_AT_ONCE = 1024
"""Latents whose values are held dense for all images."""


class Followers(NamedTuple):
    """The latent that follows each of L labels best."""

    latent: np.ndarray
    """int64 (L,); -1 for a label that none can be said to follow, see `FEWEST`."""
    auc: np.ndarray
    """float64 (L,): on the images by which it was chosen; NaN where there is none."""


def halves(n_images: int, seed: int = 0) -> np.ndarray:
    """Whether an image is in the half by which latents are chosen, bool (n_images,); the other half is for judging."""
    return np.random.default_rng(seed).permutation(n_images) < n_images // 2


def follow(present: np.ndarray, latents: np.ndarray, activations: np.ndarray) -> Followers:
    """The latents, among those that fire, whose activation separates the images that show a label from the others best.

    present bool (B, L); latents int (B, K), activations (B, K), which are not above 0 for a latent that does not fire. A latent
    that an image does not list has 0 there. Of latents that follow equally well, the one of the smallest number is taken.
    """
    strength, n_shown, n_labels = activations.clip(min=0), present.sum(axis=0), present.shape[1]
    wanted = np.flatnonzero((n_shown >= FEWEST) & (n_shown <= len(present) - FEWEST))
    best = Followers(np.full(n_labels, -1), np.full(n_labels, np.nan))
    firing = np.unique(latents[strength > 0])
    for at in range(0, len(firing), LATENTS_AT_ONCE):
        some = firing[at : at + LATENTS_AT_ONCE]
        image, rank = np.nonzero(np.isin(latents, some) & (strength > 0))
        values = np.zeros((len(latents), len(some)), np.float32)
        values[image, np.searchsorted(some, latents[image, rank])] = strength[image, rank]
        areas = separation(values, present[:, wanted])
        for label, column in zip(wanted, areas.T, strict=True):
            top = column.argmax()
            if not column[top] <= best.auc[label]:
                best.latent[label], best.auc[label] = some[top], column[top]
    return best


def separation(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The area under the ROC curve by which each of n values separates images that show each of L labels from the others.

    values (B, n), present bool (B, L) -> float64 (n, L): 1/2 is chance, and NaN where all images show a label, or none does.
    Equal values share their mean rank.
    """
    yes = present.sum(axis=0).astype(np.float64)
    above = rankdata(values, axis=0).T @ present.astype(np.float64) - yes * (yes + 1) / 2
    pairs = yes * (len(values) - yes)
    return np.divide(above, pairs, out=np.full(above.shape, np.nan), where=pairs > 0)


# ---- The certainty of a mean.


class Mean(NamedTuple):
    """A mean over maps, and the bounds of its 95 % interval: its range in 95 of 100 samples of as many images."""

    value: float
    low: float
    high: float


def mean_over_images(scores: np.ndarray, images: np.ndarray, draws: int = 2000, seed: int = 0) -> Mean:
    """Mean of scores (n,), with an interval by bootstrap over images: maps of one image are not independent.

    images: int (n,), the image of each score. NaN scores are omitted. To compare two methods on the same cases, give the
    differences of their scores. The interval is from the 2.5 to the 97.5 percentile.
    """
    valid = ~np.isnan(scores)
    _, groups = np.unique(images[valid], return_inverse=True)
    if not len(groups):
        raise ValueError("no score to take the mean of")
    sums, counts = np.bincount(groups, scores[valid]), np.bincount(groups)
    drawn = _draws(len(sums), draws, seed)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [0.025, 0.975])
    return Mean(float(scores[valid].mean()), float(low), float(high))


@functools.lru_cache(maxsize=1)
def _draws(n_images: int, draws: int, seed: int) -> np.ndarray:
    """How often each draw holds each image: float64 (draws, n_images). Cached, since drawing takes longer than all else."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_images, np.full(n_images, 1 / n_images), size=draws).astype(np.float64)
