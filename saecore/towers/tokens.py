"""An image tower as far as a layer, for SAEs that read its tokens there: the residual streams of all of them.

    x_t after layer l, t = 0..N-1          (layer l of transformers' `encoder.layers`, which is `hidden_states[l + 1]`)

Every token is computed in every layer, the last one too, and nothing above it. This holds for CLIP and for SigLIP, whose tokens
are all patches. The tokens that a site reads are all of them, or the patches; the others are computed, since patches look at
them.

The trace keeps what each token was on its way, since which tokens are explained is known only after the SAE has read them.
`Trace` of `saecore.towers.tower` keeps that of one query.

Shapes as in `saecore.towers.tower`; here E = D, and Q queries are tokens that are explained.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saecore.towers.stopped import check_layer, until
from saecore.towers.tower import ImageTower, PathLayer, encoder_path, outliers


class TokenTrace(NamedTuple):
    """What one forward leaves for maps of tokens: lists with an entry for each of the last layers, first of them first."""

    entering: list[Tensor]
    """(B, N, D) residual streams that enter the layer."""
    after: list[Tensor]
    """(B, N, D) the same between attention and MLP."""
    leaving: Tensor
    """(B, N, D) the same where they leave the last layer."""
    q: list[Tensor]
    """(B, N, D), as k and v."""
    k: list[Tensor]
    v: list[Tensor]
    sinks: Tensor
    """bool (B, P): see `saecore.towers.tower.Trace`."""


class TokenTower(ImageTower):
    """The layers 0 to `layer` of a tower. It shares the modules of the whole tower, in whatever precision they are."""

    looks_from = 0

    def __init__(self, whole: ImageTower, layer: int, reads: str) -> None:
        super().__init__(until(whole.vision, layer), whole.preprocess)
        self.n_own = whole.n_own
        self.n_outputs = whole.vision.config.hidden_size
        self.reads_from = self.n_own if reads == "patches" else 0
        """The first token that the site reads; it reads all that follow."""
        self.whole = whole
        self.start = layer + 1
        """The layer of the whole tower that comes next."""

    def run_in(self, dtype: torch.dtype) -> None:
        """See `ImageTower.run_in`: the whole tower, so that its embedding can be had too."""
        self.whole.run_in(dtype)

    def first_tokens(self, pixels: Tensor) -> Tensor:
        """See `ImageTower.first_tokens`."""
        tokens: Tensor = self.vision.embeddings(self.normalise(pixels))
        return self.vision.pre_layrnorm(tokens) if self.n_own else tokens

    def path(self) -> list[PathLayer]:
        """See `ImageTower.path`: every layer, as any token passes through it."""
        return encoder_path(self.vision)

    def streams(self, pixels: Tensor, layers: int) -> tuple[Tensor, TokenTrace]:
        """uint8 pixels (B, height, width, 3) -> residual streams of all tokens, float32 (B, N, D), and the trace of the last
        `layers` layers."""
        trace = TokenTrace([], [], torch.empty(0), [], [], [], torch.empty(0))
        norms = []
        for index, step in enumerate(self._steps(self.first_tokens(pixels), whole=True)):
            if index >= self.n_layers // 2:
                patches = step.entering[:, self.n_own :]
                norms.append(torch.linalg.vector_norm(patches, dim=-1, dtype=torch.float32))
            if index + layers >= self.n_layers:
                for kept, made in (
                    (trace.entering, step.entering),
                    (trace.after, step.after),
                    (trace.q, step.q),
                    (trace.k, step.k),
                    (trace.v, step.v),
                ):
                    kept.append(made)
        return step.leaving.float(), trace._replace(leaving=step.leaving, sinks=outliers(norms))

    def embed(self, pixels: Tensor) -> Tensor:
        """The streams of the tokens that the site reads, float32 (B, T, D)."""
        return self.embed_tokens(self.first_tokens(pixels))[:, self.reads_from :]

    def embed_tokens(self, tokens: Tensor, start: int = 0) -> Tensor:
        """First tokens (B, n, D), any of them -> their streams, float32 (B, n, D)."""
        for step in self._steps(tokens, whole=True, start=start):
            tokens = step.leaving
        return tokens.float()

    def attention(self, q: Tensor, k: Tensor) -> Tensor:
        """softmax(s q k') of queries (B, Q, D) over keys (B, N, D): float32 (B, H, Q, N)."""
        q_BHQd, k_BHNd = (x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2).float() for x in (q, k))
        return torch.softmax(q_BHQd @ k_BHNd.mT * self.scale, dim=-1)

    def sha256(self) -> str:
        """Hash of the whole tower: it names the model, and an SAE's site names the layer."""
        return self.whole.sha256()


def tokens_at(tower: ImageTower, layer: int, reads: str) -> TokenTower:
    """The tower as far as a layer, counted from 0, for a site that `reads` patches or all tokens; ValueError if it has no such
    layer."""
    check_layer(tower, layer)
    return TokenTower(tower, layer, reads)
