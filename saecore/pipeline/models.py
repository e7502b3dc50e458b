"""Models that fit each other: a CLIP, an SAE for its embeddings, and the word targets that the text tower makes.

    addresses -> tower, SAE -> checked against each other -> word targets, if the request has texts or concepts

PyTorch is loaded with the first model: workers that only decode import this module too, and do not wait for PyTorch.
"""

from typing import TYPE_CHECKING

from saecore.methods import BLANK_TEXT, TargetRequest
from saecore.pipeline.config import ExplainConfig, at_once

if TYPE_CHECKING:
    from saecore.relevance.targets import WordTargets
    from saecore.sae.model import SAE
    from saecore.towers.tower import ImageTower


def load_models(clip: str, sae_address: str, site: str = "") -> "tuple[ImageTower, SAE]":
    """CLIP and SAE on the CPU; ValueError if one cannot be loaded, or if they do not fit each other."""
    from saecore.sae.checkpoints import load_embedding_sae
    from saecore.towers.loading import load_tower

    sae, tower = load_embedding_sae(sae_address, site), load_tower(clip)
    check_widths(sae_address, sae, clip, tower)
    return tower, sae


def check_widths(sae_address: str, sae: "SAE", clip: str, tower: "ImageTower") -> None:
    """ValueError if an SAE does not take embeddings as wide as a tower makes them."""
    if sae.config.n_inputs != tower.n_outputs:
        raise ValueError(
            f"{sae_address} takes embeddings of width {sae.config.n_inputs}, and the model {clip} makes them "
            f"{tower.n_outputs} wide: they do not belong together"
        )


def check_latents(request: TargetRequest, sae: "SAE") -> None:
    """ValueError if a latent is asked for by a number that the SAE does not have."""
    if unknown := [latent for latent in request.latents if latent >= sae.config.n_latents]:
        raise ValueError(f"targets latents:{unknown[0]}: this SAE has {sae.config.n_latents} latents, the first is 0")


def load_word_targets(config: ExplainConfig, tower: "ImageTower", sae: "SAE") -> "WordTargets | None":
    """What the model's text tower makes: targets that are texts or concepts, and the embedding of the text that says nothing.

    None if no text tower is needed; ValueError if one is needed and cannot be loaded.
    """
    from saecore.relevance.explain import needs_blank
    from saecore.relevance.targets import word_targets

    request, blank = config.targets, needs_blank(tower, config.methods, config.options)
    if not (request.words or blank):
        return None
    from saecore.towers.loading import load_text_tower
    from saecore.towers.text import embed_texts

    try:
        text_tower = load_text_tower(config.clip)
    except ValueError as error:
        if request.words:
            raise
        reason = "legrad needs the text tower, to find patches that any text lights, unless its option legrad_correction is off"
        raise ValueError(f"{error}; {reason}") from error
    embeddings = embed_texts(text_tower, [*request.words, *[BLANK_TEXT] * blank], at_once(config.batch_size, "cpu"))
    of_words, of_blank = embeddings[: len(request.words)], embeddings[len(request.words) :]
    how = (config.concept_latents, config.concept_positive)
    return word_targets(sae, of_words, len(request.texts), *how, of_blank)
