"""benchmarks train: the dense loop takes the steps that ours takes, and the figures are what they say."""

import json

import numpy as np
import pytest
import torch

from benchmarks import training
from benchmarks.__main__ import main
from benchmarks.naive import DenseTopK
from saecore.training.recipe import Recipe, doubled
from saecore.training.survey import Survey
from saecore.training.trainer import Trainer, Worker

WIDTH, LATENTS, K, BATCH = 12, 40, 3, 32


@pytest.mark.parametrize(("architecture", "levels"), [("topk", (K,)), ("matryoshka", doubled(K, LATENTS))])
def test_the_dense_loop_takes_the_same_steps(architecture: str, levels: tuple[int, ...]) -> None:
    """Loss by loss and weight by weight, in double precision: what is timed against each other is the same work.

    Three steps, since the second is the first that sees decoder rows and moments after a step.
    """
    batches = (
        np.random.default_rng(0).normal(size=(3, BATCH, WIDTH)).astype(np.float32)
    )  # what ours rounds embeddings to
    seen = Survey(BATCH, np.zeros(WIDTH, np.float32), 1.0, np.zeros(0, np.int64), batches[0], batches[0], False)
    recipe = Recipe(latents=LATENTS, architecture=architecture, k=K, rate=5e-4, batch_size=BATCH, dead="none")
    ours = Trainer(recipe, WIDTH, seen, Worker())
    ours.sae.double()
    dense = DenseTopK(WIDTH, LATENTS, levels).double()
    with torch.no_grad():
        for name in ("encoder", "decoder", "pre_bias", "latent_bias"):
            getattr(dense, name).copy_(getattr(ours.sae, name))
    for batch in batches:
        assert ours.train(batch, 1000) == pytest.approx(dense.train_step(torch.from_numpy(batch).double()), rel=1e-12)
        for name, weights in dense.named_parameters():
            torch.testing.assert_close(getattr(ours.sae, name), weights, rtol=1e-9, atol=1e-12)


def test_steps_are_timed_in_turn_and_the_first_of_each_is_not_counted() -> None:
    """A clock that each step turns on by what it costs: the first takes a hundred times as long as the others."""
    now, order = [0.0], list[str]()

    def takes(name: str, seconds: float) -> None:
        now[0] += seconds * (1 if name in order else 100)
        order.append(name)

    steps = {"dense": lambda: takes("dense", 3.0), "ours": lambda: takes("ours", 1.0)}
    assert training.time_in_turn(steps, 2, lambda: now[0]) == {"dense": [3, 3], "ours": [1, 1]}
    assert order == ["dense", "ours"] * 3


@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ratios are those of its speeds, each against the loop that does the same work. A process starts for each memory."""
    asked = ["train", "--width", "12", "--latents", "40", "--k", "3", "--batch-size", "32", "--rounds", "3"]
    assert main([*asked, "--architectures", "topk", "matryoshka", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["dense topk", "dense matryoshka", "topk", "matryoshka"]
    for name, row in rows.items():
        dense = rows[name if name.startswith("dense") else f"dense {name}"]
        assert row["times_dense"] == pytest.approx(row["images_per_second"] / dense["images_per_second"])
        assert row["images_per_second"] > 0
        assert 20e6 < row["peak_bytes"] < 4e9  # a Python with PyTorch
    monkeypatch.setattr(training, "measure", lambda *_: [*rows.values()])
    assert main(asked) == 0
    table = capsys.readouterr().out.splitlines()[1:]
    assert len({len(line) for line in table}) == 1
    assert [line.split("  ")[0] for line in table[1:]] == list(rows)
