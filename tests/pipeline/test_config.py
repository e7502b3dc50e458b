"""Every field says whether it changes results, and the fingerprint of a run is made of those that do."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jobs import collection, explain
from saecore.methods import Options
from saecore.pipeline.config import (
    EmbedConfig,
    ExplainConfig,
    ModelDigests,
    Part,
    SiteConfig,
    changes_results,
    parts_of,
    restored,
    said_of,
)
from saecore.requests import parse_targets
from saecore.runs.run import fingerprint
from tests.conftest import command

MODELS = ModelDigests("c" * 16, "5" * 16, "embedding")

CONFIG = ExplainConfig(clip="demo", sae="demo", k=12, targets=parse_targets(["kept", "concept:red"]))

OTHERS: dict[str, Any] = {
    "k": 13,
    "methods": ("chefer",),
    "targets": parse_targets(["kept", "concept:green"]),
    "concept_latents": 9,
    "concept_positive": True,
    "pool": "max",
    "options": Options(layers=2),
    "embeddings": True,
    "device": "cuda",
    "precision": "bfloat16",
}
"""Another value of every field that changes results by itself."""

OF_MODELS = {
    "clip": ModelDigests("d" * 16, *MODELS[1:]),
    "sae": MODELS._replace(sae="6" * 16),
    "site": MODELS._replace(site="x"),
    "head": MODELS._replace(head="7" * 16),
}
"""Other models, for the fields that only say where to find them."""


@pytest.mark.parametrize("settings", [EmbedConfig, SiteConfig, ExplainConfig, collection.Arguments, explain.Arguments])
def test_every_field_says_whether_it_changes_results(settings: type) -> None:
    """Arguments that have their name in the stage's configuration say it there."""
    there = {field.name for field in dataclasses.fields(ExplainConfig)} if settings is explain.Arguments else set()
    for field in dataclasses.fields(settings):
        if field.name not in there:
            said_of(field.name, field.metadata)


def test_a_field_that_does_not_say_is_a_mistake_of_the_programmer() -> None:
    @dataclasses.dataclass
    class Forgetful:
        k: int = dataclasses.field(default=1, metadata=changes_results(Part("k")))
        sharpness: float = 1.0

    with pytest.raises(TypeError, match="sharpness does not say whether it changes results"):
        parts_of(Forgetful())


def test_what_changes_results_changes_the_fingerprint_and_nothing_else_does() -> None:
    same: dict[str, Any] = {
        "batch_size": 3,
        "threads": 7,
        "clip": "elsewhere/demo",
        "sae": "elsewhere/sae",
        "site": "embedding",
        "head": "elsewhere/head",
    }
    assert OTHERS.keys() | same.keys() == {field.name for field in dataclasses.fields(ExplainConfig)}
    before = parts_of(CONFIG, MODELS)
    for name, value in same.items():
        assert parts_of(dataclasses.replace(CONFIG, **{name: value}), MODELS) == before, name
    for name, value in OTHERS.items():
        assert parts_of(dataclasses.replace(CONFIG, **{name: value}), MODELS) != before, name
    for name, models in OF_MODELS.items():
        assert parts_of(CONFIG, models) != before, name


def test_each_choice_of_vectors_changes_the_fingerprint_and_embeddings_have_none_of_them() -> None:
    """So runs of embeddings, which had no site, are resumed as they were; and a record gives back what was chosen."""
    assert parts_of(EmbedConfig(clip="demo"), MODELS) == {"clip": MODELS.clip, "dtype": "float32"}
    chosen = SiteConfig(clip="demo", site="layer1.residual:patches", tokens_per_image=4, seed=1)
    others: dict[str, Any] = {"site": "layer1.residual:all", "tokens_per_image": 5, "seed": 2}
    assert others.keys() == {field.name for field in dataclasses.fields(SiteConfig)} - {
        field.name for field in dataclasses.fields(EmbedConfig)
    }
    for name, value in others.items():
        assert parts_of(dataclasses.replace(chosen, **{name: value}), MODELS) != parts_of(chosen, MODELS), name
    assert restored("embed", dataclasses.asdict(chosen)) == chosen
    assert restored("embed", dataclasses.asdict(EmbedConfig(clip="demo"))) == EmbedConfig(clip="demo")


