"""What an SAE is trained to do: the recipe, and the loss of one batch for every architecture.

With u the standardised embeddings and u_i the reconstruction at nested level i of m (m = 1 without nesting):

    loss = sum_i w_i L(u_i, u) / sum_i w_i + sparsity S(a) + aux |e - e'|^2 / |e|^2

    L   mse     mean over entries of (u_i - u)^2
        nmse    mean over images of |u_i - u|^2 / |u|^2                  (u has mean 0 over the data)
        cosine  mean over images of (1 - cos(u_i, u))^2
    S   l1      mean over images of |a|_1 / |u|_2
        l0      (mean number that fires / k - 1)^2, through `kernels.step`: jumprelu only (arXiv:2407.14435, section 5.3)
        tanh    mean over images of sum_j tanh(a_j), divided by k
    e'  what the strongest dead latents make of e = u - u_m, with e taken as a constant (arXiv:2406.04093, appendix A.2)

Nested levels cost one decode, not m: the supports are nested, so level i is level i - 1 and the terms of rank k_(i-1)..k_i
(prefixes: the latents n_(i-1)..n_i), and all increments are bags of one sparse product.

Left out: gated SAEs, transcoders, end-to-end losses through CLIP.

Shapes: B images, d inputs, n latents, m nested levels, E entries (image, latent) that fire.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from saecore.kernels import decode_entries, jump_relu, picked, step
from saecore.sae import CHOICES as SAE_CHOICES
from saecore.sae import SAE, SAEConfig

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
        for field, least in (("latents", 1), ("k", 1), ("batch_size", 1), ("warmup", 0), ("clip", 0.0), ("aux", 0.0)):
            if getattr(self, field) < least:
                raise ValueError(f"{_flag(field)} {getattr(self, field)}: must be at least {least}")
        for field in ("epochs", "bandwidth"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{_flag(field)} {getattr(self, field)}: must be above 0")
        if self.k > self.latents:
            raise ValueError(f"--k {self.k}: there are only {self.latents} latents")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema {self.ema}: must be at least 0 and below 1")
        if self.penalty == "l0" and self.architecture != "jumprelu":
            raise ValueError("--penalty l0 needs thresholds that learn: --architecture jumprelu")
        nesting = ARCHITECTURES[self.architecture][1]
        if self.nested and nesting == "none":
            raise ValueError(
                f"--nested: {self.architecture} has no nested levels; matryoshka and matryoshka-prefixes do"
            )
        if self.nested and (sorted(set(self.nested)) != list(self.nested) or self.nested[-1] > self.latents):
            raise ValueError(f"--nested {self.nested}: must ascend, to at most {self.latents} latents")
        if nesting == "levels" and self.nested and self.nested[0] != self.k:
            raise ValueError(f"--nested {self.nested}: the first level is what fires, so it must be --k {self.k}")
        if nesting == "prefixes" and self.nested and self.nested[-1] != self.latents:
            raise ValueError(f"--nested {self.nested}: the last prefix is the dictionary, so it must be {self.latents}")

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


class Outcome(NamedTuple):
    """What a batch came to."""

    loss: Tensor
    """Scalar, with its graph."""
    error: Tensor
    """(B, d): u less its reconstruction, without a graph."""
    fired: Tensor
    """bool (n,): latents that fired for any image."""


def objective(sae: SAE, recipe: Recipe, x: Tensor, dead: Tensor) -> Outcome:
    """Loss of a batch of CLIP embeddings (B, d); `dead` is bool (n,)."""
    u, seen = sae.standardise(x), sae.inputs(x)
    p = (
        torch.addmm(sae.latent_bias, seen.values - sae.pre_bias, sae.encoder)
        if _is_dense(sae)
        else _plain(sae, seen.values)
    )
    if _is_dense(sae):
        fired, decoded, penalty = _dense(sae, recipe, p, u)
    else:
        fired, decoded, penalty = _sparse(sae, recipe, p, seen.values, u)
    levels = (decoded + sae.pre_bias) * seen.spread[:, None] + seen.shift[:, None]
    weights = torch.arange(levels.shape[1], 0, -1.0, device=x.device)
    if recipe.weighting == "uniform":
        weights = torch.ones_like(weights)
    loss = (weights * reconstruction_loss(recipe.loss, levels, u)).sum() / weights.sum() + penalty
    error = (u - levels[:, -1]).detach()
    if recipe.dead == "aux" and dead.any():
        loss = loss + recipe.aux * _auxiliary(sae, p.detach(), seen.values, error / seen.spread, dead)
    return Outcome(loss, error, fired)


def reconstruction_loss(name: str, levels: Tensor, u: Tensor) -> Tensor:
    """L of every level: reconstructions (B, m, d) of u (B, d) -> (m,)."""
    u = u[:, None]
    if name == "mse":
        return (levels - u).square().mean((0, 2))
    if name == "nmse":
        return ((levels - u).square().sum(-1) / u.square().sum(-1)).mean(0)
    return (1 - F.cosine_similarity(levels, u, dim=-1)).square().mean(0)


def _is_dense(sae: SAE) -> bool:
    return sae.config.architecture in ("relu", "jumprelu")


@torch.no_grad()
def _plain(sae: SAE, v: Tensor) -> Tensor:
    return torch.addmm(sae.latent_bias, v - sae.pre_bias, sae.encoder)


def _dense(sae: SAE, recipe: Recipe, p: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where no k rules: fired (n,), decoded (B, 1, d), weighted penalty."""
    penalty, weight = recipe.penalised()
    if sae.threshold is None:
        a = sae.output(p)
        cost = _penalty(penalty, a, u, recipe.k)
    else:
        strength = p.abs() if sae.config.by_magnitude else p
        opened = jump_relu(strength, sae.threshold, recipe.bandwidth)
        a = sae.output(opened * p.sign() if sae.config.by_magnitude else opened)
        if penalty == "l0":
            cost = (step(strength, sae.threshold, recipe.bandwidth).sum(-1).mean() / recipe.k - 1).square()
        else:
            cost = _penalty(penalty, a, u, recipe.k)
    return (a != 0).any(0), (a @ sae.atoms)[:, None], weight * cost


