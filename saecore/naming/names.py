"""Names of latents: which words of a vocabulary stand nearest to each, and which latents a word stands nearest to.

With t_v the L2-normalised CLIP text embedding of word v, and D_j, s, m an SAE's decoder row, scale and mean
(`saecore.sae.model`):

    by direction    score(v, j) = cos(t_v, d_j)       d_j = D_j            Rao et al. 2024, arXiv:2407.14499
                                                      d_j = D_j / s + m    MSAE, Zaigrajew et al. 2025, arXiv:2502.20578

    by data         z(v, i) = (cos(t_v, x_i) - mean_v) / std_v, with x_i the embedding of image i, mean_v and std_v over
                    random images of the run; score(v, j) = what z(v, i) reaches or exceeds for four fifths of the top
                    images of latent j

MSAE adds the mean to every row, so all rows share a large part that is not their own: words near the mean image come first for
many latents, and scores of centred SAEs compare with nothing else. It is an option here, not the default.

By data, a word has to hold of nearly all top images; a mean, or d', prefers "blue circle" for a latent of all that is blue. On
the demo, where the truth is known, this names more latents truly than any direction (docs/benchmarks.md), in a unit that means
the same for every CLIP. It needs the images' embeddings.

A word's margin is by how much it beats the runner-up. All numbers are kept; what is called valid is an option (`Valid`).

Left out: names put together from several words; synonyms, between which there is no margin.

Shapes: E embedding width, V words, n latents, R images, K top images of a latent.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saecore import schema
from saecore.sae.model import SAE

DIRECTIONS = ("decoder", "decoder+mean")

TOP_IMAGES = 20
"""Images that stand for a latent, by data."""

LEAST_IMAGES = 5
"""Images for which a latent must fire to be named by data: a fifth of them is one."""

BLOCK = 1 << 24
"""Numbers held at once, 64 MB in float32: 682 words for 24,576 latents."""


class Valid(NamedTuple):
    """When a name is called valid: where all three hold."""

    score: float = 0.0
    """Least score."""
    margin: float = 0.0
    """Least margin to the runner-up."""
    ratio: float = 0.0
    """Least ratio of the score to the runner-up's, where that one is positive."""


VALID_BY_DATA = Valid(score=1.0, margin=0.2)
"""In standard deviations. Chosen on 4,000 scenes outside the demo; of the demo's 73 latents 40 pass, all truly named."""

VALID_BY_DIRECTION = Valid(margin=0.2)
"""In cosines. Of the demo's 73 latents 24 pass, all truly named; another CLIP may need another margin."""


class Nearest(NamedTuple):
    """The w words nearest to each latent, nearest first."""

    words: Tensor
    """int64 (n, w): their numbers in the vocabulary."""
    scores: Tensor
    """float32 (n, w): -inf for a latent that cannot be named."""


# ---- Scores: blocks (words, n) in the vocabulary's order, one of which is held at a time.


def directions(sae: SAE, kind: str = "decoder") -> Tensor:
    """float32 (n, E): where each latent moves the reconstruction, or, with the mean, where it alone would put it.

    Of an SAE that normalises each sample, the latter leaves the spread away, which differs from image to image.
    """
    if kind not in DIRECTIONS:
        raise ValueError(f"direction {kind!r}: must be one of {', '.join(DIRECTIONS)}")
    rows = sae.atoms.detach()
    return rows / sae.scale + sae.mean if kind == "decoder+mean" else rows


def centred(texts: Tensor) -> Tensor:
    """Text embeddings (V, E) -> L2-normalised, less their mean: without what all texts of a CLIP share."""
    texts = normalize(texts, dim=-1)
    return texts - texts.mean(0)


def by_direction(towards: Tensor, texts: Tensor) -> Iterator[Tensor]:
    """Scores of directions (n, E) and text embeddings (V, E); -inf for a direction of zeros."""
    nowhere = (towards == 0).all(1)
    towards = normalize(towards, dim=-1)
    for block in normalize(texts, dim=-1).split(_words_at_once(len(towards))):
        yield (block @ towards.T).masked_fill(nowhere, -torch.inf)


