"""Check a run's files against what was written: counts, sizes, checksums, columns, each planned image once, nothing besides.

    python -m jobs.verify runs/photos
    python -m jobs.verify runs/photos --repair       # the command that made the run then does the damaged chunks again

It reads every file of the run once. The exit code is 0 if the run is sound, so far as it is done, and 1 if it is not.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from saecore.runs.record import Record, read_record
from saecore.storage import is_file, join_uri
from saecore.upkeep.problem import Problem
from saecore.upkeep.verify import Verification, reopen

from . import commands, locks
from .summaries import in_bytes
from .terminal import printable


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Check that a run's files are as they were written."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, complete or not: a local path, s3:// or gs://."""
    repair: bool = False
    """Mark damaged chunks as not done, so that the command that made the run does them again. No data is removed."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def check(self) -> None:
        """See `commands.Checked.check`."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: verify(sys.argv[1:] if argv is None else list(argv)))


def verify(argv: list[str]) -> int:
    """Check everything, say each problem and what mends it."""
    started = time.perf_counter()
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "verify")
        try:
            if not is_file(join_uri(arguments.run, "run.json")):
                raise ValueError(f"{arguments.run} holds no run: there is no run.json")
            record = read_record(arguments.run)
        except OSError as error:
            raise ValueError(f"{arguments.run} cannot be read: {error}") from error
        if arguments.repair:
            commands.check_writable("--repair", arguments.run)
    with locks.held("--repair", arguments.run if arguments.repair else "", "verify") as lock:
        checked, problems = Verification(arguments.run, record), list[Problem]()
        for problem in checked.problems():
            problems.append(problem)
            if not arguments.json:
                print(printable(f"{problem.path} {problem.what}"), flush=True)
        lock.check()
        if arguments.repair and (broken := [one for one in problems if one.remedy in ("chunk", "close")]):
            reopen(
                arguments.run, {one.chunk_id for one in broken if one.remedy == "chunk" and one.chunk_id is not None}
            )
    if arguments.json:
        print(json.dumps(as_json(checked, problems), indent=1))
    else:
        print(
            "\n".join([summary(checked, problems, time.perf_counter() - started), *mends(arguments, record, problems)])
        )
    return 1 if problems else 0


def as_json(checked: Verification, problems: Sequence[Problem]) -> dict[str, Any]:
    """What was found, for programs."""
    names = ("planned", "done", "images", "files", "bytes", "rows")
    return {
        "sound": not problems,
        "status": checked.record.status,
        **{name: getattr(checked, name) for name in names},
        "problems": [problem._asdict() for problem in problems],
    }


def summary(checked: Verification, problems: Sequence[Problem], seconds: float) -> str:
    """What was checked, and how it stands."""
    pending = checked.planned - checked.done
    still = f"; {pending:,} chunks are not done" if pending else ""
    head = f"{len(problems):,} problems" if problems else "sound"
    return (
        f"{head:<14}{checked.images:,} images in {checked.done:,} chunks, {checked.files:,} files, {in_bytes(checked.bytes)}, "
        f"in {seconds:.1f} s{still}"
    )


def mends(arguments: Arguments, record: Record, problems: Sequence[Problem]) -> list[str]:
    """What to do about the problems, a line for each kind."""
    remedies = {problem.remedy for problem in problems}
    chunks = {problem.chunk_id for problem in problems if problem.remedy == "chunk"}
    lines = []
    if remedies & {"chunk", "close"}:
        what = (
            f"{len(chunks):,} chunks are marked as not done" if arguments.repair else "mark what is damaged as not done"
        )
        if not arguments.repair:
            what += f": {commands.line('verify', arguments.run, '--repair')}"
        lines.append(f"{what}; then the command that made the run mends it: {record.command}")
    if "index" in remedies:
        lines.append(f"the index is made again by {commands.line('index', '--run', arguments.run, '--rebuild')}")
    if "name" in remedies:
        lines.append(f"names are made again by {commands.line('name', '--run', arguments.run)}")
    if "move" in remedies:
        lines.append(
            "files that are none of the run's are yours to move away: readers of the whole folder would read them"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
