"""One run on a cluster of several nodes: GPUs come late, a node is lost midway, and the rows are those of one machine."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.same_tables import differences
from tests.conftest import N_SCENES, command
from tests.helpers import nodes

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture
def cluster() -> Iterator[nodes.Nodes]:
    with nodes.started() as running:
        yield running


def test_a_run_on_several_nodes(
    cluster: nodes.Nodes, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head and two nodes of one CPU; then a node whose GPU two replicas share, and whose two CPUs they take.

    Two more replicas are asked for, whose nodes never come.
    """
    marks, said = tmp_path / "marks", tmp_path / "said"
    marks.mkdir()
    lost, _ = cluster.add(1), cluster.add(1)
    (marks / "held").write_text(lost)
    environment = os.environ | nodes.ENVIRONMENT
    given = command(shards, tmp_path / "there", "--chunk-size", "4")
    local = [sys.executable, "-m", "jobs.explain", *command(shards, tmp_path / "here", "--chunk-size", "4", "--local")]
    words = [sys.executable, "-m", "tests.helpers.marking", str(marks), *given]
    words += ["--replicas", "4", "--min-replicas", "1", "--gpus-per-replica", "0.5", "--wait-minutes", "2"]
    with said.open("w") as output:
        job = subprocess.Popen(words, env=environment | {"RAY_ADDRESS": cluster.address}, stdout=output)
    try:
        until(job, lambda: "waiting for nodes" in said.read_text())
        subprocess.run(local, env=environment, check=True, stdout=subprocess.DEVNULL)
        assert not (marks / "decode").exists()
        with_gpu = cluster.add(2, 1)
        until(job, lambda: lost in seen(marks, "decode"))
        cluster.end(lost)
        assert job.wait(60) == 0
    finally:
        job.kill()
        job.wait()
    assert f"images        {N_SCENES}, refused: none" in said.read_text()
    assert differences(tmp_path / "here", tmp_path / "there") == []
    assert seen(marks, "explain").keys() == {with_gpu}
    assert with_gpu not in seen(marks, "decode")
    assert seen(marks, "decode")[lost] == 1
    assert seen(marks, "decode").total() >= N_SCENES / 4 + 1  # what the lost node began was begun again


def seen(marks: Path, step: str) -> Counter[str]:
    """On which nodes a step ran, how often."""
    return Counter((marks / step).read_text().split() if (marks / step).exists() else [])


def until(job: "subprocess.Popen[bytes]", happened: Callable[[], bool]) -> None:
    """Wait for something that a job does."""
    deadline = time.monotonic() + 60
    while not happened():
        assert job.poll() is None, "the job has ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)
