"""benchmarks.demo: scenes drawn, figures printed and methods drawn, at toy size. Training has `tests/demo/test_build.py`."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import demo
from saecore.demo import scenes
from saecore.demo.build import ClipBuild
from saecore.methods import OF_EMBEDDING


def test_scenes_are_those_of_the_saes_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["scenes", "--scenes", "5", "--shards", "2", "--out", str(tmp_path)])
    assert capsys.readouterr().out == f"5 scenes in 2 tars; written to {tmp_path}\n"
    with tarfile.open(tmp_path / "shard-001.tar") as tar:
        record = tar.extractfile("000004.json")
        assert record is not None
        assert scenes.scene_at(scenes.SEED_SAE, 4).caption in record.read().decode()


def test_figures_of_the_committed_models(capsys: pytest.CaptureFixture[str]) -> None:
    """As the head of `benchmarks/demo.py` has them, but for what 200 scenes instead of 4,000 blur."""
    demo.main(["evaluate", "--scenes", "200"])
    figures = {line[:26].strip(): float(line[26:]) for line in capsys.readouterr().out.splitlines()}
    assert figures.pop("latents following a word") == pytest.approx(8, abs=2)
    published = {
        "single colour": 1.0,
        "single shape": 0.991,
        "mixed colour": 1.0,
        "mixed shape": 0.974,
        "cosine": 0.985,
    }
    assert {name: figures[name] for name in published} == pytest.approx(published, abs=0.04)
    # Every latent fires for some of 4,000 scenes, so fewer of 200 leave more of them silent.
    assert 0 <= figures["dead"] < 0.2


def test_a_scene_under_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["methods", "--side", "40", "--choosing", "200", "--out", str(tmp_path / "methods.png")])
    caption = scenes.scene_at(scenes.SEED_DEMO, 12).caption
    assert capsys.readouterr().out == f"scene 12: {caption}; written to {tmp_path / 'methods.png'}\n"
    picture = np.asarray(Image.open(tmp_path / "methods.png").convert("RGB"))
    assert picture.shape[0] > 3 * 40  # a row for each of its three objects
    assert picture.shape[1] > (1 + len(OF_EMBEDDING)) * 40
    assert picture.std() > 10


def test_the_clip_command_hands_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ClipBuild] = []
    monkeypatch.setattr(demo, "train_clip", given.append)
    demo.main(["clip", "--minutes", "3", "--batch", "8"])
    assert given == [ClipBuild(minutes=3, batch=8)]
