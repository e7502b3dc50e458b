"""Pixels -> everything a run says about an image, as NumPy arrays: CLIP, SAE and maps for one batch on one device.

Shapes: B images, E embedding width, k kept latents, M methods, n targets of maps, P patches.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from saecore.methods import DECOMPOSE, DEFAULT_OPTIONS, KEPT, Options, Wanted, dtype_of
from saecore.relevance import maps as relevance
from saecore.relevance import reruns
from saecore.relevance.maps import Batch, Maps
from saecore.relevance.targets import Targets, Words, no_words
from saecore.sae.model import SAE
from saecore.towers.tower import ImageTower, Trace

METHODS: dict[str, Callable[[Batch], Maps]] = {
    "contrib": relevance.contrib,
    "contrib_grad": relevance.contrib_grad,
    "chefer": relevance.chefer,
    "legrad": relevance.legrad,
    "gradeclip": relevance.gradeclip,
    "rollout": reruns.rollout,
    "dense": relevance.dense,
    "occlusion": reruns.occlusion,
    "attention": relevance.attention,
}
"""`saecore.methods.METHODS`, as functions."""


def trace_needs(methods: Iterable[str], options: Options, n_layers: int) -> dict[str, int]:
    """What a tower of so many layers must leave in its trace for these methods: its arguments `layers`, `keys` and `tokens`.

    Keys double what a trace holds, and residual streams keep the last layer from computing CLS alone.
    """
    methods, surrogate = set(methods), options.legrad_target == "mean"
    depth = dict.fromkeys(METHODS, 1) | {"rollout": 0, "occlusion": 0}  # these two read their own forwards
    depth |= {name: options.layers_of(name, n_layers) for name in ("contrib", "contrib_grad", "chefer", "legrad")}
    along_path = methods & ({"contrib_grad", "chefer"} if surrogate else {"contrib_grad", "chefer", "legrad"})
    tokens = depth["legrad"] + 1 if surrogate and "legrad" in methods else 0
    if "dense" in methods and options.dense == "token":
        tokens = max(tokens, 1)
    return {
        "layers": max(depth[name] for name in methods),
        "keys": "gradeclip" in methods or any(depth[name] > 1 for name in along_path),
        "tokens": tokens,
    }


def check_fits(tower: ImageTower, methods: Sequence[str], options: Options) -> None:
    """ValueError if a method is to look at more layers than its query passes, or to drop all that there is to look at."""
    for name in (name for name in methods if name in ("contrib", "contrib_grad", "chefer", "legrad")):
        own = name == "legrad" and options.legrad_target == "mean"  # whatever the query passes, all layers have targets
        most = tower.n_layers if own else len(tower.path())
        if options.layers > most:
            raise ValueError(f"--layers {options.layers}: {name} has {most} to look at in this model")
    if "occlusion" in methods and options.block >= max(tower.grid) and not tower.n_own:
        raise ValueError(
            f"--block {options.block}: this model has {max(tower.grid)} patches a side, and nothing else to see"
        )


def explain(
    tower: ImageTower,
    sae: SAE,
    pixels: torch.Tensor,
    latents: torch.Tensor,
    methods: Sequence[str] = ("contrib",),
    options: Options = DEFAULT_OPTIONS,
    words: Words | None = None,
    heads: bool = False,
) -> dict[str, Maps]:
    """Maps of the latents (B, k) of images (uint8 (B, height, width, 3)), and of `words`, by every method: one forward."""
    options.check()
    check_fits(tower, methods, options)
    words = words or no_words(sae)
    if needs_blank(tower, methods, options) and not len(words.blank):
        raise ValueError("legrad of a SigLIP needs `Words.blank`, or options with legrad_correction=False")
    embedding, trace = tower(pixels, **trace_needs(methods, options, len(tower.path())))
    return maps_by(methods, tower, pixels, embedding, trace, Targets(sae, latents, words), options, heads)


def maps_by(
    methods: Sequence[str],
    tower: ImageTower,
    pixels: torch.Tensor,
    embedding: torch.Tensor,
    trace: Trace,
    targets: Targets,
    options: Options,
    heads: bool = False,
    check: bool = True,
) -> dict[str, Maps]:
    """Maps by every method, of one forward; the targets' read-outs are computed once for each norm that is asked for."""
    exact = {name: options.norm_of(name) == "exact" for name in methods}
    batches = {
        norm: relevance.batch_of(tower, pixels, embedding, trace, targets, norm, options, heads, check)
        for norm in set(exact.values())
    }
    return {name: METHODS[name](batches[exact[name]]) for name in methods}


