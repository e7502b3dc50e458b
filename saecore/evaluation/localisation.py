"""Does a map lie on the object? Scores of maps against true masks, baselines without a model, and the certainty of a mean.

For maps R and coverage c of the P patches of one picture (c in [0, 1]: the share of a patch that the object fills; a patch
is on the object if c >= 1/2):

    pointing           is the patch of the largest R on the object?
    mass               sum_i c_i max(R_i, 0) / sum_i max(R_i, 0)
    average precision  mean over the object's patches of the precision among all patches with at least their R

Pointing (Zhang et al. 2018, arXiv:1608.00507) looks at one patch. Mass (relevance mass accuracy, Arras et al. 2022,
arXiv:2003.07258) looks at how much relevance lies where. Average precision looks only at the order of the patches: it needs no
threshold and knows no scale. No score sees whether a map is faithful: a model may look at something next to the object. Scores
are taken on the patch grid, never on an interpolated map.

Patches of equal value share the score that they would get, so that a constant map scores as chance.

Left out: segmentation scores at a threshold (IoU), and masks of real photographs.

Shapes: n maps, P = H W patches, row-major.
"""

import functools
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
