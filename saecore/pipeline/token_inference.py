"""Pixels -> all that a run computes about an image, where the SAE reads the tokens of a layer.

    pixels -> streams of all tokens -> kept latents (SAE, pooled) -> maps of the targets (methods) -> 8 bits a patch

Shapes: B images, k kept latents, M methods, n targets of maps, P patches.
"""

import torch

from saecore import heatmaps
from saecore.methods import DEFAULT_OPTIONS, METHODS, Options
from saecore.pipeline.inference import Inferred, OnDevice, image_embedding, worst_error
from saecore.relevance.agreement import peak_distance, rank_correlation
from saecore.relevance.maps import Maps, sink_share
from saecore.relevance.targets import TargetAxis
from saecore.relevance.tokens import explain_pooled
from saecore.requests import KEPT, TargetRequest
from saecore.sae.model import SAE
from saecore.towers.tokens import TokenTower


class TokenInference(OnDevice[Inferred]):
    """A tower as far as a layer, an SAE for its tokens, and methods. The SAE and the sums of maps are in float32."""

    def __init__(
        self,
        tower: TokenTower,
        sae: SAE,
        k: int,
        methods: tuple[str, ...],
        device: str,
        pool: str,
        request: TargetRequest = KEPT,
        options: Options = DEFAULT_OPTIONS,
        precision: str = "auto",
        embeddings: bool = False,
    ) -> None:
        super().__init__(tower, device, methods, precision)
        self.tokens, self.embeddings = tower, embeddings
        self.sae = sae.to(self.device)
        self.k, self.methods, self.pool, self.options = k, methods, pool, options
        self.axis = TargetAxis.of(request, k)

    def _infer(self, pixels: torch.Tensor) -> Inferred:
        tower, k = self.tokens, self.k
        how = (self.pool, k, self.axis, self.options)
        trace, code, values, first, by_method = explain_pooled(self.methods, tower, self.sae, pixels, *how)
        maps = list(by_method.values())
        stored, scale = heatmaps.encode(torch.stack([m.relevance for m in maps], 1))
        at_patches = code.at_tokens[..., tower.n_own - tower.reads_from :]
        columns = {
            "embedding": image_embedding(tower, trace.leaving) if self.embeddings else values[:, :0],
            "l0": code.l0,
            "cosine": code.cosine,
            "fvu": code.fvu,
            "completeness": worst_error(by_method, values[:, first:]),
            "sinks": trace.sinks,
            "latent": code.latents[:, :k].int(),
            "activation": code.pooled[:, :k],
            "pre_activation": values[:, :k],
            "patch": _patch(code.at_tokens[:, :k], tower, self.pool),
            "patches": (at_patches[:, :k] != 0).sum(-1, dtype=torch.int32),
            "target_latent": code.latents[:, first:].int(),
            "map": stored,
            "scale": scale,
            "map_pre_activation": values[:, first:],
            "remainder": torch.stack([m.remainder for m in maps], 1),
            "sink_share": torch.stack([sink_share(m, trace.sinks) for m in maps], 1),
            "standard_error": values[:, :0],
            **self._agreement(by_method, at_patches[:, first:]),
        }
        return Inferred(**{name: tensor.cpu().numpy() for name, tensor in columns.items()})

    def _agreement(self, by_method: dict[str, Maps], active: torch.Tensor) -> dict[str, torch.Tensor]:
        """How far each cause lies from the activation, (B, M, n); NaN of what is no cause."""
        grid, none = self.tokens.grid, torch.full_like(active[..., 0], torch.nan)
        causes = [m.relevance if METHODS[name].is_cause else None for name, m in by_method.items()]
        return {
            "rank_correlation": torch.stack([none if m is None else rank_correlation(m, active) for m in causes], 1),
            "peak_distance": torch.stack([none if m is None else peak_distance(m, active, grid) for m in causes], 1),
        }


def _patch(at_tokens: torch.Tensor, tower: TokenTower, pool: str) -> torch.Tensor:
    """Activations (B, k, T) -> int32 (B, k): see `Inferred.patch`."""
    sizes = at_tokens.abs()
    patch = sizes.argmax(-1) + tower.reads_from - tower.n_own
    nowhere = (sizes.amax(-1) == 0) | (patch < 0) | (pool == "cls")
    return patch.masked_fill(nowhere, -1).int()
