"""Where jobs write: a place that refuses is told in one sentence before work begins, or midway with what the same command does
next; a folder that is not ours is left as it was."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs import embed, explain, index, measure, name, query, report, train
from saecore.query import results
from tests.conftest import command
from tests.helpers import disks
from tests.helpers.mistakes import mistake
from tests.jobs.test_jobs import assert_same_rows

Job = Callable[[list[str]], int]
Main = tuple[Job, list[str]]


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What trains and measures the embedded SAE's width."""
    file = tmp_path_factory.mktemp("embeddings") / "x_4096_128.npy"
    np.random.default_rng(0).normal(size=(4096, 128)).astype(np.float32).tofile(file)
    return file


def writers(out: Path, shards: Path, run: Path, embeddings: Path) -> dict[str, Main]:
    """Every job that writes, told to write at `out`."""
    (words := embeddings.with_name("words.txt")).write_text("red\ngreen\nblue\n")
    trained = ["--latents", "256", "--k", "3", "--batch-size", "1024", "--epochs", "1", "--evaluations", "1"]
    return {
        "explain": (explain.main, command(shards, out, "--local")),
        "demo": (explain.main, ["--demo", "--out", str(out), "--local"]),
        "embed": (embed.main, ["--images", str(shards), "--clip", "demo", "--out", str(out), "--local"]),
        "embed words": (embed.main, ["--text", str(words), "--clip", "demo", "--out", str(out)]),
        "train": (train.main, ["--embeddings", str(embeddings), "--out", str(out), *trained]),
        "measure": (measure.main, ["--sae", "demo", "--embeddings", str(embeddings), "--save", str(out)]),
        "name": (name.main, ["--sae", "demo", "--clip", "demo", "--out", str(out / "names.parquet")]),
        "report": (report.main, ["--run", str(run), "--out", str(out)]),
        "query": (query.main, ["maps", str(run), "000003.jpg", "--npy", str(out / "maps.npy")]),
    }


WRITERS = list(writers(Path(), Path(), Path(), Path("/tmp/x")))


