"""jobs.measure: figures of any SAE on any embeddings, calibration and conversion, one sentence for a mistake."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import embed, measure
from saecore.checkpoints import load_sae
from saecore.quality import quality
from saecore.sae import from_tensors
from tests.towers import random_sae


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows_900_24.npy"
    np.random.default_rng(0).normal(size=(900, 24)).astype(np.float32).tofile(path)
    return path


def measured(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert measure.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_figures_are_those_of_the_library(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = random_sae()
    sae.save(tmp_path)
    command = ["--sae", str(tmp_path), "--embeddings", str(rows), "--ks", "4", "8", "--against", str(tmp_path)]
    found = measured(capsys, *command)
    x = torch.from_numpy(np.fromfile(rows, np.float32).reshape(900, 24))
    assert found["quality"] == pytest.approx(quality(sae, x)._asdict())
    assert [row["k"] for row in found["recovery"]] == [4, 8]
    assert found["alignment"]["same"] == 1
    assert measure.main(command) == 0
    assert "agreement with the other SAE" in capsys.readouterr().out


def test_a_batchtopk_sae_is_calibrated_and_saved(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = random_sae()
    config = dataclasses.replace(demo.config, architecture="batchtopk", k=6)
    from_tensors(config, {**demo.state_dict(), "threshold": torch.tensor(torch.nan)}, "test").save(tmp_path / "raw")
    out = str(tmp_path / "saved")
    found = measured(capsys, "--sae", str(tmp_path / "raw"), "--embeddings", str(rows), "--save", out)
    assert found["quality"]["l0"] == pytest.approx(6, rel=0.02)
    saved = load_sae(out)
    assert saved.threshold is not None
    assert float(saved.threshold) == pytest.approx(found["calibrated_threshold"])


def test_classes_are_seen_in_the_reconstruction(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scenes by the colour of their largest object, through the words of a vocabulary."""
    from saecore.demo import scenes
    from tests.conftest import N_SCENES

    (tmp_path / "colours.txt").write_text("\n".join(scenes.COLOURS))
    truth = [scenes.scene_at(scenes.SEED_DEMO, index).things[0].colour for index in range(N_SCENES)]
    (tmp_path / "labels.txt").write_text("\n".join(truth))
    texts, images = str(tmp_path / "texts"), str(tmp_path / "images")
    assert embed.main(["--text", str(tmp_path / "colours.txt"), "--clip", "demo", "--out", texts]) == 0
    assert embed.main(["--images", str(shards), "--clip", "demo", "--out", images, "--local"]) == 0
    capsys.readouterr()
    more = ["--labels", str(tmp_path / "labels.txt"), "--texts", texts]
    found = measured(capsys, "--sae", "demo", "--embeddings", images, *more)
    assert found["zero_shot"]["accuracy"] > 0.9
    assert found["zero_shot"]["accuracy_reconstructed"] > 0.8
    assert found["linear_probe"]["same"] > 0.5
    (tmp_path / "labels.txt").write_text("\n".join(["beige", *truth[1:]]))
    assert measure.main(["--sae", "demo", "--embeddings", images, *more]) == 2
    assert "'beige' is none of the words" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--sae", "demo"], "takes embeddings of width 128"),
        (["--sae", "nowhere"], "no such file or folder"),
        (["--rows", "3"], "--rows 3: must be at least 16"),
        (["--ks", "0"], "each must be at least 1"),
        (["--labels", "nowhere.txt"], "--labels nowhere.txt cannot be read"),
        (["--texts", "nowhere"], "no texts.parquet there"),
        (["--against", "demo"], "they cannot be compared"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], complaint: str
) -> None:
    random_sae().save(tmp_path)
    assert measure.main(["--sae", str(tmp_path), "--embeddings", str(rows), *more]) == 2
    said = capsys.readouterr()
    assert complaint in said.err
    assert said.err.count("\n") == 1
