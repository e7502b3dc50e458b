"""An SAE that reads CLS after a layer: from images to pages, beside transformers' hidden states and an SAE in NumPy."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CLIPVisionModelWithProjection

from jobs import explain, measure, name, report, run
from saecore.hub import DEMO_CLIP
from saecore.query import results
from saecore.runs.files import open_dataset
from saecore.sae.checkpoints import load_sae
from saecore.towers.loading import load_tower
from tests.conftest import N_SCENES, command
from tests.helpers.mistakes import mistake
from tests.helpers.towers import hidden_state, random_sae

SITE, LAYER, K = "layer2.residual:cls", 2, 5


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide as the demo's stream, which is as wide as its embeddings: no width tells the two apart."""
    folder = tmp_path_factory.mktemp("inner") / "sae"
    made, tower = random_sae(n_inputs=128, n_latents=64, k=K), load_tower("demo")
    made.config = dataclasses.replace(made.config, site=SITE, model="demo", model_sha256=tower.sha256()[:16])
    made.save(folder)
    return folder


@pytest.fixture(scope="module")
def inner(sae: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By `run`, which keeps embeddings where it can, and with a vocabulary."""
    out = tmp_path_factory.mktemp("inner") / "run"
    given = ["--images", str(shards), "--clip", "demo", "--sae", str(sae), "--out", str(out), "--local"]
    words = ["--method", "contrib,contrib_grad,occlusion", "--allow-poor-fit", "--vocabulary", str(_words(out.parent))]
    assert run.main([*given, *words]) == 0
    return out


def rows(run: Path, table: str) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = open_dataset(str(run), table).to_table().to_pylist()
    return listed


def _words(folder: Path) -> Path:
    (folder / "words.txt").write_text("red\ngreen\nblue\n")
    return folder / "words.txt"


def test_kept_latents_are_those_of_a_numpy_sae_on_hidden_states(inner: Path, sae: Path, shards: Path) -> None:
    tables = results.open(str(inner)).tables
    model = CLIPVisionModelWithProjection.from_pretrained(DEMO_CLIP).eval()
    tower, own = load_tower("demo"), load_sae(str(sae))
    kept = rows(inner, "activations")
    images = [row for row in rows(inner, "images") if row["error"] is None]
    assert len(images) == N_SCENES
    for raw in tables.originals([row["image_id"] for row in images[:6]]):
        for row in raw.to_pylist():
            hidden = hidden_state(model, tower, row["data"], LAYER)[0]
            x = (hidden.astype(float) - own.mean.numpy()) * float(own.scale) - own.pre_bias.numpy()
            pre = x @ own.encoder.double().numpy() + own.latent_bias.numpy()
            expected = np.argsort(-pre)[:K]
            ours = sorted((r for r in kept if r["image_id"] == row["image_id"]), key=lambda r: r["rank"])
            assert [r["latent"] for r in ours] == expected.tolist()
            np.testing.assert_allclose([r["pre_activation"] for r in ours], pre[expected], rtol=1e-4)


def test_maps_add_up_and_the_record_says_where(inner: Path) -> None:
    record = results.open(str(inner)).record
    assert record.sae["site"] == record.parts["site"] == SITE
    assert not record.has_words
    assert record.keeps_embeddings
    assert record.worst_completeness_error is not None
    assert 0 < record.worst_completeness_error < 2e-5
    assert {row["method"] for row in rows(inner, "maps")} == {"contrib", "contrib_grad", "occlusion"}


def test_the_embedding_is_the_whole_tower_s(inner: Path, local_run: Path) -> None:
    ours, theirs = (sorted(rows(run, "images"), key=lambda row: row["image_id"]) for run in (inner, local_run))
    np.testing.assert_allclose(
        [row["embedding"] for row in ours], [row["embedding"] for row in theirs], rtol=1e-4, atol=1e-4
    )


def test_latents_there_are_named_by_data_only(
    inner: Path, sae: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run` was given a vocabulary. Pages propose no command that would be refused."""
    latents = results.open(str(inner)).latents.to_pylist()
    named = [row for row in latents if row["name"]]
    assert len(named) >= 20
    assert all(row["by_data"] and row["name"] == row["data_name"] for row in named)
    assert {row["direction_name"] for row in latents} == {None}
    assert report.main(["--run", str(inner), "--out", str(tmp_path / "pages")]) == 0
    page = (tmp_path / "pages" / "index.html").read_text()
    assert SITE in page
    assert "text:A PHRASE" not in page
    said = mistake(name.main, ["--run", str(inner), "--by", "decoder"], capsys)
    assert "inside the tower, where names are by data only" in said
    given = ["--images", str(shards), "--clip", "demo", "--sae", str(sae), "--out", str(tmp_path / "run"), "--local"]
    assert explain.main([*given, "--allow-poor-fit", "--limit", "8"]) == 0
    assert "jobs.name" not in capsys.readouterr().out
    said = mistake(name.main, ["--run", str(tmp_path / "run")], capsys)
    assert "that needs a run of jobs.explain --keep-embeddings" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--targets", "kept", "text:red"], "--targets 'red': the SAE reads layer2.residual:cls, inside the tower"),
        (["--targets", "concept:red"], "--targets 'red': the SAE reads layer2.residual:cls, inside the tower"),
        (["--site", "layer3.residual:cls"], "which is not the same as the given site layer3.residual:cls"),
    ],
)
def test_what_has_no_sense_there_is_refused(
    more: list[str], said: str, sae: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--images", str(shards), "--clip", "demo", "--sae", str(sae), "--out", str(tmp_path / "run"), "--local"]
    assert said in mistake(explain.main, [*given, *more], capsys)
    assert not (tmp_path / "run").exists()


def test_a_layer_that_the_model_does_not_have(
    sae: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((sae / "config.json").read_text())
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "config.json").write_text(json.dumps(config | {"site": "layer5.residual:cls"}))
    (tmp_path / "sae" / "sae.safetensors").write_bytes((sae / "sae.safetensors").read_bytes())
    given = [*command(shards, tmp_path / "run", "--local"), "--sae", str(tmp_path / "sae")]
    said = mistake(explain.main, given, capsys)
    assert "reads layer5.residual:cls, which the model demo does not have" in said
    assert "has the layers 0 to 4, and no layer 5" in said


def test_embeddings_are_not_what_it_reads(sae: Path, local_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(measure.main, ["--sae", str(sae), "--embeddings", str(local_run)], capsys)
    assert "reads layer2.residual:cls of demo, inside the tower; this takes" in said
