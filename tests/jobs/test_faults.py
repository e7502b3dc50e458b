"""What goes wrong in a run and does not end it, and what is seen of it: rows with reasons, exit codes, the log for machines."""

import dataclasses
import functools
import hashlib
import importlib
import json
import os
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from jobs import commands, exits, explain, pipeline, signals
from saecore.images.chunks import read_chunk
from saecore.pipeline.decoder import Limited
from saecore.runs.files import read_plan
from saecore.runs.run import Run
from saecore.storage import read_json
from tests.conftest import command
from tests.helpers.decoders import pause_on
from tests.helpers.mistakes import mistake
from tests.jobs.test_jobs import DEADLY, ROOT, rows

Flow = Callable[[pipeline.Job, pa.Table], Iterator[dict[str, Any]]]


@pytest.mark.parametrize("flow", [pipeline.in_process, pipeline.on_ray], ids=["local", "ray"])
def test_an_image_that_hangs_its_decoder_becomes_a_row(
    flow: Flow, ray_session: None, shards: Path, local_run: Path, tmp_path: Path
) -> None:
    """At the first attempt, in about the time of the limit, also where the decoder keeps Python's lock."""
    arguments = command(shards, tmp_path / "run", "--limit", "32", "--ray", "--image-seconds", "1.5")
    job = explain.prepare(commands.parse(explain.Arguments, arguments, "jobs.explain"), arguments)
    assert job is not None
    assert isinstance(job.decode.decode, Limited)
    assert job.decode.decode.seconds == 1.5
    raw = pa.concat_tables(batch for chunk in job.run.plan().to_pylist() for batch in read_chunk(chunk)).to_pylist()
    (data,) = (row["data"] for row in raw if row["key"] == DEADLY)
    hanging = functools.partial(pause_on, sha256=hashlib.sha256(data).hexdigest(), decode=job.decode.decode.decode)
    job.decode.decode = dataclasses.replace(job.decode.decode, decode=hanging)
    began = time.monotonic()
    list(flow(job, job.run.pending()))
    assert time.monotonic() - began < 40
    job.run.finish(0, 0.0)
    images = rows(tmp_path / "run", "images")
    refused = {row["key"]: (row["error"], row["error_detail"]) for row in images.values() if row["error"] is not None}
    assert refused == {DEADLY: ("timed-out", "its decoder was not done after 1.5 s")}
    fine = {key[0] for key, row in images.items() if row["error"] is None}
    assert len(fine) == 31
    assert rows(tmp_path / "run", "maps").keys() == {key for key in rows(local_run, "maps") if key[0] in fine}


# ---- Signals: what is worked on is finished.


