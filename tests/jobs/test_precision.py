"""--precision: a run in bfloat16 on a CPU, beside the same run in float32."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import embed, explain
from saecore.pipeline import inference
from saecore.runs.files import open_dataset
from saecore.runs.record import read_record
from saecore.sae.checkpoints import load_sae
from tests.conftest import N_SCENES, command
from tests.helpers.mistakes import mistake


@pytest.fixture(scope="module")
def rounded(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rounded") / "run"
    assert explain.main(command(shards, out, "--local", "--precision", "bfloat16")) == 0
    return out


def embeddings(run: Path) -> torch.Tensor:
    table = open_dataset(str(run), "images").to_table().sort_by("image_id")
    return torch.tensor(table["embedding"].to_pylist())


def test_embeddings_are_nearly_those_of_float32_and_sums_hold(rounded: Path, local_run: Path) -> None:
    exact, near = embeddings(local_run), embeddings(rounded)
    assert not torch.equal(exact, near)
    assert torch.cosine_similarity(exact, near).min() > 0.9995  # measured on 512 scenes: 0.99994 at least
    records = read_record(str(local_run)), read_record(str(rounded))
    assert [record.dtype for record in records] == ["float32", "bfloat16"]
    worst = [record.worst_completeness_error or 0.0 for record in records]
    assert worst[0] < 1e-5 < 1e-4 < worst[1] < 0.05  # measured on 512 scenes: 0.024 at worst


def test_the_sae_runs_in_float32(rounded: Path) -> None:
    """Its own arithmetic on the embeddings that were written gives what was written of it."""
    table = (
        open_dataset(str(rounded), "activations").to_table().sort_by([("image_id", "ascending"), ("rank", "ascending")])
    )
    with torch.inference_mode():
        code = load_sae("demo").encode_sparse(embeddings(rounded))
    for name, expected in (("latent", code.latents), ("pre_activation", code.pre_activations)):
        found = table[name].to_numpy().reshape(N_SCENES, -1)
        np.testing.assert_allclose(found, expected[:, : found.shape[1]].numpy(), rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_in_its_own_precision_only(
    shards: Path, rounded: Path, local_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(rounded, tmp_path / "run"))
    said = mistake(explain.main, command(shards, out, "--local"), capsys)
    assert f"--out {out} holds a run made otherwise (dtype was 'bfloat16', now 'float32')" in said
    assert explain.main(command(shards, out, "--local", "--precision", "bfloat16")) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out
    assert explain.main(command(shards, local_run, "--local", "--precision", "float32")) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out


def test_embed_runs_in_it_too(shards: Path, rounded: Path, tmp_path: Path) -> None:
    given = ["--images", str(shards), "--out", str(tmp_path / "run"), "--clip", "demo", "--chunk-size", "8"]
    assert embed.main([*given, "--local", "--precision", "bfloat16"]) == 0
    torch.testing.assert_close(embeddings(tmp_path / "run"), embeddings(rounded), rtol=1e-5, atol=1e-5)


def test_the_gain_is_that_of_the_fastest_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands but in products, of which the first in each type takes long, as it does in truth."""
    clock, durations = [0.0], {torch.float32: iter([9.0, 3.0, 4.0, 3.0]), torch.bfloat16: iter([8.0, 2.0, 1.5, 2.0])}

    def product(a: torch.Tensor, b: torch.Tensor) -> None:
        assert a.dtype == b.dtype
        clock[0] += next(durations[a.dtype])

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    monkeypatch.setattr(inference.time, "perf_counter", lambda: clock[0])
    assert inference.bfloat16_gain() == 2


@pytest.mark.parametrize(("gain", "is_slow"), [(0.55, True), (2.1, False)])
def test_a_processor_that_does_not_gain_by_it_is_told_once_and_computes(
    gain: float,
    is_slow: bool,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(inference, "bfloat16_gain", lambda: gain)
    given = command(shards, tmp_path / "run", "--local", "--limit", "2", "--precision")
    assert explain.main([*given, "bfloat16"]) == 0
    assert (
        capsys.readouterr().out.count("this machine multiplies in bfloat16 at 0.6 times the speed of float32")
        == is_slow
    )


@pytest.mark.parametrize(
    ("main", "more", "said"),
    [
        (explain.main, ["--precision", "half"], "--precision 'half' is not one of auto, float32, bfloat16"),
        (
            explain.main,
            ["--precision", "bfloat16", "--method", "contrib,occlusion"],
            "--precision bfloat16: occlusion subtracts two forwards, which needs float32; ask for one of the two",
        ),
        (
            embed.main,
            ["--precision", "bfloat16", "--text", "words.txt"],
            "--precision bfloat16 is for images: the text tower runs in float32",
        ),
    ],
)
def test_mistakes(
    main: Callable[[list[str]], int], more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = [] if "--text" in more else ["--images", str(tmp_path)]
    models = ["--clip", "demo", *(["--sae", "demo"] if main is explain.main else [])]
    assert mistake(main, [*source, *models, "--out", str(tmp_path / "run"), *more], capsys) == said
