"""benchmarks maps: the naive ways make our maps, the arithmetic of rows by hand, tables of the embedded model's shape."""

import json
from typing import Any

import pytest
import torch

from benchmarks import maps, naive_maps
from benchmarks.__main__ import main
from saecore.methods import OF_EMBEDDING
from saecore.relevance.explain import explain_latents
from tests.helpers.mistakes import mistake
from tests.helpers.towers import SHAPES, random_pixels, random_sae, random_tower


@pytest.mark.parametrize("shape", SHAPES)
def test_naive_ways_give_our_maps(shape: dict[str, Any]) -> None:
    """All, images of a batch with latents of their own, and the model that they share weights with stays as it was."""
    model, tower = random_tower(**shape)
    sae, pixels = random_sae(), random_pixels(tower, 3)
    latents = torch.randint(0, 96, (3, 5), generator=torch.Generator().manual_seed(3))
    plain = naive_maps.with_plain_attention(model)
    assert model.config._attn_implementation == "sdpa"
    with torch.inference_mode():
        ours = explain_latents(tower, sae, pixels, latents, ("chefer", "rollout"))
    ways = dict.fromkeys((naive_maps.once, naive_maps.repeated, naive_maps.each), "chefer")
    for way, method in (ways | {naive_maps.rolled: "rollout"}).items():
        theirs, relevance = way(plain, sae, tower.normalise(pixels), latents), ours[method].relevance
        assert (theirs - relevance).abs().max() / relevance.abs().max() < 1e-5, way
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_one_naive_way_has_gradients_of_parameters_computed() -> None:
    """And that of every one on the way: by a hook on each, which runs where a gradient arrives."""
    model, tower = random_tower()
    sae, images = random_sae(), tower.normalise(random_pixels(tower, 2))
    plain, arrived = naive_maps.with_plain_attention(model), set[str]()
    for name, parameter in plain.named_parameters():
        parameter.register_hook(lambda gradient, name=name: arrived.add(name))
    for way in (naive_maps.once, naive_maps.repeated):
        way(plain, sae, images, torch.tensor([[3], [5]]))
        assert not arrived
    naive_maps.each(plain, sae, images, torch.tensor([[3], [5]]))
    assert arrived == {name for name, _ in plain.named_parameters()}


def test_rows_by_hand() -> None:
    """A machine that grows slower: each round's times are of that round's speed, and only ratios within it are the ways'."""
    once = {
        "forward": 2.0,
        "transformers": 2.5,
        "contrib": 2.2,
        "dense": 2.6,
        "attention": 2.03,
        "naive each": 120.0,
    }
    seconds = {name: [taken * slow for slow in (1.0, 1.5, 1.1)] for name, taken in once.items()}
    seconds["contrib"][1] *= 3  # something else went on
    seconds["naive each"] = seconds["naive each"][:1]
    bounds = {"contrib": 1.05, "dense": 1.05, "attention": 1.0}
    rows = {name: maps.row_of(name, seconds, bounds) for name in seconds}
    assert {name: row.seconds for name, row in rows.items()} == once
    assert [row.timed for row in rows.values()] == [3, 3, 3, 3, 3, 1]
    assert rows["contrib"].forwards == pytest.approx(1.1)
    assert rows["contrib"].cheaper == pytest.approx(120 / 2.2)
    assert [rows[name].met for name in bounds] == [
        False,
        True,
        True,
    ]  # dense by transformers, attention within the noise
    assert [rows[name].cheap for name in bounds] == [True, False, True]
    assert rows["naive each"].bound is rows["forward"].met is None
    without = maps.row_of("contrib", {"forward": [2.0], "transformers": [2.5], "contrib": [2.2]}, bounds)
    assert without.cheaper is without.cheap is None
    printed = maps.table(list(rows.values())).splitlines()
    assert len({len(line) for line in printed}) == 1
    assert [cell.strip() for cell in printed[5].split("|")[4:8]] == [
        "1.040",
        "1.05 of transformers",
        "yes",
        "46.2 < 50",
    ]


def test_what_is_dear_is_timed_less_often() -> None:
    """A clock that each way turns on by what it costs; 50 forwards are timed once, 2 every time."""
    clock, order = [0.0], list[str]()

    def takes(name: str, seconds: float) -> None:
        clock[0] += seconds
        order.append(name)

    ways = {
        name: (lambda name=name, cost=cost: takes(name, cost)) for name, cost in (("f", 1), ("two", 2), ("fifty", 50))
    }
    timed = maps.time_in_turn(ways, 8, lambda: clock[0])
    assert timed == {"f": [1] * 8, "two": [2] * 8, "fifty": [50]}
    assert order != sorted(order, key=list(ways).index)


def test_a_table_of_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    asked = ["maps", "--shapes", "demo", "--batch-size", "2", "--rounds", "1", "--threads", "1", "--latents", "300"]
    assert main([*asked, "--k", "4", "--naive-latents", "1", "--json"]) == 0
    assert torch.get_num_threads() == threads
    answer = json.loads(capsys.readouterr().out)
    (table,) = answer["tables"]
    rows = {row["way"]: row for row in table.pop("rows")}
    assert table == {"shape": "demo", "batch_size": 2, "device": "cpu", "threads": 1}
    assert list(rows)[:2] == ["forward", "transformers"]
    assert {*OF_EMBEDDING} - {*rows} == {"occlusion", "shapley"}
    assert {*rows} - {*OF_EMBEDDING} == {
        "forward",
        "transformers",
        "legrad cls, 1 layer",
        "occlusion 8x8",
        *maps.NAIVE,
    }
    assert all(row[name] > 0 for row in rows.values() for name in ("seconds", "forwards", "transformers", "cheaper"))
    assert rows["forward"]["forwards"] == rows["transformers"]["transformers"] == rows["naive each"]["cheaper"] == 1
    assert {row["bound"] for row in rows.values()} == {None}  # bounds are on 32 latents of the large shapes
    assert main([*asked, "--method", "chefer", "--naive-latents", "0"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[2] == "demo, 2 images at once, k = 32; cpu, 1 thread, CPU time"
    assert [line.split("|")[1].strip() for line in printed[5:]] == ["forward", "transformers", "chefer"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "B/33"], "--shapes B/33: must be of B/32, B/16, L/14, demo"),
        (["--methods", "contrib,lrp"], "--method lrp: must be one or several"),
        (["--k", "40", "--latents", "30"], "--k 40: the SAE has --latents 30"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--naive-latents", "-1"], "--naive-latents -1: must be at least 0"),
        (["--threads", "0"], "--threads (0,): at least one number, none below 1"),
        (["--device", "tpu"], "--device tpu: must be cpu, or cuda on a machine that has a GPU"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(main, ["maps", *arguments], capsys).startswith(said)
