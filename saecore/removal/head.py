"""A head on a frozen tower that tells from one forward what each patch is worth to the embedding.

    phi_i = the Shapley value of patch i for the vector e(S), the embedding without the patches that are not in S

The head reads what a forward leaves of every layer: the key vectors of all tokens and the query's attention to them, and the
query's last stream. Its first guess is `contrib`'s, what each token adds to the query by attention, as a vector in embedding
space; that holds what the head knows of values. A small transformer over the tokens adds the correction. Completeness is no
matter of training: what the patches lack of e(x) - e(no patches) is divided among them equally, which is the nearest point at
which they add up to it.

    phi = out(transformer(in(LN(k_1) .. LN(k_L), log A, c))) + g c,     c = sum_l A_l v_l W_O' of each token, whitened

Inside, embeddings are whitened: e -> e W with W'W the inverse of the regularised covariance of e(S) - e(no patches).
`saecore.removal.distillation` trains the head; `saecore.removal.saved` keeps it in a folder.

The idea of predicting Shapley values that add up by an equal correction is FastSHAP's (Jethani et al. 2022, arXiv:2107.07436),
and for patches of a transformer that of Covert et al. 2023 (arXiv:2206.05282). Theirs are of classes; these are vectors, whose
read-outs are the Shapley values of all latents and texts.

Shapes: B images, N tokens, P patches, L layers, H heads of the tower, D its width, E embedding width, W the head's width.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from saecore.removal.recipe import HEAD_WIDTH
from saecore.towers.cls_path import by_head
from saecore.towers.stopped import StoppedTower
from saecore.towers.tower import ImageTower, Trace

LEAST_ATTENTION = 1e-3
"""Attention, as a multiple of the mean over tokens, below which the head sees no difference."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What the tensors of a head alone do not say: the tower that it belongs to, its own size, and how it came about."""

    model_sha256: str
    """Of the tower, `ImageTower.sha256`."""
    site: str
    """Where its embedding is: `embedding`, or CLS after a layer."""
    n_layers: int
    """L."""
    n_heads: int
    """H."""
    n_tokens: int
    """N."""
    n_inputs: int
    """D."""
    n_outputs: int
    """E."""
    width: int
    """W."""
    blocks: int
    """Layers of the transformer."""
    source: str = ""
    """The command that trained it."""


def site_of(tower: ImageTower) -> str:
    """Where the embedding of a tower is, in words."""
    return f"layer{tower.start - 1}.residual:cls" if isinstance(tower, StoppedTower) else "embedding"


def config_for(tower: ImageTower, width: int, blocks: int, source: str = "") -> HeadConfig:
    """The configuration of a head for a tower; ValueError for one that has no token of its own, and so nothing to embed where
    no patch is left."""
    check_tower(tower)
    return HeadConfig(
        model_sha256=tower.sha256(),
        site=site_of(tower),
        n_layers=len(tower.path()),
        n_heads=tower.n_heads,
        n_tokens=tower.n_own + tower.grid[0] * tower.grid[1],
        n_inputs=tower.vision.config.hidden_size,
        n_outputs=tower.n_outputs,
        width=width,
        blocks=blocks,
        source=source,
    )


def check_tower(tower: ImageTower) -> None:
    """ValueError for a tower that has no embedding without patches."""
    if not tower.n_own:
        raise ValueError(
            "this model has no token but its patches, so there is no embedding without patches to begin at"
        )


def check_belongs(config: HeadConfig, tower: ImageTower) -> None:
    """ValueError for a head that was trained on another tower, or for another site of it."""
    check_tower(tower)
    if config.site != site_of(tower):
        raise ValueError(f"it was trained for {config.site}, and the SAE reads {site_of(tower)}")
    if config.model_sha256 != (own := tower.sha256()):
        raise ValueError(
            f"it was trained on the model {config.model_sha256[:16]}, and this one is {own[:16]}: they do not belong together"
        )


class Head(nn.Module):
    """See the head of this file."""

    empty: Tensor
    whiten: Tensor
    unwhiten: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        D, E, W = config.n_inputs, config.n_outputs, config.width
        self.enter = nn.Linear(config.n_layers * (D + config.n_heads) + E, W)
        self.of_query = nn.Linear(D, W)
        self.position = nn.Parameter(0.02 * torch.randn(config.n_tokens, W))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                W, W // HEAD_WIDTH, 3 * W, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(W)
        self.leave = nn.Linear(W, E)
        nn.init.zeros_(self.leave.weight)  # the head begins as `contrib` does
        nn.init.zeros_(self.leave.bias)
        self.gate = nn.Parameter(torch.ones(E))
        self.register_buffer("empty", torch.zeros(E))
        self.register_buffer("whiten", torch.eye(E))
        self.register_buffer("unwhiten", torch.eye(E))

    def forward(self, tower: ImageTower, trace: Trace, embedding: Tensor) -> Tensor:
        """One forward, with all layers and their keys in its trace, and its embedding (B, E) -> phi, float32 (B, P, E).

        phi.sum(1) is the embedding less `empty`, whatever the weights are.
        """
        return completed(self.whitened(tower, trace) @ self.unwhiten, embedding - self.empty)

    def whitened(self, tower: ImageTower, trace: Trace) -> Tensor:
        """phi in whitened coordinates, (B, P, E), before it is completed."""
        c = contributions(tower, trace, self.whiten)
        keys = [_normed(k) for k in trace.keys]
        attention = torch.cat(trace.query_attention, 1).transpose(1, 2)  # B N LH
        logs = (attention * attention.shape[1]).clamp(min=LEAST_ATTENTION).log()
        x = self.enter(torch.cat([*keys, logs, c], -1)) + self.position
        x = torch.cat([x[:, :1] + self.of_query(_normed(trace.query_final))[:, None], x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        phi: Tensor = self.leave(self.norm(x)) + self.gate * c
        return phi[:, tower.n_own :]


def completed(phi: Tensor, total: Tensor) -> Tensor:
    """Vectors (B, P, E), each by the same amount nearer to or farther from zero, so that they add up to `total` (B, E)."""
    return phi + ((total - phi.sum(1)) / phi.shape[1])[:, None]


def contributions(tower: ImageTower, trace: Trace, basis: Tensor) -> Tensor:
    """What each token adds to the embedding by the query's attention, in all layers: e . basis of it, float32 (B, N, E).

    The final LayerNorm is frozen, as for `contrib` (`saecore.relevance.maps`), whose maps are read-outs of these vectors.
    """
    weighted = [
        (by_head(v, tower.n_heads) * A.transpose(1, 2).unsqueeze(-1).to(v.dtype)).flatten(2)
        for v, A in zip(trace.values, trace.query_attention, strict=True)
    ]
    # One product for all layers adds them up.
    added = torch.cat(weighted, -1) @ torch.cat([layer.out for layer in tower.path()], 1).T
    direction, _ = tower.pull_back(basis.T[None], trace.query_final)
    return added.float() @ direction.mT


def nothing(tower: ImageTower) -> Tensor:
    """The embedding without any patch, float32 (E,): of the tower's own tokens, which no picture changes."""
    check_tower(tower)
    blank = torch.zeros((1, *tower.preprocess.size, 3), dtype=torch.uint8, device=tower.mean.device)
    return tower.embed_tokens(tower.first_tokens(blank)[:, : tower.n_own])[0]


def _normed(x: Tensor) -> Tensor:
    return layer_norm(x.float(), x.shape[-1:])
