"""The loss of one batch against NumPy, its gradients against autograd of dense, naive code; recipes and their schedules."""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from saecore.sae.model import SAE
from saecore.training import objectives
from saecore.training.objectives import objective
from saecore.training.recipe import Recipe, doubled, pace

BATCH, WIDTH, LATENTS, K = 10, 12, 40, 5

CASES: list[dict[str, Any]] = [
    {"architecture": "relu"},
    {"architecture": "relu", "penalty": "tanh", "loss": "cosine", "soft_cap": 1.5},
    {"architecture": "relu", "tied": True, "normalise": "layer_norm", "loss": "nmse"},
    {"architecture": "topk"},
    {"architecture": "topk", "loss": "nmse", "tied": True},
    {"architecture": "topk", "output": "signed", "penalty": "l1"},
    {"architecture": "topk", "output": "signed", "by_magnitude": True, "soft_cap": 2.0},
    {"architecture": "topk", "output": "absolute", "by_magnitude": True},
    {"architecture": "topk", "normalise": "layer_norm"},
    {"architecture": "topk", "normalise": "constant_norm", "loss": "cosine", "penalty": "tanh"},
    {"architecture": "batchtopk"},
    {"architecture": "batchtopk", "output": "signed", "by_magnitude": True, "tied": True},
    {"architecture": "batchtopk", "normalise": "layer_norm", "soft_cap": 1.0},
    {"architecture": "jumprelu"},
    {"architecture": "jumprelu", "by_magnitude": True, "output": "signed", "tied": True},
    {"architecture": "jumprelu", "by_magnitude": True, "output": "absolute", "soft_cap": 1.0},
    {"architecture": "jumprelu", "by_magnitude": True},
    {"architecture": "jumprelu", "penalty": "l1", "normalise": "layer_norm", "soft_cap": 2.0},
    {"architecture": "matryoshka"},
    {"architecture": "matryoshka", "weighting": "reverse", "loss": "cosine", "normalise": "layer_norm"},
    {"architecture": "matryoshka", "nested": (5, 6, 17), "output": "signed", "tied": True},
    {"architecture": "matryoshka", "by_magnitude": True, "output": "absolute", "soft_cap": 1.5},
    {"architecture": "matryoshka", "nested": (5, 8, 30), "weighting": "reverse", "penalty": "l1"},
    {"architecture": "matryoshka-prefixes"},
    {"architecture": "matryoshka-prefixes", "nested": (3, 20, 40), "weighting": "reverse", "tied": True},
    {"architecture": "matryoshka-prefixes", "output": "signed", "by_magnitude": True, "normalise": "constant_norm"},
]


def drawn(recipe: Recipe) -> tuple[SAE, Tensor]:
    """An SAE in which everything matters, in float64 (decoder rows not of length 1, either), and embeddings."""
    generator = torch.Generator().manual_seed(0)
    sae = SAE(recipe.sae(WIDTH)).double()
    for name, tensor in sae.state_dict().items():
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.4)
        if name == "threshold":
            tensor.abs_()
    sae.scale.fill_(1.7)
    return sae, torch.randn(BATCH, WIDTH, generator=generator)


class Derived(NamedTuple):
    """What NumPy makes of a batch."""

    u: np.ndarray
    v: np.ndarray
    shift: np.ndarray
    spread: np.ndarray
    masks: list[np.ndarray]
    """Of the latents that count at every level, (B, n)."""
    dead: np.ndarray
    """Of the dead latents that are to explain the error, (B, n)."""
    levels: list[np.ndarray]
    loss: float


def ranks(values: np.ndarray) -> np.ndarray:
    """0 for the largest of a row."""
    return np.argsort(np.argsort(-values, axis=-1), axis=-1)


