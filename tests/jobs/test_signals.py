"""Ctrl-C and SIGTERM: one line that says what the same command does next, 130 or 143, no traceback, nobody left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs import explain
from saecore.demo import writing
from tests.conftest import command
from tests.jobs.test_jobs import ROOT, descendants

pytestmark = pytest.mark.slow

RESUMES = "stopped: the same command resumes from here\n"
AGAIN = "stopped: the same command starts again\n"


def stopped(
    words: list[str], ready: Callable[[], bool], tmp_path: Path, number: int, group: bool = False
) -> tuple[int, str]:
    """Exit code and standard error of a job that gets a signal when it is ready for it, as from a terminal if `group`."""
    said = tmp_path / "stderr"
    with said.open("w") as stderr, (tmp_path / "stdout").open("w") as stdout:
        job = subprocess.Popen(
            [sys.executable, "-m", *words], cwd=ROOT, stdout=stdout, stderr=stderr, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while not ready():
            assert job.poll() is None, said.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        family = descendants(job.pid)
        (os.killpg if group else os.kill)(job.pid, number)
        code = job.wait(60)
    deadline = time.monotonic() + 20
    while alive := [pid for pid in family if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
    assert "Traceback" not in (tmp_path / "stdout").read_text()
    return code, said.read_text()


def commits(run: Path, n: int = 2) -> Callable[[], bool]:
    return lambda: len(list((run / "commits").glob("*.json"))) >= n


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Enough images to be stopped among them."""
    writing.write_shards(tmp_path / "scenes", 192, 4)
    return tmp_path / "scenes"


@pytest.mark.parametrize(
    ("where", "number", "group", "code"),
    [
        ("--local", signal.SIGINT, True, 130),
        ("--local", signal.SIGTERM, False, 143),
        ("--ray", signal.SIGINT, True, 130),
        ("--ray", signal.SIGTERM, False, 143),
    ],
)
def test_stopped_in_the_middle(where: str, number: int, group: bool, code: int, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = command(many, out, "--batch-size", "1")
    assert stopped(["jobs.explain", *given, where], commits(out), tmp_path, number, group) == (code, RESUMES)
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    assert "finishing the chunk that is worked on, for at most 10 s" in (tmp_path / "stdout").read_text()
    assert explain.main([*given, "--local"]) == 0
    assert json.loads((out / "run.json").read_text())["images"] == 192


@pytest.mark.parametrize(
    ("job", "step", "argv"),
    [
        (
            "jobs.explain",
            "saecore.towers.loading.load_tower",
            ["--images", "{shards}", "--clip", "demo", "--sae", "demo", "--out", "{out}"],
        ),
        (
            "jobs.embed",
            "saecore.towers.loading.load_tower",
            ["--images", "{shards}", "--clip", "demo", "--out", "{out}"],
        ),
        (
            "jobs.train",
            "saecore.training.loop.make_plan",
            ["--embeddings", "{run}", "--latents", "96", "--out", "{out}"],
        ),
        ("jobs.measure", "saecore.sae.checkpoints.load_sae", ["--sae", "demo", "--embeddings", "{run}"]),
        ("jobs.name", "saecore.sae.checkpoints.load_sae", ["--run", "{run}"]),
        ("jobs.index", "saecore.query.by_latent.read_index", ["--run", "{run}"]),
        ("jobs.report", "saecore.query.results.open", ["--run", "{run}", "--out", "{out}"]),
        ("jobs.query", "saecore.query.results.open", ["top", "{run}", "3"]),
    ],
)
def test_stopped_before_work_begins(
    job: str, step: str, argv: list[str], shards: Path, local_run: Path, tmp_path: Path
) -> None:
    """While models load, or a run is opened."""
    out = tmp_path / "out"
    given = [word.format(shards=shards, run=local_run, out=out) for word in argv]
    mark = tmp_path / "reached"
    words = ["tests.helpers.slow", job, step, str(mark), *given]
    assert stopped(words, mark.exists, tmp_path, signal.SIGINT) == (130, AGAIN)
    assert not out.exists()


def test_a_second_ctrl_c_ends_at_once(local_run: Path, tmp_path: Path) -> None:
    """Also where the first is not heeded."""
    mark = tmp_path / "deaf"
    words = ["tests.helpers.slow", "jobs.query", "saecore.query.results.open", str(mark), "top", str(local_run), "3"]
    with subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, stderr=subprocess.PIPE) as job:
        for reached in (mark, mark.with_name("deaf.heard")):
            deadline = time.monotonic() + 60
            while not reached.exists():
                assert job.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            job.send_signal(signal.SIGINT)
        assert job.wait(10) == 130
        assert job.stderr is not None
        assert job.stderr.read() == b""


def test_a_training_saves_before_it_stops(tmp_path: Path) -> None:
    x = tmp_path / "x_4096_16.npy"
    np.random.default_rng(0).normal(size=(4096, 16)).astype(np.float32).tofile(x)
    out = tmp_path / "sae"
    argv = ["--embeddings", str(x), "--latents", "64", "--k", "3", "--batch-size", "64", "--epochs", "2000"]
    words = ["jobs.train", *argv, "--evaluations", "2000", "--out", str(out)]
    expected = "stopped: the same command resumes from the last checkpoint\n"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        began = (out / "metrics.parquet").stat().st_mtime_ns if out.exists() else 0

        def trains(began: int = began) -> bool:
            return (out / "metrics.parquet").exists() and (out / "metrics.parquet").stat().st_mtime_ns > began

        assert stopped(words, trains, tmp_path, number) == (code, expected)
        assert (out / "checkpoint.pt").exists()


@pytest.mark.parametrize("reads", [0, 2], ids=["nobody reads", "two lines are read"])
def test_a_reader_that_goes_is_no_error(reads: int, local_run: Path, tmp_path: Path) -> None:
    """As after `| head -2`: whatever part of the output is lost, the end is quiet, and a bug behind it would not be."""
    many = "SELECT activations.* FROM activations, range(20)"  # more than a pipe holds
    words = [sys.executable, "-m", "jobs.query", "sql", str(local_run), many, "--json"]
    with (tmp_path / "stderr").open("w") as stderr:
        job = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr)
        assert job.stdout is not None
        for _ in range(reads):
            assert job.stdout.readline()
        job.stdout.close()
        assert job.wait(60) == 128 + signal.SIGPIPE
    assert (tmp_path / "stderr").read_text() == ""
