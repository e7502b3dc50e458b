"""The lock of a run folder, with real processes, on a local folder and on a store that speaks S3."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs import explain, index
from saecore.upkeep import holder, lock
from saecore.upkeep.lease import Claim, Folder, HeldError, TakenError, Times
from tests.conftest import command
from tests.helpers import planted
from tests.helpers.mistakes import mistake
from tests.jobs.test_jobs import ROOT

HOLDS = """
import sys, time
from saecore.upkeep import lock
with lock.alone(sys.argv[1], "relmap explain", print, lock.Times(*map(float, sys.argv[2:]))):
    print("holds", flush=True)
    time.sleep(60)
"""

SHORT = Times(lease=1.2, renew=0.3, poll=0.05)


@contextmanager
def another(uri: str, times: Times = SHORT) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a folder."""
    words = [sys.executable, "-c", HOLDS, uri, *map(str, times)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        try:
            yield process
        finally:
            process.kill()


def claims(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".lease-")]


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process takes all others for processes of another machine."""
    monkeypatch.setattr(holder, "_machine", lambda: "another machine")


@pytest.mark.slow
def test_a_second_job_is_refused_and_says_who_holds_the_folder(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    given = command(shards, out, "--local", "--limit", "8")
    with another(str(out)) as first:
        said = refused(given, capsys)
        assert f"--out {out} is in use: relmap explain on " in said
        assert f"process {first.pid}, since 20" in said
        assert "last sign of life 0 s ago" in said
        assert not (out / "run.json").exists()
        first.kill()
        began = time.monotonic()
        with lock.alone(str(out), "relmap explain", print):
            assert time.monotonic() - began < 2, "on this machine no lease is waited for"
    assert explain.main(given) == 0
    assert claims(out) == []


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert explain.main(argv) == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_jobs_that_write_latents_are_refused_and_readers_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = planted.write(tmp_path / "run")
    with another(run):
        assert "--run" in mistake(index.main, ["--run", run], capsys)
        assert planted.write(run) == run, "the folder still holds a run, hidden files and all"
        found = lock.holder_of(run, time.time())
        assert found is not None
        assert found[0].command == "relmap explain"
    assert index.main(["--run", run]) == 0
    assert lock.holder_of(run, time.time()) is None


@pytest.mark.slow
def test_the_lease_of_another_machine_ends_and_the_wait_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with another(str(tmp_path)) as first:
        elsewhere(monkeypatch)
        with pytest.raises(HeldError, match=f"process {first.pid}"), lock.alone(str(tmp_path), "next", print, SHORT):
            pass
        assert "waiting up to 1.2 s for its next sign of life" in capsys.readouterr().out
        first.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with lock.alone(str(tmp_path), "next", print, SHORT):
            assert 0.5 < time.monotonic() - began < 5
            assert len(claims(tmp_path)) == 1
            first.send_signal(signal.SIGCONT)


def test_a_holder_that_was_taken_for_dead_stops(tmp_path: Path) -> None:
    with lock.alone(str(tmp_path), "first", print, SHORT) as held:
        held.check()
        (own,) = Folder(str(tmp_path)).seen().values()
        other = Claim("other", holder.Holder("gpu-7", 1, "relmap explain", 0.0, "gpu-7", ""), True, (own.claim.id,))
        Folder(str(tmp_path)).write(other)
        deadline = time.monotonic() + 20
        while held.taken is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(TakenError, match="no sign of life: relmap explain on gpu-7, process 1"):
            held.check()
    assert claims(tmp_path) == [".lease-other.json"], "its own claim is gone"


@pytest.mark.slow
def test_a_job_whose_lease_was_taken_ends_in_one_sentence(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = command(shards, tmp_path / "run", "--local", "--limit", "16")
    with monkeypatch.context() as patch:
        patch.setattr(lock.Lock, "taken", TakenError("this job was taken for dead"))
        assert explain.main(given) == 1
    assert capsys.readouterr().err == "error: this job was taken for dead; the same command resumes from here\n"
    assert explain.main(given) == 0


def test_a_store_that_is_down_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    down, tried = True, list[str]()

    def write(self: Folder, claim: Claim) -> None:
        tried.append(claim.id)
        if down:
            raise OSError("the store does not answer")
        before(self, claim)

    before = Folder.write
    with lock.alone(str(tmp_path), "first", print, SHORT) as held:
        monkeypatch.setattr(Folder, "write", write)
        wait_for(tried, 2)
        down = False
        wait_for(tried, 4)
        held.check()
    assert "could not be renewed, and the work goes on: the store does not answer" in capsys.readouterr().err
    assert claims(tmp_path) == []


def wait_for(what: list[str], n: int) -> None:
    deadline = time.monotonic() + 20
    while len(what) < n:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_is_told_from_another_with_the_same_id() -> None:
    me = holder.this_process("job")
    assert me.is_alive()
    assert not me.is_gone()
    with subprocess.Popen(["true"]) as ended:
        while Path(f"/proc/{ended.pid}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
        unreaped = holder.Holder(me.host, ended.pid, "job", 0.0, me.machine, "")
        assert unreaped.is_gone(), "killed, and not yet waited for by its parent"
    assert holder.Holder(me.host, os.getpid(), "job", 0.0, me.machine, "1").is_gone(), "the id was used again"
    assert not holder.Holder(me.host, ended.pid, "job", 0.0, "elsewhere", "").is_gone(), "nothing is known of others"


def test_a_folder_that_was_made_for_the_lock_does_not_stay_empty(tmp_path: Path) -> None:
    with lock.alone(str(tmp_path / "new" / "run"), "job", print, SHORT):
        assert claims(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


def test_what_no_version_wrote_is_no_claim(tmp_path: Path) -> None:
    for name, content in (("a", "{"), ("b", "[]"), ("c", json.dumps({"id": "x", "holder": 1}))):
        (tmp_path / f".lease-{name}.json").write_text(content)
    with lock.alone(str(tmp_path), "job", print, SHORT) as held:
        held.check()
