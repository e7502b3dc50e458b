"""benchmarks chaos: what is lost, double, unequal or done again is counted; a short form of the command itself."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from benchmarks import aftermath, chaos, faults
from benchmarks.__main__ import main
from benchmarks.faults import Struck
from benchmarks.watched import Seen
from saecore import storage
from tests.benchmarks.test_same_tables import changed, with_column
from tests.helpers import planted
from tests.helpers.mistakes import mistake

ROOT = Path(__file__).parent.parent.parent

ONE, TWO = "chunk-00000000.parquet", "chunk-00000001.parquet"


def swapped(run: Path) -> None:
    """The data of another chunk under a chunk's name."""
    shutil.copy(run / "images" / ONE, run / "images" / TWO)


def unfinished(run: Path) -> None:
    """A run that never got to its end."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))


PLANTED: dict[str, tuple[Callable[[Path], object], dict[str, int]]] = {
    "nothing": (lambda run: None, {}),
    "a commit whose data never came": (
        changed(f"maps/{TWO}", lambda table: table.slice(0, 0)),
        {"lost": 12, "files_unequal": 1},
    ),
    "a chunk written twice, under two names": (
        changed(f"images/{TWO}", lambda table: pa.concat_tables([table, table])),
        {"double": 2, "files_unequal": 1},
    ),
    "another value": (
        changed(f"activations/{ONE}", with_column("activation", lambda column: pc.add(column, pa.scalar(1.0, pa.float32())))),
        {"unequal": 4, "files_unequal": 1},
    ),
    "data of another chunk": (swapped, {"lost": 2, "double": 3, "files_unequal": 1}),
    "a file that nobody names": (lambda run: shutil.copy(run / "maps" / ONE, run / "maps" / "late.parquet"), {"stray": 1}),
    "a temporary file": (lambda run: (run / "maps" / f".{ONE}.tmp-1").touch(), {"hidden": 1}),
    "no end": (unfinished, {"lost": 6 + 10 + 30}),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_wrong_with_a_run_is_counted(what: str, tmp_path: Path) -> None:
    """Hand-counted on the planted run: 6 images, one refused; of the others 2 latents each, and 3 maps by two methods."""
    planted.write(tmp_path / "undisturbed")
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "run")
    change, expected = PLANTED[what]
    change(tmp_path / "run")
    found = aftermath.compared(tmp_path / "run", tmp_path / "undisturbed")
    rows = found.pop("rows")
    assert {name: count for name, count in found.items() if count} == expected
    played = {**found, "rows": rows, "finished_again": 0, "again": 0, "in_flight": 0, "where": "local"}
    played |= {"faults": [{"kind": "driver", "moment": "last", "hit": True}]}
    played |= {"sessions": [{"code": -9, "seconds": 1.0, "gone_seconds": 0.5, "left": []}]}
    good, said = aftermath.verdict([played], 1)
    assert good == (what in ("nothing", "a temporary file"))
    assert said.startswith("yes: 1 of 1 faults hit; 0 rows lost" if good else "NO: 1 of 1 faults hit; ")
    assert aftermath.table([played]).splitlines()[2].startswith(f"| local: driver | 1 | 0 | {rows} | {found['lost']} |")


def test_work_that_is_done_again_is_told_from_what_was_in_flight(tmp_path: Path) -> None:
    """Chunks 0, 1, 2 of 3, 2 and 1 images. At the fault 0 is committed and 1 has begun; then 1 begins again, and 0 too."""
    planted.write(tmp_path / "run")
    (tmp_path / "explained").write_text("10 0\n20 1\n40 1\n50 2\n")
    fault = Struck("driver", "between", True, 30, [0])
    assert aftermath.again(tmp_path / "run", tmp_path, [fault]) == {"again": 2, "in_flight": 2, "finished_again": 0}
    (tmp_path / "explained").write_text("10 0\n20 1\n40 1\n50 2\n60 0\n")
    assert aftermath.again(tmp_path / "run", tmp_path, [fault]) == {"again": 5, "in_flight": 2, "finished_again": 3}


def test_every_kind_comes_at_every_time_of_a_run() -> None:
    settings = chaos.Settings(Path(), 192, 8, 0, (), ("ray", "local", "nodes"))
    first, same = (list(itertools.islice(chaos.rounds(settings), 200)) for _ in range(2))
    assert first == same
    came = [fault for planned in first for fault in planned]
    assert {(fault.where, fault.kind) for fault in came} == {
        (w, kind) for w in faults.KINDS for kind in faults.KINDS[w]
    }
    assert {fault.moment.name for fault in came} == {"start", "begin", "between", "step", "last", "finish"}
    for planned in first:
        assert all(fault.kind in faults.SURVIVED for fault in planned[:-1])
        commits = [fault.moment.commits for fault in planned if not fault.moment.step]
        assert commits == sorted(commits)


def test_steps_of_a_commit_are_seen_where_they_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `storage.write_atomic` does to a file, in its order; anything else is no step."""
    run, meet = tmp_path / "run", tmp_path / "meet"
    meet.mkdir()
    seen, told = Seen(str(meet), str(run)), list[str]()
    monkeypatch.setattr(seen, "reach", told.append)
    is_on = True
    sys.addaudithook(lambda name, given: seen.event(name, given) if is_on else None)
    try:
        for _ in range(2):
            storage.write_atomic(str(run / "maps" / ONE), b"data")
        storage.write_atomic(str(tmp_path / "other"), b"data")
        (run / "maps" / ONE).read_bytes()
    finally:
        is_on = False
    assert told == [f"{stage} maps/{ONE} {n}" for n in (1, 2) for stage in ("open", "rename", "renamed")]


def test_a_store_can_refuse(tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    with pytest.raises(PermissionError, match="Permission denied"):
        Seen(str(tmp_path), str(tmp_path / "run")).reach("open plan.parquet 1")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--kinds", "replica", "--where", "local"], "--kinds replica: no such faults --where local"),
        (["--where", "moon"], "--where moon: must be of ray, local, nodes"),
    ],
)
def test_faults_that_there_are_not_are_told(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(main, ["chaos", *given], capsys) == said


@pytest.mark.slow
@pytest.mark.ray
def test_the_command_in_short(tmp_path: Path) -> None:
    """Faults on Ray and in one process: the rows are those of the undisturbed runs, and the log goes on where it ended."""
    log = tmp_path / "log"
    fixed = ["--images", "64", "--seed", "7", "--json", str(log), "--folder", str(tmp_path / "runs")]
    words = [sys.executable, "-m", "benchmarks", "chaos", *fixed]
    said, hits = "", 0
    for more in (["--where", "ray", "--kinds", "writer", "replica", "gcs"], ["--where", "local", "--kinds", "driver"]):
        hits += 2 if "ray" in more else 1  # of three on Ray one may come too late on a slow machine
        done = subprocess.run([*words, *more, "--faults", str(hits)], cwd=ROOT, capture_output=True, text=True)
        said = done.stdout
        assert done.returncode == 0, said + done.stderr
        hits = sum(fault["hit"] for line in log.read_text().splitlines() for fault in json.loads(line)["faults"])
    assert said.splitlines()[-1].startswith(f"yes: {hits} of "), said