def _penalty(name: str, a: Tensor, u: Tensor, k: int) -> Tensor:
    if name == "l1":
        return (a.abs().sum(-1) / torch.linalg.vector_norm(u, dim=-1)).mean()
    if name == "tanh":
        return torch.tanh(a.abs()).sum(-1).mean() / k
    return a.new_zeros(())


def _sparse(sae: SAE, recipe: Recipe, p: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where a k rules: fired (n,), decoded at every nested level (B, m, d), weighted penalty."""
    config = sae.config
    strength = p.abs() if config.by_magnitude else p
    m = max(1, len(config.nested))
    if config.architecture == "topk":
        rows, cols, group = _ranked(strength, config.nested or (config.k,), drop=config.output == "relu")
    else:
        flat = strength.flatten().topk(config.k * len(p), sorted=False).indices.sort().values
        rows, cols = flat.div(p.shape[1], rounding_mode="floor"), flat % p.shape[1]
        group = _group(cols, config.nested) if config.nested else torch.zeros_like(cols)
    bags = rows * m + group
    order = torch.argsort(bags, stable=True)
    rows, cols, bags = rows[order], cols[order], bags[order]
    values = sae.output(picked(v, sae.pre_bias, sae.encoder, sae.latent_bias, p, rows, cols))
    decoded = decode_entries(values, cols, sae.atoms, bags, len(p) * m).view(len(p), m, -1).cumsum(1)
    fired = torch.zeros(p.shape[1], dtype=torch.bool, device=p.device)
    fired[cols[values.detach() != 0]] = True
    penalty, weight = recipe.penalised()
    if not weight:
        return fired, decoded, values.new_zeros(())
    padded = torch.zeros_like(p).index_put((rows, cols), values)
    return fired, decoded, weight * _penalty(penalty, padded, u, recipe.k)


def _ranked(strength: Tensor, levels: tuple[int, ...], drop: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and level of the entries with rank below levels[-1]; `drop` leaves out what max(p, 0) makes nothing of."""
    most = levels[-1]
    if drop:  # beyond the largest number of positive ones, all levels are the same
        most = max(1, min(most, int((strength > 0).sum(-1).amax())))
    top = strength.topk(most, dim=-1)
    keep = top.values > 0 if drop else torch.ones_like(top.values, dtype=torch.bool)
    rows, ranks = keep.nonzero(as_tuple=True)
    return rows, top.indices[rows, ranks], _group(ranks, levels)


def _group(position: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Which of the half-open intervals [0, b_0), [b_0, b_1).. each position lies in."""
    return torch.searchsorted(torch.tensor(bounds, device=position.device), position, right=True)


def _auxiliary(sae: SAE, p: Tensor, v: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    """|e - e'|^2 / |e|^2, with e' of the d / 2 strongest dead latents of each image."""
    candidates = dead.nonzero().squeeze(1)
    top = p[:, candidates].topk(min(len(candidates), max(1, v.shape[1] // 2)), dim=-1).indices
    cols = candidates[top].flatten()
    rows = torch.arange(len(p), device=p.device).repeat_interleave(top.shape[1])
    values = picked(v, sae.pre_bias, sae.encoder, sae.latent_bias, p, rows, cols).clamp(min=0)
    explained = decode_entries(values, cols, sae.atoms, rows, len(p))
    return (error - explained).square().sum() / error.square().sum().clamp(min=torch.finfo(error.dtype).tiny)
