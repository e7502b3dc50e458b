"""The fit alarm: an SAE that does not fit stops its run, a handful of odd images does not, and nothing is lost."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from jobs import explain, report
from saecore.demo import writing
from saecore.runs.commits import Commit, fit_of
from saecore.runs.files import open_dataset
from saecore.runs.fit import ENOUGH, FEW, Fit, judged
from saecore.runs.run import Run
from saecore.sae.model import SAE, SAEConfig
from tests.conftest import command

N = 320
"""Scenes, in chunks of 40: the eighth would be the last, and the seventh is the first after which a run may be stopped."""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    writing.write_shards(folder, N, 1)
    return folder


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE as wide as the demo's embeddings, and of nothing."""
    sae = SAE(SAEConfig(n_inputs=128, n_latents=256, k=16)).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for tensor in sae.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    sae.scale.fill_(1.0)
    folder = tmp_path_factory.mktemp("random")
    sae.save(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "site": ""}))  # a file that does not say
    return folder


def given(images: Path, sae: Path, out: Path, *more: str) -> list[str]:
    return [*command(images, out), "--sae", str(sae), "--site", "embedding", "--chunk-size", "40", *more]


def test_counts_by_hand() -> None:
    counted = judged([0.1, 0.9, 1.5, None, math.nan, math.inf, 0.899])
    assert counted == (5, 3)
    assert counted.plus(Fit(3, 0)) == (8, 3)
    assert not Fit(ENOUGH - 1, ENOUGH - 1).is_poor(ENOUGH)
    assert Fit(ENOUGH, ENOUGH // 2).is_poor(ENOUGH)
    assert not Fit(ENOUGH, ENOUGH // 2 - 1).is_poor(ENOUGH)
    assert not Fit(FEW - 1, FEW - 1).is_poor()
    assert not Fit().is_poor(0 + 1)


@pytest.mark.slow
def test_an_sae_that_does_not_fit_stops_its_run(
    many: Path, random: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command_line = given(many, random, out, "--local")
    assert explain.main(command_line) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(
        "stopped: 280 of 280 images are reconstructed poorly (fvu at least 0.9): the SAE, taken to read"
    )
    assert "embedding, 128 wide, does not fit --clip demo; check that" in said
    assert len(list((out / "commits").iterdir())) == 7
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    # The same again works for nothing, and does not lose what is there.
    assert explain.main(command_line) == 1
    assert "stopped: 280 of 280" in capsys.readouterr().out
    assert len(list((out / "commits").iterdir())) == 7
    # Allowed, it goes on from there; what it says stays said.
    assert explain.main([*command_line, "--allow-poor-fit"]) == 0
    said_all = capsys.readouterr().out
    assert "resuming: 280 of 320 images are done" in said_all
    assert "warning       320 of 320 images are reconstructed poorly" in said_all
    assert json.loads((out / "run.json").read_text())["fit"] == {"judged": N, "poor": N}
    assert report.main(["--run", str(out), "--latent-pages", "1", "--image-pages", "1"]) == 0
    assert "This SAE does not fit these images." in (out / "report" / "index.html").read_text()
    # A run that is complete is complete, with the flag or without; the exit code tells which of them it was.
    assert explain.main([*command_line, "--allow-poor-fit"]) == 0
    assert explain.main(command_line) == 1
    assert "kept, but 320 of 320" in capsys.readouterr().out


def test_on_ray_too(
    ray_session: None, many: Path, random: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain.main(given(many, random, tmp_path / "out", "--ray")) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("stopped: ")
    assert "does not fit --clip demo" in said
    assert len(list((tmp_path / "out" / "commits").iterdir())) >= 7


@pytest.mark.parametrize(("images", "code"), [(1, 0), (FEW - 1, 0), (FEW, 1)])
def test_a_run_of_a_few_images_is_finished_and_a_handful_proves_nothing(
    many: Path, random: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], images: int, code: int
) -> None:
    out = tmp_path / "out"
    assert explain.main(given(many, random, out, "--local", "--limit", str(images))) == code
    said = capsys.readouterr().out
    assert f"warning       {images} of {images} images are reconstructed poorly" in said
    assert ("kept, but " in said) == bool(code)
    assert json.loads((out / "run.json").read_text())["status"] == "complete"
    assert (out / "manifest.parquet").exists()
    assert (out / "preview.png").exists()


def test_an_sae_that_fits_is_not_remarked_on(local_run: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main(command(shards, local_run, "--local")) == 0
    said = capsys.readouterr().out
    assert "warning" not in said
    assert "model  " not in said
    fit = json.loads((local_run / "run.json").read_text())["fit"]
    assert fit["judged"] == 48
    assert fit["poor"] <= 1


def test_fvu_is_of_all_that_fires_whatever_is_kept(local_run: Path, shards: Path, tmp_path: Path) -> None:
    assert explain.main(command(shards, tmp_path / "out", "--local", "--k", "2")) == 0
    few, all_ = (open_dataset(str(run), "images").to_table(columns=["fvu"]) for run in (tmp_path / "out", local_run))
    torch.testing.assert_close(torch.tensor(few["fvu"].to_pylist()), torch.tensor(all_["fvu"].to_pylist()))


def test_records_from_before_fits_were_counted_are_valid(local_run: Path) -> None:
    (commit, *_) = Run(str(local_run), {}, json.loads((local_run / "run.json").read_text())["fingerprint"]).commits()
    old = {key: value for key, value in dataclasses.asdict(commit).items() if key != "fit"}
    assert fit_of([Commit(**old)]) == Fit()
