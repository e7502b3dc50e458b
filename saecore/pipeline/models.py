"""Models that fit each other: a CLIP, an SAE for its embeddings, and the word targets that the text tower makes.

    addresses -> tower, SAE -> checked against each other -> word targets, if the request has texts or concepts

PyTorch is loaded with the first model: workers that only decode import this module too, and do not wait for PyTorch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from saecore.methods import BLANK_TEXT, METHODS, REMOVAL
from saecore.pipeline.config import ExplainConfig, at_once
from saecore.requests import TargetRequest
from saecore.sae import sites
from saecore.untrusted import about

if TYPE_CHECKING:
    from saecore.relevance.targets import WordTargets
    from saecore.removal.head import Head
    from saecore.sae.model import SAE
    from saecore.towers.tower import ImageTower


def load_models(clip: str, sae_address: str, site: str = "") -> "tuple[ImageTower, SAE]":
    """CLIP as far as the SAE's site, and the SAE, on the CPU; ValueError if one cannot be loaded, or if they do not fit each
    other."""
    from saecore.sae.checkpoints import load_running_sae
    from saecore.towers.loading import load_tower

    sae = load_running_sae(sae_address, site)
    return tower_at(sae_address, sae, clip, load_tower(clip)), sae


def tower_at(sae_address: str, sae: "SAE", clip: str, tower: "ImageTower") -> "ImageTower":
    """The tower whose embedding is what the SAE reads: as it is, or stopped at the site's layer.

    ValueError if the model has no such site, or if the SAE takes vectors of another width.
    """
    site = sites.parse(sae.config.site)
    try:
        tower = as_far_as(site, tower)
    except ValueError as error:
        raise ValueError(f"{sae_address} reads {site}, which the model {clip} does not have: {error}") from None
    if sae.config.n_inputs != tower.n_outputs:
        what = "embeddings" if site.layer is None else f"vectors ({site})"
        raise ValueError(
            f"{sae_address} takes {what} of width {sae.config.n_inputs}, and the model {clip} makes them "
            f"{tower.n_outputs} wide: they do not belong together"
        )
    return tower


def as_far_as(site: sites.Site, tower: "ImageTower") -> "ImageTower":
    """The tower whose embedding is what there is at a site; ValueError if it has no such site."""
    from saecore.towers.stopped import stopped_at
    from saecore.towers.tokens import tokens_at

    if site.layer is None:
        return tower
    return stopped_at(tower, site.layer) if site.tokens == "cls" else tokens_at(tower, site.layer, site.tokens)


def vectors_at(site: sites.Site, tower: "ImageTower") -> int:
    """How many vectors of each image there are at a site of a tower."""
    of = {"patches": tower.grid[0] * tower.grid[1]}
    of["all"] = of["patches"] + tower.n_own
    return of.get(site.tokens, 1)


def check_words(request: TargetRequest, site: str) -> None:
    """ValueError if texts or concepts are asked for where the SAE does not read the space that images and texts share."""
    if request.words and sites.parse(site).layer is not None:
        raise ValueError(
            f"targets {request.words[0]!r}: the SAE reads {site}, inside the tower, and a text has no place there; texts and "
            "concepts need an SAE that reads the image embedding"
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

    check_words(config.targets, sae.config.site)
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


def head_for(clip: str, methods: Sequence[str], head: str) -> str:
    """The address of the head that methods need, as given; of the embedded model it is known. Empty if none needs one."""
    if any(METHODS[name].needs_head for name in methods):
        return head or ("demo" if clip == "demo" else "")
    if head:
        raise ValueError(f"head {head}: only the method {REMOVAL} takes one")
    return ""


def load_fitting_head(address: str, methods: Sequence[str], tower: "ImageTower") -> "Head | None":
    """The head that methods need; None if none needs one. ValueError if it is not there, or belongs to another tower."""
    from saecore.relevance.explain import check_head
    from saecore.removal.saved import load_head

    if not address:
        check_head(tower, methods, None)
        return None
    try:
        head = load_head(address)
        with about(address):
            check_head(tower, methods, head)
    except ValueError as error:
        raise ValueError(f"head {error}") from error
    return head
