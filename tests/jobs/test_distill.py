"""`relmap distill`, and maps by what it trained: resumed as if it had not been stopped, refused where it does not belong."""

import json
from pathlib import Path

import pytest
import torch

from jobs import distill, explain, remade, verify
from saecore.pipeline.config import parts_of, restored
from saecore.query.tables import open_dataset
from saecore.removal.distillation import Distillation
from saecore.removal.saved import load_head
from saecore.runs.record import read_record
from tests.conftest import N_SCENES, command
from tests.helpers.mistakes import mistake
from tests.helpers.towers import random_head, random_tower

SMALL = [
    "--clip", "demo", "--steps", "6", "--images-per-step", "4", "--subsets", "4", "--width", "32", "--blocks", "1",
    "--held-out", "2", "--held-out-subsets", "1280", "--checkpoint-minutes", "0",
    "--precision", "bfloat16",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head that was trained without a stop."""
    out = tmp_path_factory.mktemp("heads") / "head"
    assert distill.main(["--images", str(shards), "--out", str(out), *SMALL]) == 0
    return out


def test_it_says_how_good_the_head_is_and_does_nothing_twice(
    trained: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((trained / "distill.json").read_text())
    assert record["images"] + record["held_out"] == N_SCENES
    assert record["error_of_sampling"] > 0
    assert record["error"] > 0
    assert -1 <= record["rank_agreement"] <= 1
    before = (trained / "head.safetensors").read_bytes()
    assert distill.main(["--images", str(shards), "--out", str(trained), *SMALL]) == 0
    said = capsys.readouterr().out
    assert "is complete: nothing to do" in said
    assert f"Use it: --method removal --head {trained}" in said
    assert (trained / "head.safetensors").read_bytes() == before


def test_a_training_that_was_stopped_ends_at_the_same_weights(
    trained: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, step = tmp_path / "head", Distillation.step

    def until_the_fourth(course: Distillation) -> float:
        if course.done == 3:
            raise KeyboardInterrupt
        return step(course)

    words = ["--images", str(shards), "--out", str(out), *SMALL]
    monkeypatch.setattr(Distillation, "step", until_the_fourth)
    assert distill.main(words) != 0
    assert not (out / "head.safetensors").exists()
    monkeypatch.setattr(Distillation, "step", step)
    assert distill.main(words) == 0
    assert (out / "head.safetensors").read_bytes() == (trained / "head.safetensors").read_bytes()


def test_maps_of_removal_in_a_run(trained: Path, shards: Path, tmp_path: Path) -> None:
    """By the head of the demo and by one of one's own, with Shapley values besides."""
    runs = {}
    for name, more in {"demo": [], "own": ["--head", str(trained)]}.items():
        runs[name] = out = tmp_path / name
        asked = ["--local", "--limit", "4", "--method", "removal,shapley", "--subsets", "128", *more]
        assert explain.main([*command(shards, out), *asked]) == 0
        record = json.loads((out / "run.json").read_text())
        assert record["worst_completeness_error"] < 1e-5
        assert record["parts"]["method"].startswith("removal,shapley by the head ")
        assert record["parts"]["options"]["subsets"] == 128
        config = restored("explain", record["config"])
        digests = remade.models(str(out), config).digests
        assert parts_of(config, digests).items() <= record["parts"].items()  # what a retry compares
    maps = {name: open_dataset(str(out), "maps").to_table().to_pylist() for name, out in runs.items()}
    assert [row["method"] for row in maps["demo"]] == [row["method"] for row in maps["own"]]
    for one, other in zip(maps["demo"], maps["own"], strict=True):
        sampled = one["method"] == "shapley"
        assert (one["map"] == other["map"]) == sampled == (one["standard_error"] is not None)
        assert not sampled or 0 < one["standard_error"] < 127 * one["scale"]
    assert verify.main([str(runs["own"])]) == 0


def test_mistakes(trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def of_explain(*more: str) -> str:
        return mistake(explain.main, [*command(shards, tmp_path / "run"), "--local", *more], capsys)

    only = f"--head {trained}: only the method removal takes one"
    assert of_explain("--head", str(trained), "--method", "contrib") == only
    assert "no head of removal there" in of_explain("--method", "removal", "--head", str(shards))
    assert "--subsets 12: do not tell the values of this model's 64 patches" in of_explain(
        "--method", "shapley", "--subsets", "12"
    )
    tokens = ["--sae", "demo-patches", "--pool", "max", "--method", "removal"]
    assert "--method removal: has no meaning for an SAE that reads the tokens" in of_explain(*tokens)
    _, other = random_tower()
    from saecore.removal.saved import save_head

    save_head(random_head(other), str(tmp_path / "other"))
    said = of_explain("--method", "removal", "--head", str(tmp_path / "other"))
    assert said.startswith(f"--head {tmp_path}/other: it was trained on the model ")
    words = ["--images", str(shards), "--out", str(trained), *SMALL]
    assert "was trained otherwise (recipe)" in mistake(distill.main, [*words, "--steps", "7"], capsys)
    words = ["--images", str(shards), "--out", str(tmp_path / "new"), *SMALL]
    assert "--subsets 5: must be even" in mistake(distill.main, [*words, "--subsets", "5"], capsys)
    assert "a head is of one vector" in mistake(distill.main, [*words, "--site", "layer1.residual:patches"], capsys)


def test_a_head_is_used_if_no_method_is_named(trained: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert explain.main([*command(shards, out), "--local", "--limit", "2", "--head", str(trained)]) == 0
    assert read_record(str(out)).methods == ["removal"]


def test_without_a_head_another_clip_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only of the embedded model is the head known."""
    import shutil

    from saecore.hub import DEMO_CLIP

    shutil.copytree(DEMO_CLIP, tmp_path / "clip")
    words = [*command(shards, tmp_path / "run"), "--local", "--method", "removal", "--clip", str(tmp_path / "clip")]
    words.remove("demo")  # that of --clip, which comes first
    words.remove("--clip")
    assert mistake(explain.main, words, capsys).startswith("--method removal: needs a head")


def test_a_training_may_begin_with_another_head(
    trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its weights and its metric; of another size there is none to begin with."""
    words = ["--images", str(shards), *SMALL, "--start", str(trained), "--out", str(tmp_path / "head")]
    assert "its width is 32, and 64 is asked for" in mistake(distill.main, [*words, "--width", "64"], capsys)
    assert distill.main([*words, "--rate", "1e-9", "--seed", "4"]) == 0
    one, other = (load_head(str(folder)).state_dict() for folder in (trained, tmp_path / "head"))
    assert all(torch.allclose(tensor, other[name], rtol=1e-2, atol=1e-3) for name, tensor in one.items())
