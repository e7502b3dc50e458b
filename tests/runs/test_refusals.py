"""Which images a run refused is said at its end: the count and first names of each reason, and how to ask for all."""

import shlex
from pathlib import Path

import pytest
from PIL import Image

from jobs import embed, explain, query
from saecore.runs.refusals import Refusal, refusals
from saecore.runs.run import run_at
from tests.conftest import command
from tests.helpers import planted

QUERY = "SELECT uri, key, error, error_detail FROM images WHERE error IS NOT NULL"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two images, five cut ones in three chunks of `command`'s eight, and a page of text whose name steers a terminal."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (32, 32), (number * 10, 0, 0)).save(folder / f"{number:02d}.jpg")
    whole = (folder / "00.jpg").read_bytes()
    for number in (2, 3, 9, 17, 19):
        (folder / f"{number:02d}.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "page \x1b[31m.jpg").write_text("<!DOCTYPE html>" * 9)
    return folder


def test_reasons_are_counted_and_the_first_of_each_named(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert explain.main(command(photographs, out, "--local")) == 0
    run = run_at(str(out))
    assert run is not None
    page = Refusal("not-an-image", 1, ["page \x1b[31m.jpg"])
    assert refusals(run) == [Refusal("truncated", 5, ["02.jpg", "03.jpg", "09.jpg"]), page]
    assert refusals(run, shown=5)[0].names == ["02.jpg", "03.jpg", "09.jpg", "17.jpg", "19.jpg"]


def test_a_run_without_refusals_has_none(tmp_path: Path) -> None:
    run = run_at(planted.write(tmp_path / "run"))
    assert run is not None
    assert refusals(run) == [Refusal("truncated", 1, ["bad.jpg"])]
    whole = run_at(planted.write(tmp_path / "whole", 0))
    assert whole is not None
    assert refusals(whole) == []


def test_the_terminal_names_them_and_the_question_that_it_names_finds_all(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert explain.main(command(photographs, out, "--local")) == 0
    said = capsys.readouterr().out
    assert "refused       5 truncated: 02.jpg, 03.jpg, 09.jpg, ..\n" in said
    assert "              1 not-an-image: page \N{REPLACEMENT CHARACTER}[31m.jpg\n" in said
    ask = next(line for line in said.splitlines() if "all of them: " in line).partition("all of them: ")[2]
    words = shlex.split(ask)
    assert words[1:] == ["-m", "jobs.query", "sql", str(out), QUERY]
    assert query.main([*words[3:], "--json"]) == 0
    assert capsys.readouterr().out.count('"truncated"') == 5


def test_jobs_embed_names_them_too(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--images", str(photographs), "--clip", "demo", "--out", str(tmp_path / "run"), "--local", "--no-npy"]
    assert embed.main(given) == 0
    said = capsys.readouterr().out
    assert "refused       5 truncated: 02.jpg, 03.jpg, 09.jpg, ..\n" in said
    assert f"all of them: the rows of {tmp_path / 'run'}/images whose column `error` is not null" in said


def test_nothing_is_said_where_nothing_was_refused(
    local_run: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain.main(command(shards, local_run, "--local")) == 0
    assert "\nrefused " not in capsys.readouterr().out