def test_a_precision_is_the_same_part_however_it_was_asked_for() -> None:
    """So a run that a GPU began goes on on a CPU, and a run of before the option goes on with it."""

    def part(device: str, precision: str) -> Any:
        return parts_of(dataclasses.replace(CONFIG, device=device, precision=precision), MODELS)

    assert part("cpu", "auto") == part("cpu", "float32") == part("cuda", "float32")
    assert part("cuda", "auto") == part("cuda", "bfloat16") == part("cpu", "bfloat16") != part("cpu", "auto")
    old = {name: value for name, value in dataclasses.asdict(CONFIG).items() if name != "precision"}
    assert restored("explain", old) == CONFIG


def test_options_change_the_fingerprint_each_by_itself() -> None:
    options: dict[str, Any] = {
        "layers": 1, "norm": "exact", "legrad_target": "cls", "legrad_correction": False, "gradeclip_cosine": "projected",
        "discard": 0.5, "dense": "value", "block": 2, "subsets": 128,
    }  # fmt: skip
    assert options.keys() == {field.name for field in dataclasses.fields(Options)}
    sampled = dataclasses.replace(CONFIG, methods=("shapley",))
    before = parts_of(sampled, MODELS)
    for name, value in options.items():
        assert parts_of(dataclasses.replace(sampled, options=Options(**{name: value})), MODELS) != before, name


def test_what_removal_brought_changes_no_older_fingerprint() -> None:
    """Neither its head nor the number of subsets is a part of runs by other methods."""
    assert parts_of(dataclasses.replace(CONFIG, options=Options(subsets=128)), MODELS) == parts_of(CONFIG, MODELS)
    assert "subsets" not in parts_of(CONFIG, MODELS)["options"]
    predicted = dataclasses.replace(CONFIG, methods=("removal",), head="demo")
    assert parts_of(predicted, MODELS)["method"] == "removal"
    assert parts_of(predicted, MODELS._replace(head="7" * 16))["method"] == "removal by the head 7777777777777777"
    old = {name: value for name, value in dataclasses.asdict(CONFIG).items() if name != "head"}
    del old["options"]["subsets"]
    assert restored("explain", old) == CONFIG


def test_fingerprints_are_what_they_were(shards: Path, local_run: Path, tmp_path: Path) -> None:
    """The parts as the first runs have them, but for `resize`, which fast runs have: theirs are resumed, not refused."""
    record = json.loads((local_run / "run.json").read_text())
    inputs = collection.Inputs(collection.Arguments(str(tmp_path / "run"), (str(shards),)), [str(shards)]).shards
    size = sum(shard.bytes for shard in inputs)
    assert record["parts"]["inputs"].startswith(f"3 shards, {size:,} bytes, ")
    assert record["parts"] == {
        "schema": 2,
        "dtype": "float32",
        "max-pixels": 178_000_000,
        "chunk-size": 8,
        "limit": 0,
        "resize": "fast",
        "inputs": record["parts"]["inputs"],
        "clip": "0f5f1246e158efc1",
        "sae": "33fe5634197cb1b8",
        "site": "embedding",
        "k": 12,
        "method": "contrib",
        "targets": ["kept"],
        "concepts": [],
        "norms": {"contrib": "frozen"},
        "options": {
            "layers": 0, "legrad_target": "mean", "legrad_correction": True, "gradeclip_cosine": "inside", "discard": 0.9,
            "dense": "token", "block": 1,
        },
        "embeddings": True,
    }  # fmt: skip
    assert record["fingerprint"] == fingerprint(record["parts"])


def test_another_setting_is_refused_and_another_speed_resumes(
    shards: Path, local_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain.main(command(shards, local_run, "--local", "--batch-size", "5")) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out
    assert explain.main(command(shards, local_run, "--local", "--max-pixels", "99")) == 2
    said = capsys.readouterr().err
    assert f"error: --out {local_run} holds a run made otherwise (max-pixels was 178000000, now 99)" in said
