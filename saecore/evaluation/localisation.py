"""Does a map lie on the object? Scores of maps against true masks, baselines that know nothing, and how sure a mean is.

For maps R and coverage c of the P patches of one picture (c in [0, 1]: the share of a patch that the object fills; a patch
is on the object if c >= 1/2):

    pointing           is the patch of the largest R on the object?
    mass               sum_i c_i max(R_i, 0) / sum_i max(R_i, 0)
    average precision  mean over the object's patches of the precision among all patches with at least their R

Pointing (Zhang et al. 2018, arXiv:1608.00507) looks at one patch, mass (relevance mass accuracy, Arras et al. 2022,
arXiv:2003.07258) at how much lies where, average precision at order alone: it needs no threshold and knows no scale. None of
them sees whether a map is faithful: a model may look beside the object. All are taken on the patch grid, never on an
interpolated map.

Ties are nobody's: patches of one value share what they would get, so that a map that says nothing scores as chance.

Left out: segmentation scores at a threshold (IoU), and masks of real photographs.

Shapes: n maps, P = H W patches, row-major.
"""

import functools
from typing import NamedTuple

import cv2
import numpy as np
from scipy.stats import rankdata

ON = 0.5
"""Coverage from which a patch is on the object."""


def per_patch(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Mean of each patch: (n, height, width), sizes multiples of the grid's, -> float64 (n, P). Of a mask: its coverage."""
    n, height, width = values.shape
    rows, columns = grid
    if height % rows or width % columns:
        raise ValueError(f"{width} x {height} pixels cannot be cut into {columns} x {rows} equal patches")
    patches = values.reshape(n, rows, height // rows, columns, width // columns)
    return patches.mean(axis=(2, 4), dtype=np.float64).reshape(n, -1)


def pointing(maps: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Whether the maximum lies on the object, float64 (n,): 1, 0, or between if several patches share the maximum."""
    best = maps == maps.max(axis=-1, keepdims=True)
    return (best & (covered >= ON)).sum(axis=-1) / best.sum(axis=-1)


def mass(maps: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """The share of positive relevance that lies on the object, float64 (n,); for a map without any, that of a flat map."""
    positive = maps.clip(min=0)
    positive = np.where(positive.any(axis=-1, keepdims=True), positive, 1.0)
    return (positive * covered).sum(axis=-1) / positive.sum(axis=-1)


def average_precision(maps: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Area under each map's precision-recall curve, patches as samples, float64 (n,); NaN where no patch is on the object."""
    order = np.argsort(-maps, axis=-1)
    values, hits = np.take_along_axis(maps, order, -1), np.take_along_axis(covered >= ON, order, -1)
    places = np.arange(maps.shape[-1])
    # The last place of each place's value: where its ties are all counted.
    last = np.append(values[:, 1:] != values[:, :-1], np.ones((len(values), 1), bool), axis=-1)
    ends = np.minimum.accumulate(np.where(last, places, places[-1])[:, ::-1], axis=-1)[:, ::-1]
    precision = np.take_along_axis(hits.cumsum(axis=-1) / (places + 1), ends, -1)
    n_on = hits.sum(axis=-1)
    return np.divide((precision * hits).sum(axis=-1), n_on, out=np.full(len(maps), np.nan), where=n_on > 0)


def agreement(maps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each map with its partner, float64 (n,); NaN where one of them is constant."""
    one, other = (rankdata(m, axis=-1) - (m.shape[-1] + 1) / 2 for m in (maps, others))
    spread = np.sqrt((one**2).sum(axis=-1) * (other**2).sum(axis=-1))
    return np.divide((one * other).sum(axis=-1), spread, out=np.full(len(maps), np.nan), where=spread > 0)


# ---- What a map has to beat.


def centre(n: int, grid: tuple[int, int]) -> np.ndarray:
    """A Gaussian in the middle, a quarter of the picture wide: float64 (n, P)."""
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


# ---- How sure a mean is.


class Mean(NamedTuple):
    """A mean over maps, and where it lies in 95 of 100 samples of as many images."""

    value: float
    low: float
    high: float


def mean_over_images(scores: np.ndarray, images: np.ndarray, draws: int = 2000, seed: int = 0) -> Mean:
    """Mean of scores (n,), with an interval by bootstrap over images: maps of one image are not independent.

    images: int (n,), which image each score is of. NaN scores are left out. Give differences of two methods' scores to compare
    them on the same maps. The interval is from the 2.5 to the 97.5 percentile.
    """
    kept = ~np.isnan(scores)
    _, place = np.unique(images[kept], return_inverse=True)
    if not len(place):
        raise ValueError("no score to take the mean of")
    sums, counts = np.bincount(place, scores[kept]), np.bincount(place)
    drawn = _draws(len(sums), draws, seed)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [0.025, 0.975])
    return Mean(float(scores[kept].mean()), float(low), float(high))


@functools.lru_cache(maxsize=1)
def _draws(n_images: int, draws: int, seed: int) -> np.ndarray:
    """How often each draw holds each image: float64 (draws, n_images). Drawing takes longer than all else."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_images, np.full(n_images, 1 / n_images), size=draws).astype(np.float64)
