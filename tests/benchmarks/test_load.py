"""benchmarks load: a small form of all three parts, a process that leaks, and what is said of figures by hand."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import load
from benchmarks.__main__ import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory of other processes")

LEAK = """
import pathlib, sys, time
kept = []
for number in range(10):
    kept.append(bytearray(b"1") * (int(sys.argv[2]) << 20))
    (pathlib.Path(sys.argv[1]) / str(number)).touch()
    time.sleep(0.1)
"""
"""Commits ten chunks, and keeps so many MiB for each."""


def test_a_large_tar_and_many_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--images", "0", "--tar-gb", "0.06", "--planned", "1200", "--folder", str(tmp_path)]
    assert main(["load", *small]) == 0
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    assert "a tar of 0.06 GB, 28 images\n" in said
    for step in ("scan", "decode", "memory"):
        peak = re.search(rf"{step}: (?:[\d.]+ s, )?([\d.]+) GB, aim [\d.]+: yes", said)
        assert peak is not None, said
        assert 0.05 < float(peak[1]) < 1
    assert "a plan of 1,200 shards\n" in said


@pytest.mark.ray
@pytest.mark.slow
def test_the_processes_of_a_run(tmp_path: Path) -> None:
    """A Ray of its own, as the benchmark starts it: each kind of process is seen from the first look to the last."""
    figures = load.run(tmp_path, images=480, shards=4, chunk_size=16)
    assert (figures["images"], figures["chunks"]) == (480, 32)
    assert {"driver", "replicas", "workers that decode", "Ray itself"} <= set(figures["held"])
    for kind, held in figures["held"].items():
        assert held == sorted(held)
        assert held[0] > 5e6, kind
    # PyTorch and the models are in the replica, and not in the workers that decode.
    assert figures["held"]["replicas"][2] > figures["held"]["workers that decode"][2] + 50e6


@pytest.mark.parametrize(("each", "verdict"), [(0, "yes"), (20, "NO")])
def test_a_leak_is_told(each: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "EVERY", 0.02)
    with subprocess.Popen([sys.executable, "-c", LEAK, str(tmp_path), str(each)]) as process:
        held = load.at_shares(list(load.watch(process, tmp_path, 10)))
    assert process.returncode == 0
    assert list(held) == ["driver"]
    figures = {"run": {"images": 1, "shards": 1, "chunks": 10, "seconds": 1.0, "held": held}}
    assert load.told(figures).endswith(f"aim 5%: {verdict}")


def test_what_is_said_by_hand() -> None:
    looks = [(0.0, 90, 0), (0.1, 100, 7), (0.4, 104, 9), (0.5, 95, 8), (1.0, 103, 8), (1.0, 300, 8)]
    held = load.at_shares([load.Sample(share, {"driver": one, "replicas": other}) for share, one, other in looks])
    assert held == {"driver": [100, 104, 104, 300], "replicas": [7, 9, 9, 9]}
    figures: dict[str, Any] = {
        "run": {"images": 10, "shards": 2, "chunks": 5, "seconds": 3.0, "held": held},
        "stream": {"images": 3, "bytes": 6e9, "steps": {"scan": {"seconds": 1.0, "peak_bytes": 1.01e9}}},
        "plan": {"shards": 1000, "seconds": 8.0, "peak_bytes": 308e6},
    }
    run, stream, plan = load.told(figures).split("\n\n")
    assert run.splitlines()[-2:] == [
        "driver: 4.0% more at 100% than at 10%, aim 5%: yes",
        "replicas: 28.6% more at 100% than at 10%, aim 5%: NO",
    ]
    assert stream.endswith("scan: 1.0 s, 1.01 GB, aim 1: NO")
    assert plan.splitlines()[1:] == ["time: 8.0 s, aim 8: yes", "memory: 0.31 GB, aim 0.31: NO"]
