"""How near words and latents stand to each other: scores by direction, by data, and from MSAE's matrices.

With t_v the L2-normalised CLIP text embedding of word v, and D_j, s, m an SAE's decoder row, scale and mean
(`saecore.sae.model`):

    by direction    score(v, j) = cos(t_v, d_j)       d_j = D_j            Rao et al. 2024, arXiv:2407.14499
                                                      d_j = D_j / s + m    MSAE, Zaigrajew et al. 2025, arXiv:2502.20578

    by data         z(v, i) = (cos(t_v, x_i) - mean_v) / std_v, with x_i the embedding of image i, mean_v and std_v over
                    random images of the run; score(v, j) = the z(v, i) that four fifths of the top images of latent j reach

MSAE adds the mean to every row, so all rows share a large part that is not their own. Words near the mean image then come first
for many latents, and scores of SAEs that subtract the mean cannot be compared with others. It is an option here, not the
default.

By data, a word has to be true of nearly all top images of a latent. A mean over these images, or a direction, would prefer
"blue circle" for a latent that fires for everything blue. On the demo, where the truth is known, data names more latents truly
than any direction does (docs/benchmarks.md), in a unit that means the same for every CLIP. It needs the images' embeddings.

Scores come in blocks (words, n) in the order of the vocabulary, and one block is held at a time.

Left out: which scores make a name (`saecore.naming.names`), and which images stand for a latent (`saecore.naming.evidence`).

Shapes: E embedding width, V words, n latents, R images, S random images, K top images of a latent.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saecore.sae.model import SAE

DIRECTIONS = ("decoder", "decoder+mean")

LEAST_IMAGES = 5
"""Images for which a latent must fire to be named by data: a fifth of them is one."""

BLOCK = 1 << 24
"""Numbers held at once, 64 MB in float32: 682 words for 24,576 latents."""


def directions(sae: SAE, kind: str = "decoder") -> Tensor:
    """float32 (n, E): where each latent moves the reconstruction or, with the mean, where the latent would put it by itself.

    An SAE that normalises each sample has a spread that differs from image to image. `decoder+mean` omits that spread.
    """
    if kind not in DIRECTIONS:
        raise ValueError(f"direction {kind!r}: must be one of {', '.join(DIRECTIONS)}")
    rows = sae.atoms.detach()
    return rows / sae.scale + sae.mean if kind == "decoder+mean" else rows


def centred(texts: Tensor) -> Tensor:
    """Text embeddings (V, E) -> L2-normalised, minus their mean, which is what all texts of a CLIP share."""
    texts = normalize(texts, dim=-1)
    return texts - texts.mean(0)


def by_direction(towards: Tensor, texts: Tensor) -> Iterator[Tensor]:
    """Scores of directions (n, E) and text embeddings (V, E); -inf for a direction of zeros."""
    nowhere = (towards == 0).all(1)
    towards = normalize(towards, dim=-1)
    for block in normalize(texts, dim=-1).split(_words_at_once(len(towards))):
        yield (block @ towards.T).masked_fill(nowhere, -torch.inf)


def by_data(images: Tensor, top: Tensor, sample: Tensor, texts: Tensor) -> Iterator[Tensor]:
    """Scores by image embeddings, for text embeddings (V, E); -inf for a latent with fewer than `LEAST_IMAGES` images.

    images, top and sample are those of `saecore.naming.evidence.Evidence`.
    """
    images, sample, texts = (normalize(embeddings, dim=-1) for embeddings in (images, sample, texts))
    n_images = (top >= 0).sum(1)
    fifth = n_images // 5  # of the images in rising order, counted from 0: a fifth of them lies below it
    for block in texts.split(_words_at_once(max(len(top), len(images), len(sample)))):
        usual = sample @ block.T
        z = (images @ block.T - usual.mean(0)) / usual.std(0, correction=0).clamp(min=1e-6)
        z = torch.cat([z, z.new_full((1, len(block)), torch.inf)])  # -1 points here, above all others
        latents_at_once = max(1, BLOCK // (top.shape[1] * len(block)))
        parts = [
            z[rows].sort(dim=1).values.take_along_dim(place[:, None, None], dim=1).squeeze(1)
            for rows, place in zip(top.split(latents_at_once), fifth.split(latents_at_once), strict=True)
        ]
        yield torch.cat(parts).T.masked_fill(n_images < LEAST_IMAGES, -torch.inf)


def open_interpreter(path: str, n_words: int, n_latents: int) -> Iterator[Tensor]:
    """Scores from MSAE's `Concept_Interpreter_*.npy`: a true .npy, float32 (V, n); ValueError if it does not fit."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        matrix = np.lib.format.open_memmap(path, mode="r")  # this unpickles nothing
    except ValueError as error:
        raise ValueError(f"{path} is no .npy file of numbers") from error
    if matrix.ndim != 2 or matrix.dtype != np.float32:
        raise ValueError(f"{path}: expected a float32 matrix, found {matrix.dtype} {matrix.shape}")
    if matrix.shape != (n_words, n_latents):
        raise ValueError(
            f"{path} is {matrix.shape[0]:,} x {matrix.shape[1]:,}: a row for each word is needed, and the "
            f"vocabulary has {n_words:,} words; a column for each latent is needed, and the SAE has {n_latents:,} latents"
        )
    return _blocks_of(matrix, path)


def _blocks_of(matrix: np.ndarray, path: str) -> Iterator[Tensor]:
    size = _words_at_once(matrix.shape[1])
    for start in range(0, len(matrix), size):
        block = torch.from_numpy(np.array(matrix[start : start + size]))
        if not block.isfinite().all():
            raise ValueError(f"{path} holds scores that are not finite")
        yield block


def _words_at_once(columns: int) -> int:
    return max(1, BLOCK // columns)
