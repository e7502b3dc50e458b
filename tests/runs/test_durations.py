"""What a run took is said once: by the clock and added up, in the same words and numbers in run.json, terminal and page."""

import dataclasses
import html
import json
import re
from pathlib import Path

import pytest

from jobs import embed, explain
from saecore.query import results
from saecore.report.pages import Site
from saecore.report.views import Views
from saecore.runs import durations
from saecore.runs.record import from_document, read_record
from tests.conftest import N_SCENES, command

DOCUMENT = {
    "status": "complete",
    "parts": {},
    "images": 512,
    "session_images": 512,
    "session_seconds": {"start": 8.25, "images": 2.0, "close": 0.25},
    "step_seconds": {"read": 1.0, "explain": 3.0},
}
RECORD = from_document(DOCUMENT)


def test_by_hand() -> None:
    rate = "256.0 a second, loading of models included"
    parts = f"8.2 s to start, 2.0 s for 512 images ({rate}), 0.2 s to close"
    assert durations.waited(RECORD) == f"10.5 s in all: {parts}"
    assert durations.worked(RECORD) == "4.0 s added up over processes: read 25%, explain 75%"
    resumed = dataclasses.replace(RECORD, session_images=12)
    assert durations.waited(resumed).startswith(
        "the last session took 10.5 s in all: 8.2 s to start, 2.0 s for 12 images"
    )
    assert durations.worked(dataclasses.replace(RECORD, step_seconds={})) == "0.0 s added up over processes"
    older = from_document(DOCUMENT | {"session_seconds": 2.0})  # before start and close were noted
    assert durations.waited(older) == f"2.0 s in all: 2.0 s for 512 images ({rate})"


def test_record_terminal_and_page_agree(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert explain.main(command(shards, out, "--local")) == 0
    said = capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["session_seconds"].keys() == {"start", "images", "close"}
    record = read_record(str(out))
    assert all(seconds > 0 for seconds in record.session_seconds.values())
    page = html.unescape(Site(Views(results.open(str(out)))).overview())
    for line, of in (("time          ", durations.waited), ("work          ", durations.worked)):
        assert f"{line}{of(record)}\n" in said
        assert of(record) in page
    # No other duration stands beside these on the page.
    assert re.findall(r"[\d.]+ s (?:in all|added up)", page) == re.findall(r"[\d.]+ s (?:in all|added up)", said)
    assert "seconds" not in re.sub(r"<[^>]*>", "", page.partition("</main>")[0].rpartition("versions")[0])

    capsys.readouterr()
    assert explain.main(command(shards, out, "--local")) == 0  # complete: nothing of this session is noted
    assert durations.waited(record) in capsys.readouterr().out


def test_jobs_embed_says_so_too(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--images", str(shards), "--clip", "demo", "--out", str(tmp_path / "run"), "--local"]
    assert embed.main(given) == 0
    record = read_record(str(tmp_path / "run"))
    assert f"for {N_SCENES} images" in durations.waited(record)
    assert durations.waited(record) in capsys.readouterr().out
