"""Pixels -> all that a run computes about an image, as NumPy arrays: CLIP, SAE and maps for one batch on one device.

    pixels -> embedding, trace (CLIP) -> kept latents, reconstruction (SAE) -> maps of the targets (methods) -> 8 bits a patch

Shapes: B images, E embedding width, k kept latents, M methods, n targets of maps, P patches.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from saecore import heatmaps
from saecore.methods import DEFAULT_OPTIONS, METHODS, Options, dtype_of
from saecore.relevance.explain import explain_forward, trace_needs
from saecore.relevance.maps import Maps, completeness_error, sink_share
from saecore.relevance.targets import TargetAxis, Targets, WordTargets, no_word_targets
from saecore.removal.head import Head
from saecore.requests import KEPT, TargetRequest
from saecore.sae.model import SAE, Code
from saecore.towers.stopped import StoppedTower
from saecore.towers.tokens import TokenTower
from saecore.towers.tower import ImageTower


class Inferred(NamedTuple):
    """Columns of a run's tables for B images."""

    embedding: np.ndarray
    """float32 (B, E), not L2-normalised; where the SAE reads CLS after a layer and no embeddings are asked for, CLS there."""
    l0: np.ndarray
    """int32 (B,)."""
    cosine: np.ndarray
    """float32 (B,)."""
    fvu: np.ndarray
    """float32 (B,)."""
    completeness: np.ndarray
    """float32 (B,): the worst error of the image's maps, before rounding to 8 bits; NaN if no method decomposes."""
    sinks: np.ndarray
    """bool (B, P): patches flagged as sinks."""
    latent: np.ndarray
    """int32 (B, k): the kept latents, strongest first."""
    activation: np.ndarray
    """float32 (B, k)."""
    pre_activation: np.ndarray
    """float32 (B, k)."""
    target_latent: np.ndarray
    """int32 (B, n without the word targets): the targets that are latents, see `TargetAxis`."""
    map: np.ndarray
    """int8 (B, M, n, P): relevance / scale."""
    scale: np.ndarray
    """float32 (B, M, n)."""
    map_pre_activation: np.ndarray
    """float32 (B, n): the targets' values, to which a map and its remainder add up."""
    remainder: np.ndarray
    """float32 (B, M, n)."""
    sink_share: np.ndarray
    """float32 (B, M, n)."""
    standard_error: np.ndarray
    """float32 (B, M, n): of a map's values, root mean square over patches; NaN if the method does not sample. (B, 0) of an
    SAE that reads tokens."""

    # Of an SAE that reads tokens; of others (B, 0).
    patch: np.ndarray
    """int32 (B, k): the patch where the latent is most active; -1 if that is no patch, or if it fires at no token."""
    patches: np.ndarray
    """int32 (B, k): at how many patches it fires."""
    rank_correlation: np.ndarray
    """float32 (B, M, n): between a map and the latent's activation at each patch; NaN where it is not defined."""
    peak_distance: np.ndarray
    """float32 (B, M, n): between their largest values, in patches; likewise."""


class Embedded(NamedTuple):
    """The column of embeddings for B images."""

    embedding: np.ndarray
    """float32 (B, E), not L2-normalised."""


Columns = TypeVar("Columns", bound=Any)
"""A NamedTuple of NumPy arrays, each with a row for every image."""


def bfloat16_gain(rounds: int = 4) -> float:
    """How many times as fast this machine's processor multiplies matrices in bfloat16 as in float32; it takes about 0.1 s.

    This is measured, since instructions do not tell: with those of AVX-512 BF16, a Zen 4 of AMD gained 2.1 times, and a Xeon of
    Intel whose AMX was not to be had lost (0.55 times). Without instructions PyTorch computes all the same.
    """
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        # Half of a product of L/14's layers for one image.
        a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(2048, 1024, dtype=dtype)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return seconds[0] / seconds[1]


class OnDevice(Generic[Columns]):
    """CLIP on its device, in the precision that `dtype_of` says. A subclass computes the columns."""

    def __init__(self, tower: ImageTower, device: str, methods: Sequence[str] = (), precision: str = "auto") -> None:
        self.device = torch.device(device)
        self.tower = tower.to(self.device)
        if dtype_of(self.device.type, methods, precision) == "bfloat16":
            self.tower.run_in(torch.bfloat16)
        self._most = sys.maxsize
        """Images at once for which the device's memory is known to suffice, once it did not for more."""

    def in_batches(self, pixels: np.ndarray, batch_size: int) -> list[Columns]:
        """Pixels of any number of images -> the columns of each batch, at least one.

        If the memory of a GPU does not suffice for a batch, it is halved, and so are those that come later.
        torch.OutOfMemoryError if one image is too much.
        """
        batches, start = list[Columns](), 0
        while not batches or start < len(pixels):
            batch = pixels[start : start + min(batch_size, self._most)]
            try:
                batches.append(self(batch))
                start += len(batch)
                continue
            except torch.OutOfMemoryError:
                if len(batch) <= 1:
                    raise
            # Not in the handler: the traceback holds what the batch had made.
            self._most = len(batch) // 2
            torch.cuda.empty_cache()
            told = f"the GPU's memory does not suffice for {len(batch)} images at once: {self._most} from now on"
            print(told, file=sys.stderr, flush=True)
        return batches

    def __call__(self, pixels: np.ndarray) -> Columns:
        """Pixels, uint8 (B, height, width, 3), -> columns. B may be 0."""
        if not len(pixels):  # Empty batch: run one blank image and keep zero rows.
            blank = self(np.zeros((1, *pixels.shape[1:]), np.uint8))
            empty: Columns = type(blank)(*(column[:0] for column in blank))
            return empty
        with torch.inference_mode():
            # .copy(), because Arrow's buffers are read-only, and PyTorch does not share such memory.
            return self._infer(torch.from_numpy(pixels.copy()).to(self.device, non_blocking=True))

    def _infer(self, pixels: torch.Tensor) -> Columns:
        raise NotImplementedError


