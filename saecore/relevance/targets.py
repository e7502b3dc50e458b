"""Targets, the values that maps explain: scalars z of the image embedding e, each with a read-out z = w . e + c.

    a latent    z = p_j(e), its pre-activation: w and c from `SAE.read_outs`, whether the latent fires or not
    a text      z = cos(e, t)                   w = t / (|t| |e|), frozen; the true gradient has no part along e
    a concept   z = sum_j a_j p_j(e)            over the latents j that a word names, with signed weights a_j

`Targets.values` computes z itself, with its normalisers, for any embedding. Occlusion needs it, and maps must add up to it.

Shapes: B images, E embedding width, n targets = k latents of each image, then T texts, then C concepts of m latents each.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saecore.requests import TargetRequest
from saecore.sae.model import SAE


class WordTargets(NamedTuple):
    """The texts and concepts of a request: targets that are the same for every image."""

    texts: Tensor
    """float32 (T, E), each of length 1."""
    concept_latents: Tensor
    """int64 (C, m)."""
    concept_weights: Tensor
    """float32 (C, m)."""
    blank: Tensor
    """float32 (1, E), of length 1: the text that says nothing, for a method that needs it, or (0, E). It is no target."""

    def to(self, device: torch.device) -> "WordTargets":
        """The same targets on another device."""
        return WordTargets(*(tensor.to(device) for tensor in self))


def no_word_targets(sae: SAE) -> WordTargets:
    """Word targets for a request without words."""
    width, device = sae.config.n_inputs, sae.encoder.device
    empty = torch.zeros((0, 1), dtype=torch.int64, device=device)
    texts = torch.zeros((0, width), device=device)
    return WordTargets(texts, empty, empty.float(), blank=texts)


def word_targets(
    sae: SAE, embeddings: np.ndarray, n_texts: int, n_latents: int, positive: bool, blank: np.ndarray | None = None
) -> WordTargets:
    """Text embeddings, float32 (T + C, E) -> targets: the first `n_texts` embeddings are texts, the others are concepts.

    A concept sums at most `n_latents` latents with the weights of `concept_weights`, divided by the sum of their magnitudes.
    blank: (1, E), or (0, E) or None if no method needs it.
    """
    text_embeddings = torch.from_numpy(embeddings)
    n_latents = min(n_latents, sae.config.n_latents)
    words = no_word_targets(sae)._replace(texts=normalize(text_embeddings[:n_texts], dim=-1))
    if blank is not None:
        words = words._replace(blank=normalize(torch.from_numpy(blank), dim=-1))
    concepts = [concept_weights(sae, text, n_latents, positive) for text in text_embeddings[n_texts:]]
    if not concepts:
        return words
    latents, weights = (torch.stack(column) for column in zip(*concepts, strict=True))
    weights = weights / weights.abs().sum(-1, keepdim=True)
    return words._replace(concept_latents=latents, concept_weights=weights)


def concept_weights(sae: SAE, text: Tensor, n_latents: int, positive: bool = False) -> tuple[Tensor, Tensor]:
    """The latents that a word (E,) names -> (latents int64 (m,), weights float32 (m,)), strongest first.

    A weight is the cosine between the word's text embedding and the latent's atom, which is the latent's direction in CLIP's
    space up to the SAE's scale. Weights are signed or, if `positive`, 0 where the cosine is negative.
    """
    cosine = torch.cosine_similarity(sae.atoms, text[None].to(sae.atoms), dim=-1)
    strength = cosine.clamp(min=0) if positive else cosine.abs()
    latents = strength.topk(n_latents).indices
    return latents, cosine[latents].clamp(min=0) if positive else cosine[latents]


class Targets(NamedTuple):
    """The targets of a batch of images."""

    sae: SAE
    latents: Tensor
    """int64 (B, k)."""
    words: WordTargets

    def values(self, embeddings: Tensor) -> Tensor:
        """z for R embeddings of each image: (B, R, E) -> (B, R, n)."""
        B, R, _ = embeddings.shape
        inputs = self.sae.inputs(embeddings.flatten(0, 1)).values.unflatten(0, (B, R)) - self.sae.pre_bias
        latents = self._all_latents(B)
        pre = inputs @ self.sae.encoder.T[latents].mT + self.sae.latent_bias[latents][:, None]
        k = self.latents.shape[1]
        weighted = pre[..., k:].unflatten(-1, self.words.concept_latents.shape) * self.words.concept_weights
        cosines = normalize(embeddings, dim=-1) @ self.words.texts.T
        return torch.cat([pre[..., :k], cosines, weighted.sum(-1)], dim=-1)

    def read_outs(self, embedding: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """Embeddings (B, E) -> w (B, n, E) and c (B, n), such that z = w . e + c.

        Norms are frozen at the image's values. If `exact`, norms are differentiated too, so that w is the true gradient.
        """
        w, c = self.sae.read_outs(self._all_latents(len(embedding)), embedding, exact)
        text_w, text_c = cosine_read_outs(self.words.texts, embedding, exact)
        k, shape, weights = self.latents.shape[1], self.words.concept_latents.shape, self.words.concept_weights
        concept_w = (w[:, k:].unflatten(1, shape) * weights[..., None]).sum(2)
        concept_c = (c[:, k:].unflatten(1, shape) * weights).sum(2)
        return torch.cat([w[:, :k], text_w, concept_w], 1), torch.cat([c[:, :k], text_c, concept_c], 1)

    def _all_latents(self, images: int) -> Tensor:
        """The targets that are latents, then the latents of the concepts, (B, k + C m)."""
        return torch.cat([self.latents, self.words.concept_latents.flatten().expand(images, -1)], dim=1)


def cosine_read_outs(texts: Tensor, embedding: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Texts of length 1 (T, E), embeddings (B, E) -> w (B, T, E) and c (B, T) of their cosines; `exact` as in `Targets`."""
    length = torch.linalg.vector_norm(embedding, dim=-1)[:, None, None]
    unit, texts = embedding[:, None] / length, texts.expand(len(embedding), -1, -1)
    cosine = (texts * unit).sum(-1)
    if not exact:
        return texts / length, torch.zeros_like(cosine)
    return (texts - cosine[..., None] * unit) / length, cosine


