"""Pixels -> everything a run says about an image, as NumPy arrays: CLIP, SAE and maps for one batch on one device.

Shapes: B images, E embedding width, k kept latents, P patches.
"""

from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from saecore import relevance
from saecore.clip import ImageTower
from saecore.sae import SAE

METHODS = {
    "contrib": relevance.contrib,
    "contrib_grad": relevance.contrib_grad,
    "chefer": relevance.chefer,
    "legrad": relevance.legrad,
    "gradeclip": relevance.gradeclip,
    "attention": relevance.attention,
}
"""How maps can be computed."""

NEED_KEYS = ("contrib_grad", "gradeclip")
"""Methods that look at keys, which a trace holds on demand."""

INT8_MAX = 127


class Findings(NamedTuple):
    """What was found in B images; the columns of the tables that a run writes."""

    embedding: np.ndarray
    """float32 (B, E), not L2-normalised."""
    l0: np.ndarray
    """int32 (B,)."""
    cosine: np.ndarray
    """float32 (B,)."""
    fvu: np.ndarray
    """float32 (B,)."""
    completeness: np.ndarray
    """float32 (B,): the worst of the image's maps, before rounding to 8 bits."""
    latent: np.ndarray
    """int32 (B, k), strongest first."""
    activation: np.ndarray
    """float32 (B, k)."""
    pre_activation: np.ndarray
    """float32 (B, k)."""
    map: np.ndarray
    """int8 (B, k, P): relevance / scale."""
    scale: np.ndarray
    """float32 (B, k)."""
    remainder: np.ndarray
    """float32 (B, k)."""
    sink_share: np.ndarray
    """float32 (B, k)."""


class Embedded(NamedTuple):
    """What `Embedder` finds."""

    embedding: np.ndarray
    """float32 (B, E), not L2-normalised."""


Found = TypeVar("Found", Embedded, Findings)


class _OnDevice(Generic[Found]):
    """CLIP on its device: bfloat16 on CUDA, float32 on the CPU. What else a batch needs, and finds, is the subclass's."""

    def __init__(self, tower: ImageTower, device: str) -> None:
        self.device = torch.device(device)
        self.tower = tower.to(self.device)
        if self.device.type == "cuda":
            self.tower.run_in(torch.bfloat16)

    def __call__(self, pixels: np.ndarray) -> Found:
        """uint8 (B, height, width, 3), B of any size, none included."""
        if not len(pixels):  # the shapes and types of nothing are those of something, cut to none
            found = self(np.zeros((1, *pixels.shape[1:]), np.uint8))
            return type(found)(*(column[:0] for column in found))
        with torch.inference_mode():
            # .copy(): Arrow's buffers are read-only, which PyTorch refuses to share.
            return self._find(torch.from_numpy(pixels.copy()).to(self.device, non_blocking=True))

    def _find(self, pixels: torch.Tensor) -> Found:
        raise NotImplementedError


class Embedder(_OnDevice[Embedded]):
    """CLIP alone."""

    def _find(self, pixels: torch.Tensor) -> Embedded:
        return Embedded(self.tower.embed(pixels).cpu().numpy())


class Inference(_OnDevice[Findings]):
    """CLIP, SAE and method. SAE and sums of maps are in float32 everywhere."""

    def __init__(self, tower: ImageTower, sae: SAE, k: int, method: str, device: str) -> None:
        super().__init__(tower, device)
        self.sae = sae.to(self.device)
        self.method = METHODS[method]
        self.needs_keys = method in NEED_KEYS
        self.k = k

    def _find(self, pixels: torch.Tensor) -> Findings:
        embedding, trace = self.tower(pixels, keys=self.needs_keys)
        code = self.sae.encode_sparse(embedding, at_least=self.k)
        reconstruction = self.sae.decode_sparse(code.latents, code.activations, embedding)
        latents, pre_activations = code.latents[:, : self.k], code.pre_activations[:, : self.k]
        maps = self.method(self.tower, trace, *self.sae.read_outs(latents, embedding))
        scale = maps.relevance.abs().amax(-1) / INT8_MAX
        rounded = (maps.relevance / scale.clamp(min=torch.finfo(scale.dtype).tiny)[..., None]).round().to(torch.int8)
        squared_error = (embedding - reconstruction).square().sum(-1)
        found = {
            "embedding": embedding,
            "l0": (code.activations != 0).sum(-1, dtype=torch.int32),
            "cosine": torch.cosine_similarity(embedding, reconstruction),
            "fvu": squared_error / (embedding - self.sae.mean).square().sum(-1),
            "completeness": relevance.completeness_error(maps, pre_activations).amax(-1),
            "latent": latents.int(),
            "activation": code.activations[:, : self.k],
            "pre_activation": pre_activations,
            "map": rounded,
            "scale": scale,
            "remainder": maps.remainder,
            "sink_share": relevance.sink_share(maps, trace.sinks),
        }
        return Findings(**{name: tensor.cpu().numpy() for name, tensor in found.items()})
