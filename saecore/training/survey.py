"""What embeddings are like: one pass for mean, scale and the rows to hold out; random rows; the geometric median.

    mean       over the rows to train on
    s          sqrt(width) / sqrt(mean |x - mean|^2), so that standardised rows have a mean squared norm of `width`
    median     the point with the least sum of distances to the rows

Moments are taken by block in float64 and merged by Chan's formula, so that they are numerically sound at any number of rows.

Left out: what only a model can tell, such as how well an SAE reconstructs the rows (`saecore.evaluation.quality`).
"""

import math
from typing import NamedTuple

import numpy as np

from saecore.training.embeddings import Embeddings

MEDIAN_ROWS = 16_384
"""Rows of which the geometric median is taken: its error is that of a mean of so many rows, 1/128 of a standard deviation."""


def draw(source: Embeddings, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (int64, ascending) and values (float32) of so many random rows, or of all rows if there are no more.

    `survey` holds out the same rows for the same seed.
    """
    total = int(source.block_rows.sum())
    chosen = np.arange(total) if rows >= total else _chosen(np.random.default_rng(seed), total, rows)
    starts = np.concatenate([[0], np.cumsum(source.block_rows)])
    inside = np.split(chosen, np.searchsorted(chosen, starts[1:-1]))
    parts = [source.read(block)[own - starts[block]] for block, own in enumerate(inside) if len(own)]
    return chosen, np.concatenate(parts)


def _chosen(generator: np.random.Generator, total: int, rows: int) -> np.ndarray:
    return np.sort(generator.choice(total, rows, replace=False))


class Survey(NamedTuple):
    """One pass over the data."""

    rows: int
    """All rows."""
    mean: np.ndarray
    """float32 (width,), of the rows to train on."""
    scale: float
    """s, of the rows to train on."""
    held_out: np.ndarray
    """int64, ascending: rows kept for evaluation."""
    evaluation: np.ndarray
    """float32 (held out, width): those rows."""
    sample: np.ndarray
    """float32 (at most MEDIAN_ROWS, width): random rows to train on."""
    unit_norm: bool
    """Whether every row has length 1. A CLIP tower gives other lengths, so somebody has normalised such rows."""


def survey(source: Embeddings, held_out: int, seed: int) -> Survey:
    """Mean, scale, held-out rows and a sample in one pass over all blocks; see the head of this file."""
    total = int(source.block_rows.sum())
    if not 0 <= held_out < total:
        raise ValueError(f"cannot hold out {held_out} of {total} embeddings")
    generator = np.random.default_rng(seed)
    kept = _chosen(generator, total, held_out)
    sampled = _chosen(generator, total, min(MEDIAN_ROWS, total))
    sampled = sampled[~np.isin(sampled, kept)]
    count, mean, spread = 0, np.zeros(source.width), 0.0
    evaluation, sample, unit = [], [], True
    start = 0
    for block, length in enumerate(source.block_rows):
        rows = source.read(block)
        inside = kept[np.searchsorted(kept, start) : np.searchsorted(kept, start + length)] - start
        chosen = sampled[np.searchsorted(sampled, start) : np.searchsorted(sampled, start + length)] - start
        evaluation.append(rows[inside])
        sample.append(rows[chosen])
        train = np.delete(rows, inside, axis=0).astype(np.float64)
        unit = unit and unit_length(rows)
        if len(train):
            own = train.mean(axis=0)
            shift = own - mean
            between = np.square(shift).sum() * count * len(train) / (count + len(train))
            spread += float(np.square(train - own).sum() + between)
            mean += shift * (len(train) / (count + len(train)))
            count += len(train)
        start += int(length)
    if spread == 0:
        raise ValueError("all embeddings are the same: there is nothing to learn from them")
    scale = math.sqrt(source.width) / math.sqrt(spread / count)
    return Survey(total, mean.astype(np.float32), scale, kept, np.concatenate(evaluation), np.concatenate(sample), unit)


def unit_length(rows: np.ndarray) -> bool:
    """Whether every row has length 1."""
    return bool(np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3))


def geometric_median(rows: np.ndarray, tolerance: float = 1e-5, rounds: int = 1000) -> np.ndarray:
    """The point with the least sum of distances to the rows (n, width), by Weiszfeld's iteration in float64.

    A row that the point has reached would weigh infinitely much and keep the point for ever. By Vardi and Zhang (2000) such a
    row keeps the point only if it outweighs the pull of all other rows.
    """
    rows = rows.astype(np.float64)
    point = rows.mean(axis=0)
    for _ in range(rounds):
        apart = rows - point
        distance = np.linalg.norm(apart, axis=1)
        away = distance > 1e-12
        if not away.any():
            break
        weight = away / np.maximum(distance, 1e-12)
        pull = weight @ apart
        held = min(1.0, np.count_nonzero(~away) / max(float(np.linalg.norm(pull)), 1e-12))
        following = point + (1 - held) * pull / weight.sum()
        moved = float(np.linalg.norm(following - point))
        point = following
        if moved <= tolerance * max(float(np.linalg.norm(point)), tolerance):
            break
    return point.astype(np.float32)