class Embedder(OnDevice[Embedded]):
    """CLIP without an SAE."""

    def _infer(self, pixels: torch.Tensor) -> Embedded:
        return Embedded(self.tower.embed(pixels).cpu().numpy())


class Inference(OnDevice[Inferred]):
    """CLIP, SAE and methods. The SAE and the sums of maps are in float32 on every device."""

    def __init__(
        self,
        tower: ImageTower,
        sae: SAE,
        k: int,
        methods: Sequence[str],
        device: str,
        request: TargetRequest = KEPT,
        words: WordTargets | None = None,
        options: Options = DEFAULT_OPTIONS,
        precision: str = "auto",
        embeddings: bool = False,
        head: Head | None = None,
    ) -> None:
        super().__init__(tower, device, methods, precision)
        self.head = None if head is None else head.to(self.device)
        self.sae = sae.to(self.device)
        self.k, self.methods, self.options = k, tuple(methods), options
        self.axis = TargetAxis.of(request, k)
        self.words = (words or no_word_targets(sae)).to(self.device)
        self.needs = trace_needs(methods, options, len(tower.path()))
        self.above = tower if embeddings and isinstance(tower, StoppedTower) else None
        """The tower, if it stops before the image embedding, and that is asked for too."""
        if self.above is not None:
            self.needs["tokens"] = max(1, self.needs["tokens"])

    def _infer(self, pixels: torch.Tensor) -> Inferred:
        embedding, trace = self.tower(pixels, **self.needs)
        code = self.sae.encode_sparse(embedding, at_least=self.k)
        kept = code.latents[:, : self.k]
        targets = Targets(self.sae, self.axis.latents(kept), self.words)
        by_method = explain_forward(
            self.methods, self.tower, pixels, embedding, trace, targets, self.options, head=self.head
        )
        values = targets.values(embedding[:, None])[:, 0]
        maps = list(by_method.values())
        stored, scale = heatmaps.encode(torch.stack([m.relevance for m in maps], 1))
        columns = {
            "embedding": embedding if self.above is None else image_embedding(self.above, trace.tokens[-1]),
            **self._reconstruction(embedding, code),
            "completeness": worst_error(by_method, values),
            "sinks": trace.sinks,
            "latent": kept.int(),
            "activation": code.activations[:, : self.k],
            "pre_activation": code.pre_activations[:, : self.k],
            "target_latent": targets.latents.int(),
            "map": stored,
            "scale": scale,
            "map_pre_activation": values,
            "remainder": torch.stack([m.remainder for m in maps], 1),
            "sink_share": torch.stack([sink_share(m, trace.sinks) for m in maps], 1),
            "standard_error": torch.stack([_standard_error(m) for m in maps], 1),
            **dict.fromkeys(("patch", "patches", "rank_correlation", "peak_distance"), values[:, :0]),
        }
        return Inferred(**{name: tensor.cpu().numpy() for name, tensor in columns.items()})

    def _reconstruction(self, embedding: torch.Tensor, code: Code) -> dict[str, torch.Tensor]:
        """How many latents fire, and how well the SAE reconstructs the embedding from them."""
        reconstruction = self.sae.decode_sparse(code.latents, code.activations, embedding)
        squared_error = (embedding - reconstruction).square().sum(-1)
        return {
            "l0": (code.activations != 0).sum(-1, dtype=torch.int32),
            "cosine": torch.cosine_similarity(embedding, reconstruction),
            "fvu": squared_error / self.sae.deviation(embedding).square().sum(-1),
        }


def image_embedding(tower: "StoppedTower | TokenTower", streams: torch.Tensor) -> torch.Tensor:
    """Streams of all tokens (B, N, D) where they leave the last layer that an SAE needs -> the image embedding (B, E)."""
    return tower.whole.embed_tokens(streams, tower.start)


def _standard_error(maps: Maps) -> torch.Tensor:
    """(B, n): of the values of each map, root mean square over patches; NaN if they are not sampled."""
    if maps.standard_error is None:
        return torch.full_like(maps.remainder, torch.nan)
    return maps.standard_error.square().mean(-1).sqrt()


def worst_error(by_method: dict[str, Maps], values: torch.Tensor) -> torch.Tensor:
    """(B,): the largest completeness error of each image's maps; NaN if no method decomposes."""
    errors = [completeness_error(maps, values).amax(-1) for name, maps in by_method.items() if METHODS[name].decomposes]
    return torch.stack(errors).amax(0) if errors else values.new_full((len(values),), torch.nan)
