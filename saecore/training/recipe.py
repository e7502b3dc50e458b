"""How to train an SAE: the choices, what contradicts itself, and the course of the learning rate. No PyTorch here."""

import dataclasses
import math

from saecore.sae.config import CHOICES as SAE_CHOICES
from saecore.sae.config import SAEConfig

# Architecture of the recipe -> (the SAE's architecture, nesting, learning rate, penalty). Rates are MSAE's; jumprelu's is ours.
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
"""Default weight of each penalty; l1's is MSAE's."""


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
    """Levels of k, or sizes of prefixes, ascending; none is k, 2k, 4k.. up to all latents, or all / 16, / 8.. for prefixes."""
    weighting: str = "uniform"
    """Weights of nested levels: uniform, or reverse (m, m-1, .. 1: the sparsest counts most)."""
    loss: str = "mse"
    """Reconstruction: mse, nmse or cosine."""
    penalty: str = "auto"
    """Sparsity: none, l1, l0 or tanh; auto is l1 for relu, l0 for jumprelu and none where a k rules."""
    sparsity: float = -1.0
    """Weight of the penalty; -1 is 0.003 (l1, tanh) or 1 (l0)."""
    rate: float = 0.0
    """Peak learning rate of AdamW; 0 is 5e-5 for relu, 1e-4 for matryoshka, 5e-4 for others, at 4,096 embeddings a step."""
    batch_size: int = 4096
    """Embeddings a step."""
    epochs: float = 30.0
    """Passes over the embeddings."""
    schedule: str = "linear"
    """Learning rate: linear (to zero over the last fifth), cosine (to a tenth) or constant, all after the warm-up."""
    warmup: int = 0
    """Steps in which the learning rate rises from a tenth to its peak."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 is no limit."""
    dead: str = "aux"
    """What becomes of dead latents: aux (they learn to explain the rest), resample (they begin anew) or none."""
    dead_after: int = 0
    """Embeddings without firing after which a latent is dead; 0 is one epoch, at most a million."""
    aux: float = 1 / 32
    """Weight of the auxiliary loss."""
    tied: bool = False
    """Decoder = encoder transposed."""
    output: str = "relu"
    """What a latent that fires gives: relu, signed or absolute."""
    by_magnitude: bool = False
    """Let latents compete by |pre-activation|."""
    soft_cap: float = 0.0
    """Cap activations softly at this value; 0 is no cap."""
    normalise: str = "none"
    """Normalise each embedding: none, layer_norm or constant_norm."""
    centre: bool = True
    """Subtract the mean of the embeddings."""
    rescale: bool = True
    """Scale the embeddings to a mean squared norm of their width."""
    pre_bias: str = "zero"
    """Where the pre-bias begins: zero, or the geometric median of the standardised embeddings."""
    bandwidth: float = 0.1
    """jumprelu: width of the kernel through which thresholds learn, in standardised pre-activations."""
    ema: float = 0.0
    """Decay of an average of the weights, which is then what is evaluated and saved; 0 is none."""
    seed: int = 42
    """Seed of the initial weights, the order of the embeddings and the held-out rows."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nested", tuple(self.nested))

    def check(self) -> None:
        """ValueError in one sentence for what cannot be."""
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{_flag(field)} {getattr(self, field)}: must be one of {', '.join(choices)}")
        least = {"latents": 1, "k": 1, "batch_size": 1}
        for field in (*least, "warmup", "clip", "aux", "rate", "soft_cap", "dead_after", "seed"):
            if getattr(self, field) < least.get(field, 0):
                raise ValueError(f"{_flag(field)} {getattr(self, field)}: must be at least {least.get(field, 0)}")
        for field in ("epochs", "bandwidth"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{_flag(field)} {getattr(self, field)}: must be above 0")
        if self.k > self.latents:
            raise ValueError(f"--k {self.k}: there are only {self.latents} latents")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema {self.ema}: must be at least 0 and below 1")
        if self.penalty == "l0" and self.architecture != "jumprelu":
            raise ValueError("--penalty l0 needs thresholds that learn: --architecture jumprelu")
        architecture, nesting, _, _ = ARCHITECTURES[self.architecture]
        if self.by_magnitude and self.output == "relu" and architecture in ("relu", "topk"):
            raise ValueError("--by-magnitude needs --output signed or --output absolute")
        if self.nested and nesting == "none":
            raise ValueError(
                f"--nested: {self.architecture} has no nested levels; matryoshka and matryoshka-prefixes do"
            )
        ascending = sorted({*self.nested, 0})[1:] == list(self.nested)
        if self.nested and (not ascending or self.nested[-1] > self.latents):
            raise ValueError(f"--nested {self.nested}: must ascend, from at least 1 to at most {self.latents} latents")
        if nesting == "levels" and self.nested and self.nested[0] != self.k:
            raise ValueError(f"--nested {self.nested}: the first level is what fires, so it must be --k {self.k}")
        if nesting == "prefixes" and self.nested and self.nested[-1] != self.latents:
            raise ValueError(f"--nested {self.nested}: the last prefix is the dictionary, so it must be {self.latents}")
        self.sae(1)  # what the SAE itself refuses

    def sae(self, width: int, source: str = "") -> SAEConfig:
        """The SAE that this recipe trains, on embeddings of that width."""
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
        """The learning rate, given or published."""
        return self.rate or ARCHITECTURES[self.architecture][2]

    def penalised(self) -> tuple[str, float]:
        """The penalty and its weight."""
        penalty = ARCHITECTURES[self.architecture][3] if self.penalty == "auto" else self.penalty
        return penalty, SPARSITY[penalty] if self.sparsity < 0 else self.sparsity


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def doubled(first: int, last: int) -> tuple[int, ...]:
    """first, 2 first, 4 first.. as long as below last, and last: MSAE's nesting list."""
    return (*(first << i for i in range(math.ceil(math.log2(last / first)))), last)


def pace(recipe: Recipe, t: int, total: int) -> float:
    """Learning rate of step t = 0 .. total - 1 over its peak.

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
