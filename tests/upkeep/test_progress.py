"""How far a run is: counted by hand on a planted run, with commits of known times."""

import json
import os
import time
from pathlib import Path

import pytest

from jobs import index, status
from saecore.runs import latents
from saecore.upkeep import lock, progress
from tests.helpers import planted
from tests.helpers.mistakes import mistake
from tests.upkeep.test_lock import SHORT, another


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A planted run of 3 + 2 + 1 images that lacks its last chunk: commits 100 s and 60 s ago."""
    run = tmp_path / "run"
    planted.write(run)
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**document, "status": "running", "started": "2026-01-01T00:00:00+0000"}))
    (run / "commits" / "chunk-00000002.json").unlink()
    now = time.time()
    for chunk_id, ago in ((0, 100), (1, 60)):
        os.utime(run / "commits" / f"chunk-{chunk_id:08d}.json", (now - ago, now - ago))
    return run


def test_a_run_that_was_stopped(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = progress.status(str(half), time.time())
    assert (found.state, found.holder, found.left) == ("stopped", None, None)
    assert (found.done, found.planned, found.pending, found.chunks) == (5, 6, 1, 3)
    assert (found.refused, found.read) == ({"truncated": 1}, 2)
    assert found.rate == pytest.approx(2 / 40), "2 images came in the 40 s after the first commit"
    assert found.bytes["images"] == sum(path.stat().st_size for path in (half / "images").iterdir())
    assert status.main([str(half)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run           explain, begun 2026-01-01T00:00:00+0000",
        "state         stopped",
        "images        5 of 6 (83.3%), refused: truncated 1",
        "chunks        2 of 3, 1 pending",
        "speed         0.1 images/s over the last minutes of work",
        *[line for line in status.said(found).splitlines() if line.startswith("on disk")],
        "index         none; names: none",
        "resume        python -m planted",
    ]


def test_a_run_that_is_worked_on(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with another(str(half)) as first:
        found = progress.status(str(half), time.time())
        assert found.state == "running"
        assert found.left == pytest.approx(1 / (2 / 40)), "one image, at one in 20 s"
        assert status.main([str(half), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["holder"]["pid"] == first.pid
        assert said["silent"] < 2
        assert "0:20 left" in status.said(found)
        assert f"running: relmap explain on {said['holder']['host']}, process {first.pid}" in status.said(found)
        first.kill()
        first.wait()
        assert progress.status(str(half), time.time()).state == "stopped", "on this machine at once"


def test_a_complete_run_its_index_and_its_names(tmp_path: Path) -> None:
    uri = planted.write(tmp_path / "run", 2)
    assert (progress.status(uri, 0.0).state, progress.status(uri, 0.0).indexed) == ("complete", "none")
    assert index.main(["--run", uri]) == 0
    assert progress.status(uri, 0.0).indexed == "present"
    planted.write(uri, 3)
    assert progress.status(uri, 0.0).indexed == "stale"
    assert not progress.status(uri, 0.0).named
    table = latents.read(uri)
    assert table is not None
    latents.merge(uri, table.select(["latent"]).append_column("name", [["x"] * table.num_rows]))
    assert progress.status(uri, 0.0).named
    with lock.alone(uri, "relmap index", print, SHORT):
        found = progress.status(uri, time.time())
        assert found.state == "complete"
        assert found.holder is not None
        assert found.holder.command == "relmap index"
    (tmp_path / "run" / "commits" / "chunk-00000000.json").unlink()
    assert progress.status(uri, 0.0).state == "stopped", "run.json says complete, and a chunk is to be done again"


def test_commits_of_a_large_run_are_read_in_part(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "MOST_READ", 1)
    found = progress.status(str(half), time.time())
    assert (found.refused, found.read) == ({"truncated": 1}, 1)
    assert "refused: truncated 1 (in 1 of the 2 chunks)" in status.said(found)


def test_where_there_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(status.main, [str(tmp_path)], capsys) == f"{tmp_path} holds no run: there is no run.json"


def test_looking_writes_nothing(store: Path) -> None:
    planted.write("s3://bucket/run")
    before = sorted(store.rglob("*"))
    found = progress.status("s3://bucket/run", time.time())
    assert (found.state, found.done, found.pending) == ("complete", 6, 0)
    assert sorted(store.rglob("*")) == before
