"""How to train an SAE: the choices, which of them contradict each other, and the course of the learning rate.

Sentences of `Recipe.check` begin with the name of the field that is wrong.

Left out: PyTorch, so that a command line can be checked at once.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from saecore.sae.config import CHOICES as SAE_CHOICES
from saecore.sae.config import SAEConfig

# Architecture of the recipe -> (the SAE's architecture, nesting, learning rate, penalty). The rates are MSAE's, except that of
# jumprelu, which is ours.
ARCHITECTURES = {
    "relu": ("relu", "none", 5e-5, "l1"),
    "topk": ("topk", "none", 5e-4, "none"),
    "batchtopk": ("batchtopk", "none", 5e-4, "none"),
    "jumprelu": ("jumprelu", "none", 5e-4, "l0"),
    "matryoshka": ("topk", "levels", 1e-4, "none"),
    "matryoshka-prefixes": ("batchtopk", "prefixes", 5e-4, "none"),
}

CHOICES = {
    "architecture": tuple(ARCHITECTURES),
    "loss": ("mse", "nmse", "cosine"),
    "penalty": ("auto", "none", "l1", "l0", "tanh"),
    "weighting": ("uniform", "reverse"),
    "pre_bias": ("zero", "median"),
    "schedule": ("linear", "cosine", "constant"),
    "dead": ("aux", "resample", "none"),
    "output": SAE_CHOICES["output"],
    "normalise": SAE_CHOICES["normalise"],
}

SPARSITY = {"none": 0.0, "l1": 0.003, "l0": 1.0, "tanh": 0.003}
"""Default weight of each penalty. That of l1 is MSAE's."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train an SAE."""

    latents: int
    """Number of latents."""
    architecture: str = "topk"
    """relu, topk, batchtopk, jumprelu, matryoshka (nested levels of k: MSAE) or matryoshka-prefixes (nested dictionaries)."""
    k: int = 64
    """How many latents fire for an image: exactly (topk), on average (batchtopk, jumprelu), at the first level (matryoshka)."""
    nested: tuple[int, ...] = ()
    """Levels of k, or sizes of prefixes, ascending. By default k, 2k, 4k and so on up to all latents, or, of prefixes, a
    sixteenth, an eighth and so on up to all latents."""
    weighting: str = "uniform"
    """Weights of m nested levels: uniform (all are 1) or reverse (m, m - 1 and so on down to 1: the sparsest counts most)."""
    loss: str = "mse"
    """Loss of the reconstruction: mse, nmse or cosine."""
    penalty: str = "auto"
    """Penalty for latents that fire: none, l1, l0 or tanh. auto is l1 for relu, l0 for jumprelu, and none for all others."""
    sparsity: float = -1.0
    """Weight of the penalty; -1 stands for 0.003 (l1, tanh) or 1 (l0)."""
    rate: float = 0.0
    """Peak learning rate of AdamW; 0 stands for 5e-5 (relu), 1e-4 (matryoshka) or 5e-4 (others), for a batch size of 4096."""
    batch_size: int = 4096
    """Embeddings in a step."""
    epochs: float = 30.0
    """Passes over the embeddings."""
    schedule: str = "linear"
    """How the learning rate goes after the warm-up: linear (to zero over the last fifth), cosine (to a tenth) or constant."""
    warmup: int = 0
    """Steps over which the learning rate rises from a tenth of its peak to the peak."""
    clip_norm: float = 1.0
    """A gradient with a larger norm is scaled down to this norm; 0 sets no limit."""
    dead: str = "aux"
    """What becomes of dead latents: aux (they learn to explain the error that is left), resample (they begin anew) or none."""
    dead_after: int = 0
    """A latent that does not fire for so many embeddings is dead; 0 stands for one epoch, but at most a million."""
    aux: float = 1 / 32
    """Weight of the auxiliary loss, by which dead latents learn (dead: aux)."""
    tied: bool = False
    """Use the transposed encoder as the decoder."""
    output: str = "relu"
    """What a latent that fires gives: relu, signed or absolute."""
    by_magnitude: bool = False
    """Let latents compete by the magnitude of their pre-activations instead of by their value."""
    soft_cap: float = 0.0
    """Cap activations softly at this value; 0 sets no cap."""
    normalise: str = "none"
    """How each embedding is normalised: none, layer_norm or constant_norm."""
    centre: bool = True
    """Subtract the mean of the embeddings from each embedding."""
    rescale: bool = True
    """Scale the embeddings so that their mean squared norm is their width."""
    pre_bias: str = "zero"
    """Where the pre-bias begins: zero, or median (the geometric median of the standardised embeddings)."""
    bandwidth: float = 0.1
    """Width of the kernel through which the thresholds of jumprelu learn, in standardised pre-activations."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is evaluated and saved in place of the weights; 0 keeps no average."""
    seed: int = 42
    """Seed of the initial weights, the order of the embeddings and the held-out rows."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nested", tuple(self.nested))

    def check(self) -> None:
        """ValueError, in one sentence that begins with the name of a field, for a recipe that contradicts itself."""
        self._check_ranges()
        self._check_nested()
        architecture = ARCHITECTURES[self.architecture][0]
        if self.penalty == "l0" and self.architecture != "jumprelu":
            raise ValueError("penalty l0 needs thresholds that learn, which only the architecture jumprelu has")
        if self.by_magnitude and self.output == "relu" and architecture in ("relu", "topk"):
            raise ValueError("by_magnitude needs the output signed or absolute")
        self.sae(1)  # ValueError for what SAEConfig refuses

    def _check_ranges(self) -> None:
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} {getattr(self, field)}: must be one of {', '.join(choices)}")
        least = {"latents": 1, "k": 1, "batch_size": 1}
        for field in (*least, "warmup", "clip_norm", "aux", "rate", "soft_cap", "dead_after", "seed"):
            if getattr(self, field) < least.get(field, 0):
                raise ValueError(f"{field} {getattr(self, field)}: must be at least {least.get(field, 0)}")
        for field in ("epochs", "bandwidth"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} {getattr(self, field)}: must be above 0")
        if self.k > self.latents:
            raise ValueError(f"k {self.k}: there are only {self.latents} latents")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema {self.ema}: must be at least 0 and below 1")

    def _check_nested(self) -> None:
        if not self.nested:
            return
        nesting = ARCHITECTURES[self.architecture][1]
        if nesting == "none":
            raise ValueError(f"nested: {self.architecture} has no nested levels; matryoshka and matryoshka-prefixes do")
        ascending = sorted({*self.nested, 0})[1:] == list(self.nested)
        if not ascending or self.nested[-1] > self.latents:
            raise ValueError(f"nested {self.nested}: must ascend, from at least 1 to at most {self.latents} latents")
        if nesting == "levels" and self.nested[0] != self.k:
            raise ValueError(f"nested {self.nested}: the first level is what fires, so it must be k, which is {self.k}")
        if nesting == "prefixes" and self.nested[-1] != self.latents:
            raise ValueError(f"nested {self.nested}: the last prefix is the dictionary, so it must be {self.latents}")

    def sae(self, width: int, source: str = "") -> SAEConfig:
        """The config of the SAE that this recipe trains on embeddings of a width."""
        architecture, nesting, _, _ = ARCHITECTURES[self.architecture]
        nested = self.nested
        if not nested and nesting == "levels":
            nested = doubled(self.k, self.latents)
        elif not nested and nesting == "prefixes":
            nested = doubled(max(1, self.latents // 16), self.latents)
        return SAEConfig(
            n_inputs=width,
            n_latents=self.latents,
            k=self.k if architecture in ("topk", "batchtopk") else 0,
            architecture=architecture,
            output=self.output,
            by_magnitude=self.by_magnitude,
            normalise=self.normalise,
            soft_cap=self.soft_cap,
            tied=self.tied,
            nesting=nesting,
            nested=nested,
            source=source,
        )

    def peak_rate(self) -> float:
        """The learning rate that was given, or else the architecture's own."""
        return self.rate or ARCHITECTURES[self.architecture][2]

    def penalised(self) -> tuple[str, float]:
        """The penalty and its weight."""
        penalty = ARCHITECTURES[self.architecture][3] if self.penalty == "auto" else self.penalty
        return penalty, SPARSITY[penalty] if self.sparsity < 0 else self.sparsity


def renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that a file holds, by the names of today: `clip_norm` was `clip`."""
    return {"clip_norm" if name == "clip" else name: value for name, value in fields.items()}


def doubled(first: int, last: int) -> tuple[int, ...]:
    """MSAE's nesting list: first, 2 first, 4 first and so on while they are below last, and then last."""
    return (*(first << i for i in range(math.ceil(math.log2(last / first)))), last)


def pace(recipe: Recipe, t: int, total: int) -> float:
    """Learning rate of step t = 0, 1, .. total - 1, divided by its peak.

    warm-up (t < w):    0.1 + 0.9 t / w
    linear:             1 while t < 0.8 total, then (total - t) / (0.2 total)
    cosine:             0.1 + 0.9 (1 + cos(pi (t - w) / (total - w))) / 2
    """
    if t < recipe.warmup:
        return 0.1 + 0.9 * t / recipe.warmup
    if recipe.schedule == "linear":
        return min(1.0, (total - t) / (0.2 * total))
    if recipe.schedule == "cosine":
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (t - recipe.warmup) / (total - recipe.warmup)))
    return 1.0