class TargetAxis(NamedTuple):
    """The order of the n targets of an image: which latent, text or concept each map explains, and which maps are written.

    First the kept latents of the image, then the latents asked for by number, the texts, the concepts.
    """

    n_kept: int
    """How many kept latents are explained: all k or none."""
    asked: tuple[int, ...]
    """The latents asked for by number."""
    labels: tuple[str, ...]
    """The names of the texts and concepts in the column `target` of MAPS."""

    @classmethod
    def of(cls, request: TargetRequest, k: int) -> "TargetAxis":
        """The axis of a request, where k latents of each image are kept."""
        return cls(k if request.kept else 0, request.latents, tuple(request.labels()))

    def latents(self, kept: Tensor) -> Tensor:
        """Kept latents (B, k) -> the targets that are latents, int64 (B, n_kept + asked)."""
        asked = torch.tensor(self.asked, dtype=torch.int64, device=kept.device)
        return torch.cat([kept[:, : self.n_kept], asked.expand(len(kept), -1)], 1)

    def n_targets(self, latents: np.ndarray) -> int:
        """n, for these targets that are latents, (B, n_kept + asked)."""
        return latents.shape[1] + len(self.labels)

    def written(self, latents: np.ndarray) -> np.ndarray:
        """bool (B, n): whether a target's map is written. A latent that is both kept and asked for has one map, not two."""
        kept, asked = latents[:, : self.n_kept], latents[:, self.n_kept :]
        written = np.ones((len(latents), self.n_targets(latents)), bool)
        written[:, self.n_kept : latents.shape[1]] = ~(asked[:, :, None] == kept[:, None]).any(-1)
        return written

    def columns(self, latents: np.ndarray) -> tuple[pa.Array, pa.Array]:
        """Columns `latent` and `target` of MAPS for all B n targets, image by image. One of the two is null in each row."""
        n_images, n_latents = latents.shape
        padded = np.pad(latents, [(0, 0), (0, len(self.labels))])
        is_label = np.tile(np.arange(padded.shape[1]) >= n_latents, n_images)
        label = pa.array([None] * n_latents + list(self.labels), pa.string())
        of_image = pa.array(np.tile(np.arange(padded.shape[1]), n_images))
        return pa.array(padded.ravel(), pa.int32(), mask=is_label), label.take(of_image)
