"""No SAE where it does not belong: its site and its model are told apart before any work, and written wherever it goes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs import embed, explain, measure, name, train
from saecore.sae.checkpoints import from_tensors, load_sae
from tests.conftest import command
from tests.helpers.mistakes import mistake
from tests.jobs.test_jobs import rows
from tests.sae.test_formats import DATACOMP, write_prisma


@pytest.fixture(scope="module")
def prisma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide as the demo's embeddings, of layer 3, patches and another model."""
    folder = tmp_path_factory.mktemp("prisma")
    write_prisma(folder)
    sae = load_sae("demo")
    tensors = {"W_enc": sae.encoder, "b_enc": sae.latent_bias, "W_dec": sae.atoms, "b_dec": sae.pre_bias}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_in": 128, "d_sae": 80}))
    torch.save({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, folder / "n_images_2600058.pt")
    return folder


def variant(folder: Path, **changes: Any) -> Path:
    """The demo's SAE, which says something else of itself."""
    sae = load_sae("demo")
    sae.config = dataclasses.replace(sae.config, **changes)
    sae.save(folder)
    return folder


def test_an_sae_of_an_inner_layer_is_refused_by_name(
    prisma: Path, local_run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every job that brings an SAE and embeddings together."""
    sae = ["--sae", str(prisma)]
    for job, argv in [
        (explain.main, [*command(shards, tmp_path / "out", "--local"), *sae]),
        (measure.main, [*sae, "--embeddings", str(local_run)]),
        (name.main, [*sae, "--clip", "demo", "--out", str(tmp_path / "out")]),
    ]:
        said = mistake(job, argv, capsys)
        if job is explain.main:  # where it runs, if it is its model's
            assert f"was trained on {DATACOMP}, and --clip demo is another model" in said
        else:
            assert f"reads layer3.residual:patches of {DATACOMP}, inside the tower; " in said
        assert "not the same as the given site embedding" in mistake(job, [*argv, "--site", "embedding"], capsys)
    assert not (tmp_path / "out").exists()


def test_an_sae_of_another_model_is_refused_unless_any_will_do(
    local_run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = ["--sae", str(variant(tmp_path / "sae", model=f"{DATACOMP}", model_sha256=""))]
    for job, argv in [
        (explain.main, [*command(shards, tmp_path / "out", "--local"), *sae]),
        (measure.main, [*sae, "--embeddings", str(local_run)]),
        (name.main, [*sae, "--clip", "demo", "--out", str(tmp_path / "names.parquet")]),
    ]:
        said = mistake(job, argv, capsys)
        assert f"was trained on {DATACOMP}, and " in said
        assert "is another model; --any-clip runs it all the same" in said
        assert job([*argv, "--any-clip"]) == 0
        assert "is another model; the job goes on, as asked" in capsys.readouterr().out
    # A run's SAE was let pass once, and is its SAE.
    assert name.main(["--run", str(tmp_path / "out"), "--by", "decoder"]) == 0


def test_what_cannot_be_told_is_said_in_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = variant(tmp_path / "sae", model="mine", model_sha256="")
    argv = [*command(shards, tmp_path / "out", "--local", "--limit", "8", "--dry-run"), "--sae", str(sae)]
    assert explain.main(argv) == 0
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0]
        == "model         the SAE was trained on mine; whether --clip demo is that model, their names do not tell"
    )
    assert any(line.endswith("which reads embedding") for line in said)


def test_the_site_is_written_wherever_the_sae_goes(shards: Path, tmp_path: Path) -> None:
    """On embeddings of length 1 the demo's SAE is no good, but its maps are exact."""
    sae, out = variant(tmp_path / "sae", site=""), tmp_path / "out"
    argv = [*command(shards, out, "--local"), "--sae", str(sae), "--allow-poor-fit"]
    assert explain.main(argv) == 2
    assert explain.main([*argv, "--site", "embedding:l2"]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["parts"]["site"] == record["sae"]["site"] == record["config"]["site"] == "embedding:l2"
    assert (record["sae"]["model"], record["sae"]["model_sha256"]) == ("demo", record["parts"]["clip"])
    for table in ("images", "activations", "maps"):
        assert pq.read_schema(next((out / table).iterdir())).metadata[b"site"] == b"embedding:l2"
    assert record["worst_completeness_error"] < 1e-4
    # Another site is another run.
    assert explain.main([*argv, "--site", "embedding"]) == 2
    # jobs.name goes by what the run was told; jobs.measure writes it down for good.
    assert name.main(["--run", str(out)]) == 0
    again = ["--embeddings", str(out), "--save", str(tmp_path / "told")]
    assert measure.main(["--sae", str(sae), "--site", "embedding:l2", *again]) == 0
    assert load_sae(str(tmp_path / "told")).config.site == "embedding:l2"
    assert "Site: `embedding:l2` of `demo`." in (tmp_path / "told" / "README.md").read_text()


@pytest.mark.parametrize("norm", ["frozen", "exact"])
def test_maps_of_an_sae_on_embeddings_of_length_1_are_exact(shards: Path, tmp_path: Path, norm: str) -> None:
    """The demo's SAE, told to see x / |x|: with the mean length taken out of mean and scale it does nearly as well."""
    demo = load_sae("demo")
    x = np.linalg.norm(embeddings_of(shards, tmp_path), axis=1).mean()
    state = {**demo.state_dict(), "mean": demo.mean / x, "scale": demo.scale * x}
    sae = from_tensors(dataclasses.replace(demo.config, site="embedding:l2"), state, "test")
    sae.save(tmp_path / "sae")
    out = tmp_path / "out"
    argv = [*command(shards, out, "--local"), "--sae", str(tmp_path / "sae")]
    assert explain.main([*argv, "--norm", norm, "--method", "contrib,contrib_grad"]) == 0
    fvu = [row["fvu"] for row in rows(out, "images").values()]
    assert np.median(fvu) < 0.2
    assert json.loads((out / "run.json").read_text())["worst_completeness_error"] < 1e-4


def embeddings_of(shards: Path, folder: Path) -> np.ndarray:
    out = folder / "embedded"
    assert embed.main(["--images", str(shards), "--clip", "demo", "--out", str(out), "--local", "--dataset", "x"]) == 0
    return np.memmap(next(out.glob("*.npy")), np.float32, "r").reshape(-1, 128)


def test_training_writes_site_and_model(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = embeddings_of(shards, tmp_path)
    (tmp_path / "unit").mkdir()
    unit = tmp_path / "unit" / f"x_demo_train_image_{len(x)}_128.npy"
    (x / np.linalg.norm(x, axis=1, keepdims=True)).tofile(unit)
    recipe = ["--latents", "64", "--k", "8", "--batch-size", "16", "--epochs", "1", "--evaluations", "1"]
    digest = load_sae("demo").config.model_sha256
    for source, site, sha in ((tmp_path / "embedded", "embedding", digest), (unit, "embedding:l2", "")):
        out = tmp_path / f"sae-{site}"
        capsys.readouterr()
        assert train.main(["--embeddings", str(source), "--out", str(out), *recipe]) == 0
        assert ("so this SAE brings embeddings to length 1 first" in capsys.readouterr().out) == (site != "embedding")
        config = load_sae(str(out)).config
        assert (config.site, config.model, config.model_sha256) == (site, "demo", sha)
        assert json.loads((out / "training.json").read_text())["site"] == site
    capsys.readouterr()
    assert measure.main(["--sae", str(out), "--embeddings", str(unit)]) == 0
    said = capsys.readouterr().out
    assert "reads embedding:l2" in said
    assert "warning" not in said


def test_files_from_before_sites_read_the_embedding_and_keep_their_hash(tmp_path: Path) -> None:
    """Runs hold the hash of their SAE: that of the demo's, as it was then."""
    sae = load_sae("demo")
    assert sae.sha256() == "33fe5634197cb1b8a69efbe0a94a8dfe50cb07910f81cd875523e53db96cc88e"
    sae.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for field in ("site", "model", "model_sha256"):
        del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = load_sae(str(tmp_path))
    assert (old.config.site, old.config.model, old.sha256()) == ("embedding", "", sae.sha256())
    assert load_sae(str(variant(tmp_path / "l2", site="embedding:l2"))).sha256() != sae.sha256()
    with pytest.raises(ValueError, match="which is not the same"):
        load_sae(str(tmp_path), "embedding:l2")
