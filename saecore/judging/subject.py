"""What is judged: a model, an SAE and methods. It shows the targets of pictures, their maps, and what is left without patches.

    pixels -> Subject.show -> targets, maps by every method, `Shown.remove`

The same maps as a run makes, before they are rounded to 8 bits; of an SAE that reads one vector of a picture, or its tokens.

Shapes: B images, n targets = the latents of each image, then texts and concepts, P patches.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from saecore.methods import DEFAULT_OPTIONS, Options
from saecore.relevance.explain import explain_forward, trace_needs
from saecore.relevance.maps import Maps
from saecore.relevance.pooling import Pooled, pool_tokens
from saecore.relevance.targets import Targets, WordTargets, no_word_targets
from saecore.relevance.tokens import explain_tokens, layers_needed, token_targets
from saecore.removal.head import Head
from saecore.removal.ways import Removal, removal
from saecore.sae.model import SAE
from saecore.towers.tokens import TokenTower
from saecore.towers.tower import ImageTower


class Shown(NamedTuple):
    """The targets of B pictures."""

    latents: Tensor
    """int64 (B, n without the words)."""
    fires: Tensor
    """bool (B, n): whether the latent fires for the image, so that there is something to explain; a word always does."""
    values: Tensor
    """float32 (B, n): z, with all normalisers."""
    maps: dict[str, Maps]
    sinks: Tensor
    """bool (B, P)."""
    remove: Callable[[str], Removal]
    """By a way of `saecore.removal.ways`, what is left of these targets in these pictures."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A tower, an SAE, and the methods that explain what it reads."""

    tower: ImageTower
    sae: SAE
    methods: tuple[str, ...]
    options: Options = DEFAULT_OPTIONS
    pool: str = ""
    """How an SAE that reads tokens pools them."""
    words: WordTargets | None = None
    head: Head | None = None
    """What the method removal predicts with."""

    @property
    def least(self) -> int:
        """How many patches must stay, so that there is something to compute."""
        return 0 if self.tower.n_own else 1

    def show(self, pixels: Tensor, latents: Tensor | None = None, strongest: int = 16) -> Shown:
        """Pixels uint8 (B, height, width, 3) -> their targets: the `strongest` latents of each, or given ones, int64 (B, k)."""
        if isinstance(self.tower, TokenTower):
            return self._tokens(self.tower, pixels, latents, strongest)
        embedding, trace = self.tower(pixels, **trace_needs(self.methods, self.options, len(self.tower.path())))
        code = self.sae.encode_sparse(embedding, at_least=strongest)
        if latents is None:
            latents = code.latents[:, :strongest]
        targets = Targets(self.sae, latents, self.words or no_word_targets(self.sae))
        how = (self.methods, self.tower, pixels, embedding, trace, targets, self.options)
        maps = explain_forward(*how, head=self.head)
        values = targets.values(embedding[:, None])[:, 0]
        active = code.dense(self.sae.config.n_latents).gather(1, latents) != 0
        fires = torch.cat([active, torch.ones_like(values[:, latents.shape[1] :], dtype=torch.bool)], 1)
        return Shown(
            latents, fires, values, maps, trace.sinks, lambda way: removal(way, self.tower, pixels, targets.values)
        )

    def _tokens(self, tower: TokenTower, pixels: Tensor, latents: Tensor | None, strongest: int) -> Shown:
        streams, trace = tower.streams(pixels, layers_needed(self.methods, self.options, tower.n_layers))
        code = self._pooled(streams[:, tower.reads_from :], latents, strongest)
        targets = token_targets(self.sae, tower, streams, code, self.pool)
        maps = explain_tokens(self.methods, tower, pixels, streams, trace, targets, code, self.options)
        values, fires = targets.whole(streams), code.pooled != 0
        return Shown(
            code.latents, fires, values, maps, trace.sinks, lambda way: removal(way, tower, pixels, targets.values)
        )

    def _pooled(self, streams: Tensor, latents: Tensor | None, strongest: int) -> Pooled:
        """The strongest latents, or given ones, which differ from image to image: then one image at a time."""
        none = streams.new_zeros(0, dtype=torch.int64)
        if latents is None:
            return pool_tokens(self.sae, streams, self.pool, strongest, none)
        each = [pool_tokens(self.sae, one[None], self.pool, 0, own) for one, own in zip(streams, latents, strict=True)]
        return Pooled(*(torch.cat(parts) for parts in zip(*each, strict=True)))
