"""One vector for each patch holds the Shapley values of all read-outs: by the definition, over all subsets, in float64."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saecore.methods import Options
from saecore.relevance.explain import explain_latents
from saecore.relevance.maps import completeness_error
from saecore.relevance.targets import Targets, WordTargets, word_targets
from saecore.removal.ways import dropping
from saecore.sae.model import SAE
from saecore.towers.tower import ImageTower
from tests.helpers.towers import random_pixels, random_sae, random_tower

P = 9

LATENTS = torch.tensor([[3, 17, 40]])


def model(normalise: str = "none") -> tuple[ImageTower, SAE, Tensor, WordTargets]:
    """A tower of 3 x 3 patches, an SAE, one image, a text and a concept."""
    _, tower = random_tower(image_size=24)
    plain = random_sae()
    sae = SAE(dataclasses.replace(plain.config, normalise=normalise)).requires_grad_(False)
    sae.load_state_dict(plain.state_dict())
    texts = torch.randn(2, tower.n_outputs, generator=torch.Generator().manual_seed(6)).numpy()
    return tower, sae, random_pixels(tower, 1), word_targets(sae, texts, n_texts=1, n_latents=5, positive=False)


def of_all_subsets(tower: ImageTower, pixels: Tensor) -> dict[frozenset[int], Tensor]:
    """The embedding of every subset of the patches."""
    remove = dropping(tower, pixels, lambda embeddings: embeddings)
    return {
        frozenset(kept): remove(torch.tensor(kept, dtype=torch.int64)[None, None])[0, 0]
        for size in range(P + 1)
        for kept in itertools.combinations(range(P), size)
    }


def by_definition(value: dict[frozenset[int], np.ndarray]) -> np.ndarray:
    """The Shapley values of a game whose values are vectors (n,): float64 (P, n)."""
    found = []
    for patch in range(P):
        gains = [
            math.factorial(len(S))
            * math.factorial(P - len(S) - 1)
            / math.factorial(P)
            * (value[S | {patch}] - value[S])
            for S in value
            if patch not in S
        ]
        found.append(np.sum(gains, axis=0))
    return np.stack(found)


@torch.inference_mode()
def games(normalise: str) -> tuple[np.ndarray, np.ndarray]:
    """Of three latents, a text with its norm frozen, and a concept, (P, 5): read-outs of the embedding's values, and the values
    of each target as a game of its own."""
    tower, sae, pixels, words = model(normalise)
    embeddings = of_all_subsets(tower, pixels)
    whole, targets = embeddings[frozenset(range(P))], Targets(sae, LATENTS, words)
    w, _ = targets.read_outs(whole[None])
    of_vectors = by_definition({S: e.double().numpy() for S, e in embeddings.items()}) @ w[0].double().numpy().T

    def values(e: Tensor) -> np.ndarray:
        z = targets.values(e[None, None])[0, 0].double()
        z[3] = (words.texts[0] @ e) / torch.linalg.vector_norm(whole)
        return z.numpy()

    return of_vectors, by_definition({S: values(e) for S, e in embeddings.items()})


def test_read_outs_of_one_vector_are_the_values_of_latents_texts_and_concepts() -> None:
    of_vectors, of_each = games("none")
    assert np.abs(of_vectors - of_each).max() < 1e-5 * np.abs(of_each).max()


@pytest.mark.parametrize("normalise", ["layer_norm", "constant_norm"])
def test_a_normaliser_of_each_sample_is_the_limit(normalise: str) -> None:
    """It is another for each subset, and frozen in a read-out: so the two differ, but for the text, which passes none."""
    of_vectors, of_each = games(normalise)
    apart = np.abs(of_vectors - of_each).max(0) / np.abs(of_each).max(0)
    assert apart[[0, 1, 2, 4]].min() > 0.01
    assert apart[3] < 1e-5


def test_the_method_is_near_the_definition_and_adds_up() -> None:
    tower, sae, pixels, words = model()
    of_vectors, _ = games("none")
    with torch.inference_mode():
        maps = explain_latents(tower, sae, pixels, LATENTS, ("shapley",), Options(subsets=4000), words)["shapley"]
        z = Targets(sae, LATENTS, words).values(tower.embed(pixels)[:, None])[:, 0]
    assert maps.standard_error is not None
    assert completeness_error(maps, z).max() < 1e-5
    error = maps.standard_error[0].numpy()
    assert np.abs(maps.relevance[0].numpy() - of_vectors.T).max() < 6 * error.max()
    assert error.max() < 0.05 * np.abs(of_vectors).max()
