"""The loss of a batch and its gradients, against a naive dense implementation; schedules; what a recipe refuses."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from saecore import objectives
from saecore.embeddings import Survey
from saecore.kernels import jump_relu, step
from saecore.objectives import objective
from saecore.recipe import Recipe, doubled, pace
from saecore.sae import SAE
from saecore.trainer import initial

D, N, B, K = 10, 48, 30, 4

CASES: list[dict[str, Any]] = [
    {"architecture": "topk"},
    {"architecture": "topk", "tied": True, "soft_cap": 1.5, "loss": "cosine"},
    {"architecture": "topk", "output": "signed", "by_magnitude": True, "penalty": "tanh", "sparsity": 0.1},
    {"architecture": "topk", "normalise": "layer_norm", "loss": "nmse"},
    {"architecture": "batchtopk", "normalise": "constant_norm"},
    {"architecture": "relu", "sparsity": 0.3},
    {"architecture": "relu", "tied": True, "penalty": "none"},
    {"architecture": "jumprelu", "bandwidth": 0.5},
    {"architecture": "jumprelu", "bandwidth": 0.5, "penalty": "l1", "normalise": "layer_norm"},
    {"architecture": "matryoshka", "nested": (4, 8, 16, 48)},
    {
        "architecture": "matryoshka",
        "nested": (4, 12),
        "weighting": "reverse",
        "output": "absolute",
        "by_magnitude": True,
    },
    {"architecture": "matryoshka", "nested": (4, 8, 40), "weighting": "reverse", "penalty": "l1"},
    {"architecture": "matryoshka-prefixes", "nested": (8, 20, 48), "weighting": "reverse"},
]


def made(choices: dict[str, Any]) -> tuple[Recipe, SAE, Tensor]:
    generator = torch.Generator().manual_seed(0)
    recipe = Recipe(latents=N, k=K, dead="none", **choices)
    recipe.check()
    x = torch.randn(B, D, generator=generator) + 2
    rows = x.numpy()
    sae = initial(recipe, D, Survey(B, rows.mean(0), 0.8, np.zeros(0, np.int64), rows, rows, False))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return recipe, sae, x


def naive(sae: SAE, recipe: Recipe, x: Tensor) -> Tensor:
    """One dense code and one dense decode a nested level, as the papers write it."""
    c = sae.config
    u = (x - sae.mean) * sae.scale
    shift, spread = torch.zeros(B, 1), torch.ones(B, 1)
    if c.normalise == "layer_norm":
        shift, spread = u.mean(1, keepdim=True), u.std(1, keepdim=True)
        v = (u - shift) / (spread + 1e-5)
    else:
        spread = (u.square().mean(1, keepdim=True)).sqrt() if c.normalise == "constant_norm" else spread
        v = u / spread
    p = (v - sae.pre_bias) @ sae.encoder + sae.latent_bias
    strength = p.abs() if c.by_magnitude else p

    def value(p: Tensor) -> Tensor:
        out = {"relu": p.relu(), "signed": p, "absolute": p.abs()}[c.output]
        return c.soft_cap * torch.tanh(out / c.soft_cap) if c.soft_cap else out

    def best(k: int) -> Tensor:
        return torch.zeros_like(p).scatter(1, strength.topk(k, dim=1).indices, 1.0)

    cost = torch.zeros(())
    if c.architecture == "topk":
        codes = [value(p) * best(k) for k in c.nested or (c.k,)]
    elif c.architecture == "batchtopk":
        kept = strength >= strength.flatten().topk(c.k * B).values.min()
        codes = [value(p) * kept * (torch.arange(N) < size) for size in c.nested or (N,)]
    elif c.architecture == "relu":
        codes = [value(p)]
    else:
        assert sae.threshold is not None
        # Nothing after it: a ReLU would cut off what the threshold learns from latents just below it.
        codes = [jump_relu(p, sae.threshold, recipe.bandwidth)]
        if recipe.penalised()[0] == "l0":
            cost = (step(p, sae.threshold, recipe.bandwidth).sum(1).mean() / K - 1) ** 2
    if recipe.penalised()[0] == "l1":
        cost = (codes[-1].abs().sum(1) / u.norm(dim=1)).mean()
    elif recipe.penalised()[0] == "tanh":
        cost = torch.tanh(codes[-1].abs()).sum(1).mean() / K
    atoms = sae.encoder.T if sae.decoder is None else sae.decoder
    losses = []
    for code in codes:
        back = (code @ atoms + sae.pre_bias) * spread + shift
        losses.append(
            {
                "mse": ((back - u) ** 2).mean(),
                "nmse": (((back - u) ** 2).sum(1) / (u**2).sum(1)).mean(),
                "cosine": ((1 - F.cosine_similarity(back, u)) ** 2).mean(),
            }[recipe.loss]
        )
    weights = [len(codes) - i if recipe.weighting == "reverse" else 1 for i in range(len(codes))]
    total = sum((w * loss for w, loss in zip(weights, losses, strict=True)), torch.zeros(()))
    return total / sum(weights) + recipe.penalised()[1] * cost


@pytest.mark.parametrize("share", [1 / 16, 2.0], ids=["dense-levels", "bags"])
@pytest.mark.parametrize("choices", CASES, ids=str)
def test_loss_and_gradients_equal_a_naive_implementation(
    choices: dict[str, Any], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "SPARSE_SHARE", share)
    recipe, sae, x = made(choices)
    outcome = objective(sae, recipe, x, torch.zeros(N, dtype=torch.bool))
    outcome.loss.backward()
    ours = {name: parameter.grad for name, parameter in sae.named_parameters()}
    sae.zero_grad(set_to_none=True)
    expected = naive(sae, recipe, x)
    expected.backward()
    torch.testing.assert_close(outcome.loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_auxiliary_loss_reaches_dead_latents_only() -> None:
    _, sae, x = made({"architecture": "topk"})
    dead = torch.zeros(N, dtype=torch.bool)
    dead[:20] = True
    gradients = []
    for remedy in ("none", "aux"):
        sae.zero_grad(set_to_none=True)
        objective(sae, Recipe(latents=N, k=K, dead=remedy), x, dead).loss.backward()
        assert sae.decoder is not None
        assert sae.decoder.grad is not None
        gradients.append(sae.decoder.grad.clone())
    changed = (gradients[1] - gradients[0]).abs().amax(1) > 1e-9
    assert changed[:20].sum() >= 5
    assert not changed[20:].any()


@pytest.mark.parametrize(
    ("first", "last", "levels"),
    [
        (64, 6144, (64, 128, 256, 512, 1024, 2048, 4096, 6144)),
        (64, 4096, (64, 128, 256, 512, 1024, 2048, 4096)),
        (5, 5, (5,)),
        (10, 160, (10, 20, 40, 80, 160)),
    ],
)
def test_nested_levels_are_msaes(first: int, last: int, levels: tuple[int, ...]) -> None:
    assert doubled(first, last) == levels
    assert len(doubled(64, 12288)) == 9
    assert len(doubled(64, 24576)) == 10


def test_the_course_of_the_learning_rate() -> None:
    linear = [pace(Recipe(latents=64), t, 10) for t in range(10)]
    assert linear == pytest.approx([1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5])
    assert [pace(Recipe(latents=64), t, 20) for t in range(16, 20)] == pytest.approx([1, 0.75, 0.5, 0.25])
    cosine = [pace(Recipe(latents=64, schedule="cosine", warmup=1), t, 10) for t in range(10)]
    expected = [0.1, 1, 0.9729, 0.8947, 0.775, 0.6281, 0.4719, 0.325, 0.2053, 0.1271]
    assert cosine == pytest.approx(expected, abs=1e-4)
    assert [pace(Recipe(latents=64, schedule="constant", warmup=4), t, 9) for t in (0, 2, 4, 8)] == [0.1, 0.55, 1, 1]


@pytest.mark.parametrize(
    ("choices", "complaint"),
    [
        ({"architecture": "gated"}, "--architecture gated: must be one of"),
        ({"loss": "mae"}, "--loss mae: must be one of"),
        ({"k": 65}, "--k 65: there are only 64 latents"),
        ({"penalty": "l0"}, "needs thresholds that learn"),
        ({"nested": (4, 8)}, "topk has no nested levels"),
        ({"architecture": "matryoshka", "k": 4, "nested": (8, 4)}, "must ascend"),
        ({"architecture": "matryoshka", "k": 4, "nested": (8, 16)}, "must be --k 4"),
        ({"architecture": "matryoshka-prefixes", "nested": (8, 16)}, "must be 64"),
        ({"by_magnitude": True}, "--by-magnitude needs --output"),
        ({"ema": 1.0}, "--ema 1.0"),
        ({"epochs": 0}, "--epochs 0: must be above 0"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(choices: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Recipe(**{"latents": 64, **choices}).check()
