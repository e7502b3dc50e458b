"""relmap evaluate: a judgement of a run from end to end, taken up again, on Ray, on tokens, and with what is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import evaluate, explain, report, retry, status, verify
from saecore.judging.verdict import read
from saecore.runs.files import open_dataset
from saecore.runs.record import read_record
from tests.helpers.mistakes import mistake

FEW = [
    "--images-sample",
    "6",
    "--latents",
    "2",
    "--steps",
    "3",
    "--shapley-subsets",
    "200",
    "--checks",
    "agreement,nulls",
]
KEYS = ["image_id", "latent", "target", "model", "method", "metric"]


def command(run: Path, out: Path, *more: str) -> list[str]:
    return ["--run", str(run), "--out", str(out), *FEW, *more]


def rows(out: Path) -> pa.Table:
    return open_dataset(str(out), "faithfulness").to_table().sort_by([(key, "ascending") for key in KEYS])


def assert_same(one: Path, other: Path) -> None:
    first, second = rows(one), rows(other)
    assert first.select(KEYS).equals(second.select(KEYS))
    # Ranks of nearly equal values change with rounding, so rank correlations do.
    np.testing.assert_allclose(first["value"].to_numpy(), second["value"].to_numpy(), atol=5e-3)


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("judged") / "run"
    given = ["--images", str(shards), "--clip", "demo", "--sae", "demo", "--chunk-size", "8", "--k", "4", "--local"]
    assert explain.main([*given, "--targets", "kept", "text:a red square", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def judged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("judged") / "evaluation"
    assert evaluate.main(command(run, out)) == 0
    return out


def test_the_verdict_stands_in_files_and_on_the_screen(
    run: Path, judged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(command(run, judged)) == 0
    said = capsys.readouterr().out
    assert "is complete: nothing to do" in said
    found = read(str(judged))
    assert found is not None
    assert found.methods[:2] == ["contrib", "attention"]
    assert found.images == 6
    assert all(sentence in said for sentence in found.sentences)
    assert "contrib beats random" in said
    record = read_record(str(judged))
    assert (record.kind, record.images, record.is_complete) == ("evaluate", 6, True)
    assert record.rows.keys() == {"images", "faithfulness", "curves"}
    assert (judged / "curves.svg").read_text().startswith("<svg")
    text = [row for row in rows(judged).to_pylist() if row["target"]]
    assert {row["target"] for row in text} == {"text: a red square"}
    assert len({row["image_id"] for row in text}) == 6


def test_other_commands_know_it(run: Path, judged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(judged)]) == 0
    assert status.main([str(judged), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert (told["kind"], told["state"], told["planned"]) == ("evaluate", "complete", 6)
    assert "judgement of maps" in mistake(retry.main, [str(judged)], capsys)
    assert "another job" in mistake(report.main, ["--run", str(judged)], capsys)


def test_a_run_that_was_stopped_goes_on(run: Path, judged: Path, tmp_path: Path) -> None:
    """As after a kill between two chunks: one commit is gone, and the run is not complete."""
    again = tmp_path / "again"
    shutil.copytree(judged, again)
    commits = sorted((again / "commits").iterdir())
    assert len(commits) > 1
    commits[0].unlink()
    before = {file.name: file.stat().st_mtime_ns for file in (again / "faithfulness").iterdir()}
    document = json.loads((again / "run.json").read_text()) | {"status": "running"}
    (again / "run.json").write_text(json.dumps(document))
    assert evaluate.main(command(run, again)) == 0
    after = {file.name: file.stat().st_mtime_ns for file in (again / "faithfulness").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"chunk-00000000.parquet"}
    assert_same(judged, again)
    assert verify.main([str(again)]) == 0


def test_on_ray_the_rows_are_the_same(ray_session: None, run: Path, judged: Path, tmp_path: Path) -> None:
    assert evaluate.main(command(run, tmp_path / "ray", "--ray")) == 0
    assert_same(judged, tmp_path / "ray")


def test_it_stands_in_the_run_and_on_its_pages(shards: Path, tmp_path: Path) -> None:
    """An SAE that reads tokens; the report names the command before, and shows the verdict after."""
    run = tmp_path / "tokens"
    given = ["--images", str(shards), "--clip", "demo", "--sae", "demo-patches", "--pool", "max", "--k", "4"]
    assert explain.main([*given, "--limit", "16", "--local", "--out", str(run)]) == 0
    assert report.main(["--run", str(run)]) == 0
    assert "evaluate --run" in (run / "report" / "index.html").read_text()
    few = ["--images-sample", "3", "--latents", "2", "--steps", "2", "--shapley-subsets", "0", "--checks", "none"]
    assert evaluate.main(["--run", str(run), *few]) == 0
    assert report.main(["--run", str(run)]) == 0
    page = (run / "report" / "evaluation.html").read_text()
    found = read(str(run / "evaluation"))
    assert found is not None
    assert found.methods == ["contrib", "activation", "attention", "random", "centre", "edges"]
    assert found.sentences[0].replace("'", "&#39;") in page
    assert "<svg" in page
    assert "Are maps true?" in (run / "report" / "index.html").read_text()
    assert verify.main([str(run)]) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--methods", "contrib,vibes"], "vibes"),
        (["--methods", "activation"], "activation: has no meaning"),
        (["--removal", "melt"], "--removal 'melt': must be one or several, joined by commas, of drop, mean, blur"),
        (["--checks", "all"], "--checks 'all'"),
        (["--images-sample", "0"], "--images-sample 0"),
        (["--latents", "0", "--steps", "0"], "--steps 0"),
        (["--shapley-subsets", "4"], "--shapley-subsets 4: must be 0, or at least 192"),
        (["--local", "--ray"], "--local"),
        (["--gpus-per-replica", "1", "--local"], "no GPU"),
    ],
)
def test_a_mistake_is_one_sentence(
    run: Path, tmp_path: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in mistake(evaluate.main, ["--run", str(run), "--out", str(tmp_path / "out"), *words], capsys)
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_or_is_judged_otherwise(
    run: Path, judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no run" in mistake(evaluate.main, ["--run", str(tmp_path)], capsys)
    assert "another job" in mistake(evaluate.main, ["--run", str(judged)], capsys)
    assert "holds a run made otherwise (steps" in mistake(
        evaluate.main, [*command(run, judged), "--steps", "4"], capsys
    )
    assert "'explain' run" in mistake(evaluate.main, ["--run", str(run), "--out", str(run)], capsys)


def test_images_that_are_gone_are_told(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    shutil.copytree(shards, folder)
    run = tmp_path / "run"
    given = ["--images", str(folder), "--clip", "demo", "--sae", "demo", "--limit", "16", "--local"]
    assert explain.main([*given, "--out", str(run)]) == 0
    for file in folder.iterdir():
        file.unlink()
    assert "are gone or have changed since it was made" in mistake(evaluate.main, ["--run", str(run)], capsys)


def test_a_run_by_a_head_is_judged_by_its_methods_and_by_others(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    given = ["--images", str(shards), "--clip", "demo", "--sae", "demo", "--limit", "4", "--k", "2", "--local"]
    assert explain.main([*given, "--head", "demo", "--out", str(run)]) == 0
    assert read_record(str(run)).methods == ["removal"]
    few = ["--images-sample", "2", "--steps", "2", "--shapley-subsets", "0", "--checks", "nulls"]
    assert evaluate.main(["--run", str(run), *few]) == 0
    found = read(str(run / "evaluation"))
    assert found is not None
    assert found.methods[:2] == ["removal", "attention"]
    others = ["--run", str(run), "--methods", "contrib", "--dry-run"]
    assert evaluate.main(others) == 0
    assert "by contrib, attention" in capsys.readouterr().out
    only = "--head demo: only the method removal takes one"
    assert only in mistake(evaluate.main, [*others, "--head", "demo"], capsys)


def test_a_dry_run_says_what_it_would_cost(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(command(run, tmp_path / "out", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "would judge 6 images, 3 targets each, by contrib, attention" in said
    assert "forwards an image" in said
    assert not (tmp_path / "out").exists()