def derived(sae: SAE, recipe: Recipe, x: Tensor, dead: np.ndarray) -> Derived:
    w = {name: tensor.numpy() for name, tensor in sae.state_dict().items()}
    atoms = w.get("decoder", w["encoder"].T)
    u = (x.double().numpy() - w["mean"]) * w["scale"]
    shift, spread, floor = np.zeros((BATCH, 1)), np.ones((BATCH, 1)), 0.0
    if recipe.normalise == "layer_norm":
        shift, spread, floor = u.mean(1, keepdims=True), u.std(1, ddof=1, keepdims=True), 1e-5
    elif recipe.normalise == "constant_norm":
        spread = np.linalg.norm(u, axis=1, keepdims=True) / math.sqrt(WIDTH)
    v = (u - shift) / (spread + floor)
    p = (v - w["pre_bias"]) @ w["encoder"] + w["latent_bias"]
    strength = np.abs(p) if recipe.by_magnitude else p
    config = sae.config
    if config.architecture == "relu":
        masks = [p > 0]
    elif config.architecture == "jumprelu":
        masks = [strength > w["threshold"]]
    elif config.architecture == "topk":
        masks = [ranks(strength) < k for k in config.nested or (config.k,)]
    else:
        kept = ranks(strength.flatten()).reshape(p.shape) < config.k * BATCH
        masks = [kept & (np.arange(LATENTS) < n) for n in config.nested or (LATENTS,)]
    capped = {"relu": np.maximum(p, 0), "signed": p, "absolute": np.abs(p)}[recipe.output]
    if recipe.soft_cap:
        capped = recipe.soft_cap * np.tanh(capped / recipe.soft_cap)
    levels = [((capped * mask) @ atoms + w["pre_bias"]) * spread + shift for mask in masks]
    losses = []
    for found in levels:
        if recipe.loss == "mse":
            losses.append(((found - u) ** 2).mean())
        elif recipe.loss == "nmse":
            losses.append((((found - u) ** 2).sum(1) / (u**2).sum(1)).mean())
        else:
            cosine = (found * u).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(u, axis=1)
            losses.append(((1 - cosine) ** 2).mean())
    m = len(levels)
    loss = np.average(losses, weights=range(m, 0, -1) if recipe.weighting == "reverse" else None)
    penalty, weight = recipe.penalised()
    a = capped * masks[-1]
    if penalty == "l1":
        loss += weight * (np.abs(a).sum(1) / np.linalg.norm(u, axis=1)).mean()
    elif penalty == "tanh":
        loss += weight * np.tanh(np.abs(a)).sum(1).mean() / K
    elif penalty == "l0":
        loss += weight * (masks[0].sum(1).mean() / K - 1) ** 2
    among = ranks(np.where(dead, p, -np.inf)) < min(dead.sum(), WIDTH // 2)
    if dead.any():
        error = (u - levels[-1]) / spread
        left = error - (np.maximum(p, 0) * among) @ atoms
        loss += recipe.aux * (left**2).sum() / (error**2).sum()
    return Derived(u, v, shift, spread, masks, among, levels, float(loss))


def naive(sae: SAE, recipe: Recipe, known: Derived) -> Tensor:
    """The same loss for autograd: dense everywhere, a decode for every level; what fires is given."""
    u, v, shift, spread = (torch.from_numpy(array) for array in known[:4])
    p = (v - sae.pre_bias) @ sae.encoder + sae.latent_bias
    out = {"relu": p.relu(), "signed": p, "absolute": p.abs()}[recipe.output]
    dense = [out * torch.from_numpy(mask) for mask in known.masks]
    count = torch.zeros(())
    if isinstance(sae.threshold, torch.nn.Parameter):
        t, near = sae.threshold, torch.zeros_like(p)
        near[((p.abs() if recipe.by_magnitude else p) - t).abs() < recipe.bandwidth / 2] = 1 / recipe.bandwidth
        moved = near * (t - t.detach())  # 0, with the kernel as its derivative
        # What opening a gate adds at its threshold.
        jump = torch.ones_like(p)
        if recipe.by_magnitude:
            jump = {"relu": p > 0, "signed": p.sign(), "absolute": jump}[recipe.output]
        dense[0] = dense[0] - t.detach() * jump * moved
        count = (torch.from_numpy(known.masks[0]).double() - moved).sum(1).mean()
    if recipe.soft_cap:
        dense = [recipe.soft_cap * torch.tanh(a / recipe.soft_cap) for a in dense]
    losses = []
    for a in dense:
        found = (a @ sae.atoms + sae.pre_bias) * spread + shift
        if recipe.loss == "mse":
            losses.append((found - u).square().mean())
        elif recipe.loss == "nmse":
            losses.append(((found - u).square().sum(1) / u.square().sum(1)).mean())
        else:
            losses.append((1 - torch.cosine_similarity(found, u)).square().mean())
    weights = torch.arange(len(losses), 0, -1) if recipe.weighting == "reverse" else torch.ones(len(losses))
    loss = (weights * torch.stack(losses)).sum() / weights.sum()
    penalty, weight = recipe.penalised()
    if penalty == "l1":
        loss = loss + weight * (dense[-1].abs().sum(1) / u.norm(dim=1)).mean()
    elif penalty == "tanh":
        loss = loss + weight * dense[-1].abs().tanh().sum(1).mean() / K
    elif penalty == "l0":
        loss = loss + weight * (count / K - 1).square()
    if known.dead.any():
        error = torch.from_numpy((known.u - known.levels[-1]) / known.spread)
        explained = (p.relu() * torch.from_numpy(known.dead)) @ sae.atoms
        loss = loss + recipe.aux * (error - explained).square().sum() / error.square().sum()
    return loss


@pytest.mark.parametrize("share", [1 / 16, 0.3, 2.0], ids=["dense", "mixed", "bags"])
@pytest.mark.parametrize("dead", [0, 3, 20])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_loss_and_gradients(case: dict[str, Any], dead: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "SPARSE_SHARE", share)
    recipe = Recipe(LATENTS, k=K, bandwidth=0.7, aux=0.5, **case)
    recipe.check()
    sae, x = drawn(recipe)
    marked = torch.arange(LATENTS) % 2 == 0
    marked[2 * dead :] = False
    known = derived(sae, recipe, x, marked.numpy())
    outcome = objective(sae, recipe, x, marked)
    assert float(outcome.loss.detach()) == pytest.approx(known.loss, rel=1e-9)
    np.testing.assert_allclose(outcome.error, known.u - known.levels[-1], atol=1e-9)
    outcome.loss.backward()
    found = {name: parameter.grad for name, parameter in sae.named_parameters()}
    sae.zero_grad(set_to_none=True)
    again = naive(sae, recipe, known)
    assert float(again.detach()) == pytest.approx(known.loss, rel=1e-9)
    again.backward()
    expected = {name: parameter.grad for name, parameter in sae.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_what_fired_is_told_and_the_dead_are_left_alone_where_asked() -> None:
    recipe = Recipe(LATENTS, k=K, dead="none")
    sae, x = drawn(recipe)
    dead = torch.arange(LATENTS) < 20
    code = sae.encode_sparse(x)
    expected = torch.zeros(LATENTS, dtype=torch.bool)
    expected[code.latents[code.activations > 0]] = True
    one, other = objective(sae, recipe, x, dead), objective(sae, recipe, x, ~dead)
    assert torch.equal(one.fired, expected)
    assert torch.equal(one.loss, other.loss)


@pytest.mark.parametrize("architecture", ["relu", "topk", "batchtopk", "jumprelu", "matryoshka", "matryoshka-prefixes"])
def test_a_batch_in_which_nothing_fires(architecture: str) -> None:
    """All that remains is the pre-bias."""
    recipe = Recipe(LATENTS, k=K, architecture=architecture, sparsity=0)
    sae, x = drawn(recipe)
    sae.state_dict()["latent_bias"].fill_(-1000)
    outcome = objective(sae, recipe, x, torch.zeros(LATENTS, dtype=torch.bool))
    expected = (sae.standardise(x) - sae.pre_bias).square().mean()
    assert float(outcome.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert not outcome.fired.any()
    outcome.loss.backward()
    assert sae.pre_bias.grad is not None
    assert sae.pre_bias.grad.any()


# ---- Recipes.


@pytest.mark.parametrize(
    ("fields", "total", "expected"),
    [
        ({"schedule": "linear"}, 10, [1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]),
        ({"schedule": "linear", "warmup": 4}, 10, [0.1, 0.325, 0.55, 0.775, 1, 1, 1, 1, 1, 0.5]),
        ({"schedule": "linear"}, 30, [1] * 25 + [5 / 6, 2 / 3, 1 / 2, 1 / 3, 1 / 6]),
        # MSAE's, with a warm-up of one epoch of ten.
        (
            {"schedule": "cosine", "warmup": 1},
            10,
            [0.1, 1, 0.9729, 0.8947, 0.775, 0.6281, 0.4719, 0.325, 0.2053, 0.1271],
        ),
        ({"schedule": "constant", "warmup": 2}, 5, [0.1, 0.55, 1, 1, 1]),
        ({"schedule": "cosine", "warmup": 9}, 3, [0.1, 0.2, 0.3]),
    ],
)
def test_the_pace_of_the_learning_rate(fields: dict[str, Any], total: int, expected: list[float]) -> None:
    recipe = Recipe(LATENTS, k=K, **fields)
    assert [pace(recipe, t, total) for t in range(total)] == pytest.approx(expected, abs=1e-4)


def test_levels_double_as_msaes_do() -> None:
    assert doubled(64, 6144) == (64, 128, 256, 512, 1024, 2048, 4096, 6144)
    assert doubled(64, 4096) == (64, 128, 256, 512, 1024, 2048, 4096)
    assert [len(doubled(64, n)) for n in (12288, 24576, 64, 65)] == [9, 10, 1, 2]
    assert Recipe(6144, architecture="matryoshka").sae(768).nested == doubled(64, 6144)
    assert Recipe(6144, architecture="matryoshka-prefixes").sae(768).nested == (384, 768, 1536, 3072, 6144)
    assert Recipe(10, k=3, architecture="matryoshka-prefixes").sae(4).nested == (1, 2, 4, 8, 10)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"architecture": "gated"}, "architecture gated: must be one of relu, topk, batchtopk"),
        ({"loss": "mae"}, "loss mae: must be one of mse, nmse, cosine"),
        ({"pre_bias": "mean"}, "pre_bias mean: must be one of zero, median"),
        ({"latents": 0}, "latents 0: must be at least 1"),
        ({"k": 0}, "k 0: must be at least 1"),
        ({"k": 41}, "k 41: there are only 40 latents"),
        ({"batch_size": 0}, "batch_size 0: must be at least 1"),
        ({"rate": -1e-3}, "rate -0.001: must be at least 0"),
        ({"warmup": -1}, "warmup -1: must be at least 0"),
        ({"dead_after": -1}, "dead_after -1: must be at least 0"),
        ({"soft_cap": -1.0}, "soft_cap -1.0: must be at least 0"),
        ({"seed": -1}, "seed -1: must be at least 0"),
        ({"epochs": 0.0}, "epochs 0.0: must be above 0"),
        ({"bandwidth": 0.0}, "bandwidth 0.0: must be above 0"),
        ({"ema": 1.0}, "ema 1.0: must be at least 0 and below 1"),
        ({"penalty": "l0"}, "penalty l0 needs thresholds that learn"),
        ({"architecture": "relu", "by_magnitude": True}, "by_magnitude needs the output signed or absolute"),
        ({"architecture": "relu", "output": "absolute", "k": 50}, "k 50: there are only 40 latents"),
        ({"nested": (5, 10)}, "topk has no nested levels"),
        ({"architecture": "matryoshka", "nested": (5, 5)}, "must ascend"),
        ({"architecture": "matryoshka", "nested": (5, 41)}, "to at most 40 latents"),
        ({"architecture": "matryoshka", "nested": (6, 40)}, "it must be k, which is 5"),
        ({"architecture": "matryoshka-prefixes", "nested": (5, 20)}, "it must be 40"),
        ({"architecture": "matryoshka-prefixes", "nested": (0, 40)}, "must ascend, from at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        Recipe(**{"latents": LATENTS, "k": K, **fields}).check()
    assert "\n" not in str(caught.value)
    assert re.split(r"\W", str(caught.value))[0] in {field.name for field in dataclasses.fields(Recipe)}
