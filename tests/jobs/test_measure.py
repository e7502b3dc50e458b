"""jobs.measure: the figures are those of saecore.evaluation.quality, on the rows that were drawn."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import measure
from saecore import schema
from saecore.evaluation import quality
from saecore.sae.checkpoints import load_sae
from saecore.sae.model import SAE, SAEConfig
from tests.helpers.mistakes import mistake
from tests.helpers.towers import random_sae

ROWS, WIDTH = 300, 24
WORDS = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of three classes, their labels, their texts, and SAEs."""
    out = tmp_path_factory.mktemp("measure")
    generator = np.random.default_rng(0)
    centres = 3 * generator.normal(size=(3, WIDTH))
    labels = generator.integers(0, 3, ROWS)
    (centres[labels] + generator.normal(size=(ROWS, WIDTH))).astype(np.float32).tofile(out / f"x_{ROWS}_{WIDTH}.npy")
    (out / "integers.txt").write_text("".join(f"{label}\n" for label in labels))
    (out / "words.txt").write_text("".join(f"{WORDS[label]}\n" for label in labels))
    (out / "texts").mkdir()
    texts = [{"word": word, "embedding": row} for word, row in zip(WORDS, centres.tolist(), strict=True)]
    pq.write_table(pa.Table.from_pylist(texts, schema=schema.TEXTS), out / "texts" / "texts.parquet")
    random_sae().save(out / "sae")
    random_sae(seed=5).save(out / "other")
    random_sae(n_inputs=20).save(out / "narrow")
    without = SAE(SAEConfig(n_inputs=WIDTH, n_latents=96, k=8, architecture="batchtopk"))
    without.load_state_dict({**random_sae().state_dict(), "threshold": torch.tensor(torch.nan)})
    without.save(out / "batchtopk")
    without.config = dataclasses.replace(without.config, k=0)
    without.save(out / "batchtopk-without-k")
    return out


def arguments(folder: Path, *more: str, sae: str = "sae") -> list[str]:
    return ["--sae", str(folder / sae), "--embeddings", str(folder / f"x_{ROWS}_{WIDTH}.npy"), *more]


def measured(capsys: pytest.CaptureFixture[str], argv: list[str]) -> dict[str, Any]:
    """What --json prints, all of it."""
    capsys.readouterr()
    assert measure.main([*argv, "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return json.loads(said.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def rows_of(folder: Path) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(folder / f"x_{ROWS}_{WIDTH}.npy", np.float32).reshape(ROWS, WIDTH))


def test_the_figures_are_those_of_the_library(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, arguments(folder))
    sae, x = random_sae(), rows_of(folder)
    assert found["figures"] == quality.quality(sae, x)._asdict()
    assert found["recovery"] == quality.recovery(sae, x, [16, 32, 64, 96])
    assert (found["rows"], found["of"], found["architecture"]) == (ROWS, ROWS, "topk")
    assert not found.keys() & {"zero_shot", "linear_probe", "alignment", "saved"}


def test_some_rows_with_their_own_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts are the classes' true centres: the drawn embeddings are answered rightly only with the labels of their rows."""
    more = ["--rows", "120", "--ks", "8", "5", "--texts", str(folder / "texts"), "--against", str(folder / "other")]
    found = measured(capsys, [*arguments(folder, *more), "--labels", str(folder / "integers.txt")])
    assert (found["rows"], found["of"], found["figures"]["images"]) == (120, ROWS, 120)
    assert [row["k"] for row in found["recovery"]] == [5, 8]
    assert found["zero_shot"]["accuracy"] > 0.95
    assert found["linear_probe"]["accuracy"] > 0.95
    aligned = quality.alignment(random_sae(), random_sae(seed=5))
    assert {**aligned, "against": str(folder / "other")} == found["alignment"]
    words = measured(capsys, [*arguments(folder, *more), "--labels", str(folder / "words.txt")])
    assert words == found
    other = measured(capsys, [*arguments(folder, *more), "--seed", "1"])
    assert other["figures"] != found["figures"]
    assert other["zero_shot"].keys() == {"kl", "same"}
    assert "linear_probe" not in other


def test_words_alone_are_classes_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, arguments(folder, "--labels", str(folder / "words.txt")))
    assert found["linear_probe"]["accuracy"] > 0.95


def test_a_batchtopk_sae_is_calibrated_and_saved(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(folder, "--save", str(tmp_path / "saved"), sae="batchtopk")
    assert measure.main(argv) == 0
    assert "calibrated here: it had none (k = 8)" in capsys.readouterr().out
    saved = load_sae(str(tmp_path / "saved"))
    assert float(saved.encode_sparse(rows_of(folder)).activations.count_nonzero()) / ROWS == pytest.approx(8, rel=0.05)
    again = measured(capsys, ["--sae", str(tmp_path / "saved"), *argv[2:4], "--save", str(tmp_path / "saved")])
    assert (again["calibrated"], again["threshold"]) == (False, float(saved.firing_threshold()))


def test_the_table_says_all_of_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unit = rows_of(folder) / rows_of(folder).norm(dim=1, keepdim=True)
    np.save(tmp_path / "unit.npy", unit.numpy())
    more = ["--texts", str(folder / "texts"), "--labels", str(folder / "words.txt"), "--against", str(folder / "sae")]
    argv = ["--sae", str(folder / "sae"), "--embeddings", str(tmp_path / "unit.npy"), *more]
    assert measure.main([*argv, "--save", str(tmp_path / "saved")]) == 0
    said = capsys.readouterr().out
    for word in ("every embedding has length 1", "fvu_msae", "cknna", "k strongest", "zero-shot", "linear probe"):
        assert said.count(word) == 1
    assert "100.0% of atoms" in said
    assert load_sae(str(tmp_path / "saved")).sha256() == random_sae().sha256()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--ks", "0"], "--ks 0: must be at least 1"),
        (["--rows", "1"], "--rows 1: must be at least 2"),
        (["--against", "NARROW"], "is for embeddings of width 20, and --embeddings"),
        (["--labels", "nowhere.txt"], "--labels nowhere.txt cannot be read"),
        (["--labels", "SHORT"], "has 3 lines for 300 embeddings: one each is needed"),
        (["--labels", "BLANK"], "line 7 is empty"),
        (["--labels", "SAME"], "all labels are 'cat'"),
        (["--labels", "COW", "--texts", "TEXTS"], "'cow' is not among the words of --texts"),
        (["--labels", "THREE", "--texts", "TEXTS"], "3 is no number of one of the 3 words"),
        (["--texts", "NARROW"], "no texts.parquet there"),
        (["--save", "NARROW"], "holds other files; name a new or empty folder"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    words = (folder / "words.txt").read_text().split()
    files = {
        "SHORT": words[:3],
        "BLANK": [*words[:6], "", *words[7:]],
        "SAME": ["cat"] * ROWS,
        "COW": ["cow", *words[1:]],
        "THREE": ["3", *["0"] * (ROWS - 1)],
    }
    places = {"NARROW": folder / "narrow", "TEXTS": folder / "texts"}
    for name, lines in files.items():
        places[name] = tmp_path / name
        places[name].write_text("\n".join(lines))
    argv = arguments(folder, *(str(places.get(word, word)) for word in more))
    assert sentence in mistake(measure.main, argv, capsys)


def test_an_sae_of_another_clip_or_without_k_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is for embeddings of width 20" in mistake(measure.main, arguments(folder, sae="narrow"), capsys)
    assert "does not say its k" in mistake(measure.main, arguments(folder, sae="batchtopk-without-k"), capsys)