def test_the_chunk_that_is_worked_on_is_committed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM comes before the third chunk is written; with no time to finish, the chunk is lost."""
    write = Run.write_chunk

    def write_chunk(self: Run, chunk_id: int, *more: Any) -> Any:
        if chunk_id == 2:
            signal.raise_signal(signal.SIGTERM)
        return write(self, chunk_id, *more)

    monkeypatch.setattr(Run, "write_chunk", write_chunk)
    for seconds, committed in (("10", 3), ("0", 2)):
        out = tmp_path / seconds
        assert explain.main(command(shards, out, "--local", "--stop-seconds", seconds)) == exits.TERMINATED
        assert len(list((out / "commits").iterdir())) == committed
        said = capfd.readouterr()
        assert said.err == "stopped: the same command resumes from here\n"
        assert ("finishing the chunk" in said.out) is (committed == 3)


def chunks_done(chunks: int, seconds: float, n: int = 9, at: int = 3, long: float = 0.0) -> int:
    """Of n chunks, how many are done where Ctrl-C comes in one of them, which then takes so long."""
    done = 0

    def work() -> None:
        nonlocal done
        with signals.finishing(chunks, seconds) as done_one:
            for chunk in range(n):
                if chunk == at:
                    signal.raise_signal(signal.SIGINT)
                    deadline = time.monotonic() + long
                    while time.monotonic() < deadline:
                        pass
                done += 1
                done_one()

    with signals.listening() as asked, pytest.raises(signals.Stopped):
        work()
    assert asked.exit_code == exits.INTERRUPTED
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    return done


def test_as_many_chunks_are_finished_as_are_worked_on() -> None:
    assert chunks_done(1, 5.0) == 4
    assert chunks_done(3, 5.0) == 6
    assert chunks_done(1, 0.0) == 3
    assert chunks_done(50, 5.0) == 9, "the work ends first"
    began = time.monotonic()
    assert chunks_done(1, 0.3, long=30.0) == 3, "it takes too long"
    assert time.monotonic() - began < 10


def test_a_second_signal_waits_for_no_chunk() -> None:
    copy = os.fork()
    if not copy:
        with signals.listening(), signals.finishing(1, 30.0):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) == exits.TERMINATED


# ---- Exit codes.


@pytest.fixture(scope="module")
def holed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten images, two of them damaged."""
    folder = tmp_path_factory.mktemp("holed")
    for number in range(10):
        Image.new("RGB", (20, 20), (25 * number, 0, 0)).save(folder / f"{number}.png")
    for number in (3, 7):
        (folder / f"{number}.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize("job", ["explain", "embed"])
def test_more_refused_images_than_are_allowed(
    job: str, holed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is complete, and says so again; the limit is no other configuration."""
    out = tmp_path / "run"
    words = ["--images", str(holed), "--clip", "demo", "--out", str(out), "--local"]
    words += ["--sae", "demo", "--allow-poor-fit"] if job == "explain" else ["--no-npy"]
    main = importlib.import_module(f"jobs.{job}").main
    sentence = "2 of 10 images are refused, more than --max-error-share 0.1 allows: exit code 3\n"
    for _ in range(2):
        assert main([*words, "--max-error-share", "0.1"]) == exits.REFUSED
        assert sentence in capsys.readouterr().out
        assert json.loads((out / "run.json").read_text())["status"] == "complete"
    for share in ([], ["--max-error-share", "0.2"]):
        assert main([*words, *share]) == exits.COMPLETE
    wrong = mistake(main, [*words, "--max-error-share", "1.5"], capsys)
    assert wrong == "--max-error-share 1.5: must be from 0 to 1"


def test_exit_codes_are_those_of_the_page_and_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    """`jobs.exits` states them; docs/explain.md lists them, and help too."""
    page = (ROOT / "docs" / "explain.md").read_text()
    listed = page[page.index("| exit code |") :].split("\n\n")[0].splitlines()[2:]
    assert {int(code) for line in listed for code in re.findall(r"\d+", line.split("|")[1])} == set(exits.MEANINGS)
    with pytest.raises(SystemExit):
        explain.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for code, meaning in exits.MEANINGS.items():
        assert f"{code} {meaning}" in said
    assert exits.INTERRUPTED == 128 + signal.SIGINT
    assert exits.TERMINATED == 128 + signal.SIGTERM
    assert exits.UNREAD == 128 + signal.SIGPIPE


# ---- What machines see.


def events_in(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def assert_told(events: list[dict[str, Any]], run: Path, total: int) -> None:
    """A line for each of the run's commits, with what the commit says."""
    commits = {commit["chunk_id"]: commit for commit in map(read_json, map(str, (run / "commits").glob("*.json")))}
    plan = {chunk["chunk_id"]: chunk["uri"] for chunk in read_plan(str(run)).to_pylist()}
    assert sorted(event["chunk"] for event in events) == sorted(commits)
    for event in events:
        commit = commits[event["chunk"]]
        assert event["event"] == "chunk"
        assert event["run"] == str(run)
        assert event["shard"] == plan[event["chunk"]]
        assert (event["images"], event["refused"]) == (commit["images"], commit["refused"])
        assert event["bytes"] == sum((run / file["path"]).stat().st_size for file in commit["files"])
        assert event["seconds"].keys() == commit["seconds"].keys()
        assert event["host"] == socket.gethostname()
        assert datetime.fromisoformat(event["time"]).tzinfo is not None
    assert [event["done"] for event in events] == list(accumulate(event["images"] for event in events))
    assert {event["total"] for event in events} == {total}


def test_a_line_of_json_for_each_chunk(holed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a file that a resumed run appends to, or among what is printed."""
    log = tmp_path / "logs" / "run.jsonl"
    words = command(holed, tmp_path / "run", "--local", "--chunk-size", "4", "--allow-poor-fit")
    for _ in range(2):
        assert explain.main([*words, "--log-json", str(log)]) == 0
        assert_told(events_in(log.read_text()), tmp_path / "run", 10)
    assert sum(sum(event["refused"].values()) for event in events_in(log.read_text())) == 2
    capsys.readouterr()
    words = command(holed, tmp_path / "printed", "--local", "--chunk-size", "4", "--allow-poor-fit", "--log-json", "-")
    assert explain.main(words) == 0
    assert_told(events_in(capsys.readouterr().out), tmp_path / "printed", 10)
    words = command(holed, tmp_path / "other", "--log-json", "s3://bucket/log")
    wrong = mistake(explain.main, words, capsys)
    assert wrong == "--log-json s3://bucket/log: a store cannot be appended to; name a local file, or - to print"


def test_metrics_of_a_run_are_at_the_port_that_ray_serves(ray_session: None, holed: Path, tmp_path: Path) -> None:
    import ray

    log, out = tmp_path / "log.jsonl", tmp_path / "run"
    words = command(holed, out, "--ray", "--chunk-size", "4", "--allow-poor-fit", "--log-json", str(log))
    assert explain.main(words) == 0
    events = events_in(log.read_text())
    assert_told(events, out, 10)
    (node,) = (node for node in ray.nodes() if node["Alive"])
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    seconds = {step: sum(event["seconds"][step] for event in events) for step in events[0]["seconds"]}
    expected = {
        ("ray_relmap_images_total", ""): 10,
        ("ray_relmap_chunks_total", ""): 3,
        ("ray_relmap_done_images", ""): 10,
        ("ray_relmap_planned_images", ""): 10,
        ("ray_relmap_refused_total", "empty"): 2,
        ("ray_relmap_bytes_total", ""): sum(event["bytes"] for event in events),
        **{("ray_relmap_seconds_total", step): pytest.approx(value, abs=1e-3) for step, value in seconds.items()},
    }
    deadline = time.monotonic() + 60
    while (seen := metrics_at(address, str(out))) != expected:
        assert time.monotonic() < deadline, seen
        time.sleep(0.5)


def metrics_at(address: str, run: str) -> dict[tuple[str, str], float]:
    """Our metrics of one run, each by its name and its further label."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    seen = {}
    for name, labels, value in re.findall(r"^(ray_relmap_\w+)\{(.*)\} (\S+)$", text, re.M):
        label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if label["run"] == run:
            seen[name, label.get("reason") or label.get("step") or ""] = float(value)
    return seen