def needs_blank(tower: ImageTower, methods: Sequence[str], options: Options) -> bool:
    """Whether a method needs the text that says nothing, `methods.BLANK_TEXT`, in `Words.blank`."""
    return "legrad" in methods and relevance.corrects_legrad(tower, options)


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
    """float32 (B,): the worst of the image's maps, before rounding to 8 bits; NaN if no method decomposes."""
    sinks: np.ndarray
    """bool (B, P): patches flagged as sinks."""
    latent: np.ndarray
    """int32 (B, k), strongest first."""
    activation: np.ndarray
    """float32 (B, k)."""
    pre_activation: np.ndarray
    """float32 (B, k)."""
    target: np.ndarray
    """int32 (B, n): the latent that each map explains, or -1 for a text or concept."""
    wanted: np.ndarray
    """bool (B, n): False for a latent that is there twice, kept and asked for."""
    map: np.ndarray
    """int8 (B, M, n, P): relevance / scale."""
    scale: np.ndarray
    """float32 (B, M, n)."""
    map_pre_activation: np.ndarray
    """float32 (B, n): what a map and its remainder add up to."""
    remainder: np.ndarray
    """float32 (B, M, n)."""
    sink_share: np.ndarray
    """float32 (B, M, n)."""


class Embedded(NamedTuple):
    """What `Embedder` finds."""

    embedding: np.ndarray
    """float32 (B, E), not L2-normalised."""


Found = TypeVar("Found", Embedded, Findings)


class _OnDevice(Generic[Found]):
    """CLIP on its device, in the precision that `dtype_of` says. What else a batch needs, and finds, is the subclass's."""

    def __init__(self, tower: ImageTower, device: str, methods: Sequence[str] = ()) -> None:
        self.device = torch.device(device)
        self.tower = tower.to(self.device)
        if dtype_of(self.device.type, methods) == "bfloat16":
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
    """CLIP, SAE and methods. SAE and sums of maps are in float32 everywhere."""

    def __init__(
        self,
        tower: ImageTower,
        sae: SAE,
        k: int,
        methods: Sequence[str],
        device: str,
        wanted: Wanted = KEPT,
        words: Words | None = None,
        options: Options = DEFAULT_OPTIONS,
    ) -> None:
        super().__init__(tower, device, methods)
        self.sae = sae.to(self.device)
        self.k, self.methods, self.options = k, tuple(methods), options
        self.kept = wanted.kept
        self.words = (words or no_words(sae)).to(self.device)
        self.fixed = torch.tensor(wanted.latents, dtype=torch.int64, device=self.device)
        self.needs = trace_needs(methods, options, len(tower.path()))

    def _find(self, pixels: torch.Tensor) -> Findings:
        embedding, trace = self.tower(pixels, **self.needs)
        code = self.sae.encode_sparse(embedding, at_least=self.k)
        reconstruction = self.sae.decode_sparse(code.latents, code.activations, embedding)
        squared_error = (embedding - reconstruction).square().sum(-1)
        kept = code.latents[:, : self.k]
        explained = kept if self.kept else kept[:, :0]
        fixed = self.fixed.expand(len(pixels), -1)
        n_words = len(self.words.texts) + len(self.words.concept_latents)
        targets = Targets(self.sae, torch.cat([explained, fixed], 1), self.words)
        twice = (fixed[:, :, None] == explained[:, None]).any(-1)
        by_method = maps_by(self.methods, self.tower, pixels, embedding, trace, targets, self.options)
        maps = [by_method[name] for name in self.methods]
        values = targets.values(embedding[:, None])[:, 0]
        errors = [
            relevance.completeness_error(found, values).amax(-1)
            for name, found in zip(self.methods, maps, strict=True)
            if name in DECOMPOSE
        ]
        stacked = torch.stack([found.relevance for found in maps], 1)
        scale = stacked.abs().amax(-1) / INT8_MAX
        found = {
            "embedding": embedding,
            "l0": (code.activations != 0).sum(-1, dtype=torch.int32),
            "cosine": torch.cosine_similarity(embedding, reconstruction),
            "fvu": squared_error / self.sae.deviation(embedding).square().sum(-1),
            "completeness": torch.stack(errors).amax(0) if errors else torch.full_like(squared_error, torch.nan),
            "sinks": trace.sinks,
            "latent": kept.int(),
            "activation": code.activations[:, : self.k],
            "pre_activation": code.pre_activations[:, : self.k],
            "target": torch.nn.functional.pad(targets.latents, (0, n_words), value=-1).int(),
            "wanted": torch.cat(
                [torch.ones_like(explained, dtype=torch.bool), ~twice, twice.new_ones(len(pixels), n_words)], 1
            ),
            "map": (stacked / scale.clamp(min=torch.finfo(scale.dtype).tiny)[..., None]).round().to(torch.int8),
            "scale": scale,
            "map_pre_activation": values,
            "remainder": torch.stack([found.remainder for found in maps], 1),
            "sink_share": torch.stack([relevance.sink_share(found, trace.sinks) for found in maps], 1),
        }
        return Findings(**{name: tensor.cpu().numpy() for name, tensor in found.items()})