def told(main: Main, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code, and the only line on standard error."""
    capsys.readouterr()
    code = main[0](main[1])
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return code, said


@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_that_takes_no_file_is_told_before_work_begins(
    writer: str,
    small_disk: Path,
    shards: Path,
    album_run: Path,
    embeddings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("x")
    disks.fill(small_disk)
    held = sorted(tmp_path.rglob("*"))
    for place, why in (
        ("file", "file"),
        ("file/below", "file"),
        ("disk/new", "No space left"),
        ("disk/new", "Read-only"),
    ):
        if why == "Read-only":
            disks.read_only(small_disk)
        main, argv = writers(tmp_path / place, shards, album_run, embeddings)[writer]
        said = mistake(main, argv, capsys)
        assert str(tmp_path / place.split("/")[0]) in said
        assert why in said or why == "file"
        assert sorted(tmp_path.rglob("*")) == held


@pytest.mark.parametrize("job", [index, name], ids=["index", "name"])
def test_a_run_that_may_only_be_read_is_told_before_work_begins(
    job: Job, small_disk: Path, local_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(local_run, small_disk / "run"))
    disks.read_only(small_disk)
    said = mistake(job.main, ["--run", str(run)], capsys)  # type: ignore[attr-defined]
    assert said == f"--run {run} cannot be written: Read-only file system"


def test_what_is_complete_needs_no_writing(
    small_disk: Path, shards: Path, local_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(local_run, small_disk / "run"))
    assert index.main(["--run", str(run)]) == 0
    disks.read_only(small_disk)
    assert explain.main(command(shards, run, "--local")) == 0
    assert index.main(["--run", str(run)]) == 0
    assert capsys.readouterr().out.count("nothing to do") == 2


@pytest.mark.parametrize("where", ["--local", "--ray"])
def test_a_disk_that_fills_midway(
    where: str,
    request: pytest.FixtureRequest,
    small_disk: Path,
    shards: Path,
    local_run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if where == "--ray":
        request.getfixturevalue("ray_session")
    run = small_disk / "run"
    filler = disks.fill(small_disk, free=80 << 10)
    assert explain.main(command(shards, run, where)) == 1
    said = capsys.readouterr().err.splitlines(keepends=True)[-1]  # a Ray that was there before knows another stderr
    assert said.startswith(f"error: {run}/")
    assert said.endswith(" cannot be written: No space left on device; the same command resumes from here\n")
    assert not (run / "manifest.parquet").exists()
    filler.unlink()
    assert explain.main(command(shards, run, "--local")) == 0
    assert_same_rows(run, local_run)


@pytest.mark.slow
@pytest.mark.parametrize("writer", [writer for writer in WRITERS if writer not in ("explain", "query")])
def test_a_disk_that_fills_midway_in_other_jobs(
    writer: str,
    small_disk: Path,
    shards: Path,
    album_run: Path,
    embeddings: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = writers(small_disk / "out", shards, album_run, embeddings)[writer]
    filler = disks.fill(small_disk, free=8 << 10 if writer in ("embed words", "name") else 64 << 10)
    if writer == "embed words":
        filler.write_bytes(filler.read_bytes() + bytes(4 << 10))  # three words are a small file
    code, said = told(main, capsys)
    assert code == 1
    assert " cannot be written: No space left on device; the same command " in said
    filler.unlink()
    assert main[0](main[1]) == 0


def test_an_index_that_fills_the_disk(small_disk: Path, local_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(local_run, small_disk / "run"))
    filler = disks.fill(small_disk, free=16 << 10)
    code, said = told((index.main, ["--run", str(run)]), capsys)
    assert code == 1
    assert said.endswith(" cannot be written: No space left on device; the same command starts again\n")
    filler.unlink()
    assert index.main(["--run", str(run)]) == 0
    assert results.open(str(run)).tables.index is not None


@pytest.mark.parametrize(
    ("job", "argv"),
    [
        (explain, ["--images", "{shards}", "--clip", "demo", "--sae", "demo", "--out", "s3:/bucket/x"]),
        (explain, ["--images", "{shards}", "s3:/bucket/x", "--clip", "demo", "--sae", "demo", "--out", "run"]),
        (explain, ["--images", "{shards}", "--clip", "demo", "--sae", "hf:/owner/name", "--out", "run"]),
        (explain, ["--images", "{shards}", "--clip", "file:/models/clip", "--sae", "demo", "--out", "run"]),
        (embed, ["--text", "gs:/bucket/words.txt", "--clip", "demo", "--out", "run"]),
        (train, ["--embeddings", "s3:/bucket/x", "--latents", "9", "--out", "run"]),
        (measure, ["--embeddings", "s3:/bucket/x", "--sae", "demo"]),
        (name, ["--run", "s3:/bucket/x"]),
        (index, ["--run", "s3:/bucket/x"]),
        (report, ["--run", "s3:/bucket/x", "--out", "pages"]),
        (query, ["top", "s3:/bucket/x", "3"]),
        (explain, ["--images", "{shards}", "--clip", "demo", "--sae", "demo", "--out", ""]),
        (explain, ["--images", "", "--clip", "demo", "--sae", "demo", "--out", "run"]),
        (train, ["--embeddings", "x.npy", "--latents", "9", "--out", ""]),
    ],
)
def test_an_address_that_lacks_a_slash_or_an_empty_one_makes_no_folder(
    job: Job,
    argv: list[str],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    said = mistake(job.main, [word.format(shards=shards) for word in argv], capsys)  # type: ignore[attr-defined]
    assert "too few slashes" in said or "nothing is named" in said
    assert list(tmp_path.iterdir()) == []


def test_a_refused_folder_is_left_as_it_was(
    shards: Path, local_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other people's files, the images' own folder, and a run that was made otherwise."""
    images = Path(shutil.copytree(shards, tmp_path / "images"))
    run = Path(shutil.copytree(local_run, tmp_path / "run"))
    others = tmp_path / "others"
    others.mkdir()
    (others / "letter.txt").write_text("dear")
    before = sorted(tmp_path.rglob("*")), (run / "run.json").read_bytes()
    for out, more in ((others, ()), (images, ()), (run, ("--k", "4"))):
        assert f"--out {out} holds" in mistake(explain.main, command(images, out, "--local", *more), capsys)
    into_a_run = ["--images", str(images), "--clip", "demo", "--out", str(run), "--local"]
    assert "holds an 'explain' run" in mistake(embed.main, into_a_run, capsys)
    assert (sorted(tmp_path.rglob("*")), (run / "run.json").read_bytes()) == before


def test_the_log_is_of_runs_alone_and_holds_what_was_said_there(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saecore.pipeline.stages import Explain

    infer = Explain.__call__

    def says(self: Explain, decoded: object) -> object:
        os.write(2, b"said by a library\n")
        return infer(self, decoded)

    monkeypatch.setattr(Explain, "__call__", says)
    assert explain.main(command(shards, tmp_path / "run", "--local", "--limit", "8")) == 0
    assert (tmp_path / "run" / "run.log").read_text() == "said by a library\n"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"