def by_data(images: Tensor, top: Tensor, sample: Tensor, texts: Tensor) -> Iterator[Tensor]:
    """Scores of image embeddings and text embeddings (V, E); -inf for a latent with fewer than `LEAST_IMAGES` images.

    images: (R, E), those that are top images of a latent. top: int64 (n, K), which of them, -1 for none. sample: (S, E),
    random images.
    """
    images, sample, texts = (normalize(embeddings, dim=-1) for embeddings in (images, sample, texts))
    found = (top >= 0).sum(1)
    fifth = found // 5  # in rising order, counted from 0: as many lie below
    for block in texts.split(_words_at_once(max(len(top), len(images), len(sample)))):
        usual = sample @ block.T
        z = (images @ block.T - usual.mean(0)) / usual.std(0, correction=0).clamp(min=1e-6)
        z = torch.cat([z, z.new_full((1, len(block)), torch.inf)])  # where -1 points to: above all others
        latents_at_once = max(1, BLOCK // (top.shape[1] * len(block)))
        parts = [
            z[some].sort(dim=1).values.take_along_dim(place[:, None, None], dim=1).squeeze(1)
            for some, place in zip(top.split(latents_at_once), fifth.split(latents_at_once), strict=True)
        ]
        yield torch.cat(parts).T.masked_fill(found < LEAST_IMAGES, -torch.inf)


def open_interpreter(path: str, n_words: int, n_latents: int) -> Iterator[Tensor]:
    """Scores from MSAE's `Concept_Interpreter_*.npy`: a true .npy, float32 (V, n); ValueError if it is not, or does not fit."""
    if not Path(path).is_file():
        raise ValueError(f"--interpreter {path}: no such file")
    try:
        matrix = np.lib.format.open_memmap(path, mode="r")  # which unpickles nothing
    except ValueError as error:
        raise ValueError(f"--interpreter {path} is no .npy file of numbers") from error
    if matrix.ndim != 2 or matrix.dtype != np.float32:
        raise ValueError(f"--interpreter {path}: expected a float32 matrix, found {matrix.dtype} {matrix.shape}")
    if matrix.shape != (n_words, n_latents):
        raise ValueError(
            f"--interpreter {path} is {matrix.shape[0]:,} x {matrix.shape[1]:,}: a row for each word is needed, of which the "
            f"vocabulary has {n_words:,}, and a column for each latent, of which the SAE has {n_latents:,}"
        )
    return _blocks_of(matrix, path)


def _blocks_of(matrix: np.ndarray, path: str) -> Iterator[Tensor]:
    size = _words_at_once(matrix.shape[1])
    for start in range(0, len(matrix), size):
        block = torch.from_numpy(np.array(matrix[start : start + size]))
        if not block.isfinite().all():
            raise ValueError(f"--interpreter {path} holds scores that are not finite")
        yield block


def _words_at_once(columns: int) -> int:
    return max(1, BLOCK // columns)


# ---- From scores to names.


def nearest(scores: Iterable[Tensor], n: int) -> Nearest:
    """The n highest-scored words of each latent, or all where there are fewer; of equal ones the first comes first."""
    words = values = torch.empty(0)
    start = 0
    for block in scores:
        best = block.topk(min(n, len(block)), dim=0)
        numbers, order = best.indices.sort(dim=0)
        found = best.values.gather(0, order)
        if start:
            numbers, found = torch.cat([words, numbers + start]), torch.cat([values, found])
        values, order = found.sort(dim=0, descending=True, stable=True)
        words, values = numbers.gather(0, order)[:n], values[:n]
        start += len(block)
    return Nearest(words.T.cpu(), values.T.cpu())


def table(words: Sequence[str], direction: Nearest, data: Nearest | None, by_data: bool, valid: Valid) -> pa.Table:
    """schema.NAMES. With `by_data`, a latent without a name by data has that by direction, which is never called valid.

    words: the vocabulary. The nearest are two for each latent, or more, and as many both ways.
    """
    if data is None:
        data = Nearest(direction.words, torch.full_like(direction.scores, -torch.inf))
    is_by_data = (data.scores[:, 0] > -torch.inf) & by_data
    best = Nearest(*(torch.where(is_by_data[:, None], *both) for both in zip(data, direction, strict=True)))
    is_valid = _passes(best, valid) & (is_by_data == by_data)
    unnamed = (best.scores[:, 0] == -torch.inf).numpy()
    vocabulary, (n, w) = pa.array(words, pa.string()), best.words.shape
    starts = pa.array(range(0, n * w + 1, w), pa.int32())
    every = vocabulary.take(pa.array(best.words.flatten().numpy()))
    columns = {
        "latent": pa.array(range(n), pa.int32()),
        **_named("", best, vocabulary),
        "runner_up": vocabulary.take(pa.array(best.words[:, 1].numpy(), mask=unnamed)),
        "runner_up_score": pa.array(best.scores[:, 1].numpy(), mask=unnamed),
        "valid": pa.array(is_valid.numpy()),
        "by_data": pa.array(is_by_data.numpy()),
        "words": pa.ListArray.from_arrays(starts, every, mask=pa.array(unnamed)),
        "scores": pa.ListArray.from_arrays(starts, pa.array(best.scores.flatten().numpy()), mask=pa.array(unnamed)),
        **_named("direction_", direction, vocabulary),
        **_named("data_", data, vocabulary),
    }
    return pa.table([columns[name] for name in schema.NAMES.names], schema=schema.NAMES)


def _named(prefix: str, found: Nearest, vocabulary: pa.Array) -> dict[str, pa.Array]:
    unnamed = (found.scores[:, 0] == -torch.inf).numpy()
    return {
        f"{prefix}name": vocabulary.take(pa.array(found.words[:, 0].numpy(), mask=unnamed)),
        f"{prefix}score": pa.array(found.scores[:, 0].numpy(), mask=unnamed),
        f"{prefix}margin": pa.array((found.scores[:, 0] - found.scores[:, 1]).numpy(), mask=unnamed),
    }


def _passes(found: Nearest, least: Valid) -> Tensor:
    score, runner_up = found.scores[:, 0], found.scores[:, 1]
    apart = (runner_up <= 0) | (score >= least.ratio * runner_up)
    return (score > -torch.inf) & (score >= least.score) & (score - runner_up >= least.margin) & apart


# ---- From words to latents.


LATENTS_OF = """SELECT latent, place - 1 AS place, score, valid FROM (
    SELECT latent, valid, unnest(words) AS word, unnest(scores) AS score, generate_subscripts(words, 1) AS place FROM names)
WHERE lower(word) = lower(?) ORDER BY place, score DESC, latent"""


def latents_of(names: pa.Table, word: str) -> pa.Table:
    """The latents (schema.NAMES) among whose words is this one, in any case: latent, place (0: its name), score, valid.

    By place, then by falling score. For a text that is not in the vocabulary: `saecore.relevance.targets.concept_weights`.
    """
    with duckdb.connect() as database:
        return database.register("names", names).sql(LATENTS_OF, params=[word]).to_arrow_table()
