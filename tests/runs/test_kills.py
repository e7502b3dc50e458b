"""Between any two steps on the disk a kill leaves no file that is half there and loses nothing; nor does a late attempt."""

import hashlib
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from saecore.runs import run as run_module
from saecore.runs.run import Run, run_at
from tests.helpers import kills, planted

ROOT = Path(__file__).parent.parent.parent


def killed(work: str, start: Path, tmp_path: Path) -> list[Path]:
    """What each attempt at a piece of work leaves, step by step at which it was killed; the last one is whole."""
    folder = tmp_path / work
    subprocess.run([sys.executable, "-m", "tests.helpers.kills", work, str(start), str(folder)], cwd=ROOT, check=True)
    return sorted(folder.iterdir())


def visible(run: Path) -> dict[str, bytes]:
    """The files that readers see, but for what says when and where a run was made."""
    paths = {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if "/." not in f"/{name}" and is_told(name)}


def is_told(name: str) -> bool:
    """Whether a file holds nothing but data: the others hold seconds, or the folder's name."""
    return name.endswith(".parquet") or name == "by_latent/_index.json"


def assert_whole(run: Path) -> None:
    """Every visible file can be read; what a commit or the manifest names is there, as it says."""
    for path in run.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            if path.suffix == ".parquet":
                pq.read_table(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
    named = [file for path in (run / "commits").glob("*.json") for file in json.loads(path.read_text())["files"]]
    named += pq.read_table(run / "manifest.parquet").to_pylist() if (run / "manifest.parquet").exists() else []
    for file in named:
        assert (run / file["path"]).stat().st_size == file["bytes"]
        assert hashlib.sha256((run / file["path"]).read_bytes()).hexdigest() == file["sha256"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "least"),
    # A file takes seven steps (opened, half written, synced, renamed, removed, its folder opened and synced) without the
    # folder's making: plan, run.json, 3 x 4 files of chunks, manifest, card and run.json again are 17.
    [("run", 100), ("index", 20), ("names", 6)],
)
def test_killed_at_every_step(work: str, least: int, tmp_path: Path) -> None:
    start = tmp_path / "start"
    if work == "run":
        start.mkdir()
    else:
        planted.write(start)
    *attempts, whole = killed(work, start, tmp_path)
    assert len(attempts) >= least
    assert_whole(whole)
    expected = visible(whole)
    for attempt in attempts:
        assert_whole(attempt)
        seen = visible(attempt)
        # Nothing that a whole run has not, and no file under its name with other bytes, but latents.parquet of before.
        assert seen.keys() <= expected.keys()
        before = visible(start)
        assert all(content in (expected[name], before.get(name)) for name, content in seen.items())
        done = [] if (opened := run_at(str(attempt))) is None else opened.commits()
        times = {path: path.stat().st_mtime_ns for path in (attempt / "commits").glob("*.json")}
        getattr(kills, work)(str(attempt))
        assert visible(attempt) == expected
        assert len(done) == len(times)
        assert {path: path.stat().st_mtime_ns for path in times} == times
        assert_whole(attempt)


@pytest.fixture
def begun(tmp_path: Path) -> Run:
    """A run whose second chunk is not done yet."""
    planted.write(tmp_path / "run")
    (tmp_path / "run" / "commits" / "chunk-00000001.json").unlink()
    run = run_at(str(tmp_path / "run"))
    assert run is not None
    return run


@pytest.mark.parametrize("before", ["images/", "activations/", "maps/", "commits/"])
def test_an_attempt_that_ends_after_its_retry_changes_nothing(
    before: str, begun: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt stops before one of its files; the second commits, and completes the run; then the first goes on."""
    stopped, go_on = threading.Event(), threading.Event()
    write = run_module.write_atomic

    def slow(uri: str, data: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and f"/{before}" in uri:
            stopped.set()
            assert go_on.wait(60)
        write(uri, data)
        assert_whole(Path(begun.uri))

    def attempt() -> None:
        begun.write_chunk(1, planted.explained(1, planted.METHODS), {}, TAGS)

    monkeypatch.setattr(run_module, "write_atomic", slow)
    with ThreadPoolExecutor(1) as pool:
        zombie = pool.submit(attempt)
        assert stopped.wait(60)
        attempt()
        assert begun.pending().num_rows == 0
        begun.finish(0, 0.0)
        complete, files = visible(Path(begun.uri)), names(Path(begun.uri))
        go_on.set()
        zombie.result(60)
    assert visible(Path(begun.uri)) == complete
    assert names(Path(begun.uri)) == files
    assert begun.pending().num_rows == 0


TAGS = {"methods": ",".join(planted.METHODS), "grid_height": "1", "grid_width": "3"}


def names(run: Path) -> set[Path]:
    """Every file, hidden ones too."""
    return {path for path in run.rglob("*") if path.is_file()}
