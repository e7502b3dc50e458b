"""How far a run is, who works on it, and what is left, from its files: on any machine that sees the folder.

    python -m jobs.status runs/photos
    python -m jobs.status s3://bucket/run --json

The exit code is 0 whatever the state is, and 2 where there is no run.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from saecore.upkeep import progress
from saecore.upkeep.progress import Status

from . import commands
from .summaries import in_bytes


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How far a run is, and who works on it."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, complete or not: a local path, s3:// or gs://."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def check(self) -> None:
        """See `commands.Checked.check`."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: status(sys.argv[1:] if argv is None else list(argv)))


def status(argv: list[str]) -> int:
    """Look, and say what is there."""
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "status")
        try:
            found = progress.status(arguments.run, time.time())
        except OSError as error:
            raise ValueError(f"{arguments.run} cannot be read: {error}") from error
    print(json.dumps(as_json(found), indent=1) if arguments.json else said(found))
    return 0


def as_json(found: Status) -> dict[str, Any]:
    """All that is known, for programs."""
    fields = found._asdict()
    record, holder = fields.pop("record"), fields.pop("holder")
    whole = {"kind": record.kind, "command": record.command, "started": record.started, "left": found.left}
    return {**whole, **fields, "holder": None if holder is None else dataclasses.asdict(holder)}


def said(found: Status) -> str:
    """All that is known, as a person reads it."""
    share = f" ({found.done / found.planned:.1%})" if found.planned else ""
    lines = [
        f"run           {found.record.kind}, begun {found.record.started or 'at a time that it does not say'}",
        f"state         {found.state}{'' if found.holder is None else writer(found)}",
        f"images        {found.done:,} of {found.planned:,}{share}, refused: {refused(found)}",
        f"chunks        {found.chunks - found.pending:,} of {found.chunks:,}, {found.pending:,} pending",
    ]
    if found.rate and found.state != "complete":
        lines.append(f"speed         {found.rate:,.1f} images/s over the last minutes of work{remaining(found.left)}")
    lines.append(
        f"on disk       {', '.join(f'{table} {in_bytes(size)}' for table, size in found.bytes.items()) or 'nothing'}"
    )
    if found.record.kind == "explain":
        lines.append(f"index         {found.indexed}; names: {'present' if found.named else 'none'}")
    if found.state == "stopped":
        lines.append(f"resume        {found.record.command}")
    return "\n".join(lines)


def writer(found: Status) -> str:
    """Who writes into the folder."""
    assert found.holder is not None
    return f": {found.holder.words()}; last sign of life {found.silent:.0f} s ago"


def refused(found: Status) -> str:
    """Refused images by reason."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(found.refused.items())) or "none"
    done = found.chunks - found.pending
    return reasons if found.read == done else f"{reasons} (in {found.read:,} of the {done:,} chunks)"


def remaining(seconds: float | None) -> str:
    """How long it will take."""
    if seconds is None:
        return ""
    minutes = int(seconds // 60)
    return (
        f", {minutes // 60}:{minutes % 60:02d} h left" if minutes >= 60 else f", {minutes}:{int(seconds % 60):02d} left"
    )


if __name__ == "__main__":
    sys.exit(main())
