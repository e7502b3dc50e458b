"""Do two runs hold the same data? Their tables compared row by row, to the last bit, and what they were made of.

    python -m benchmarks.same_tables runs/before runs/after

This comparison holds a change of the code to its promise that data stay as they are: make the demo's run with the code before
the change and with the code after it, and compare the two. Column `uri` of `images` and the part `inputs` of the fingerprint
say where the inputs of a run lay: neither is compared. `latents.parquet` is compared where both runs have one.

Make both runs on one machine, with the same number of threads of PyTorch (OMP_NUM_THREADS). Another number of threads sums in
another order, and values differ in their last bit.

Exit code 0 if everything is equal, 1 if something differs.
"""

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import duckdb

TABLES = {
    "images": "images/*.parquet",
    "activations": "activations/*.parquet",
    "maps": "maps/*.parquet",
    "latents": "latents.parquet",
}
"""Where the rows of each table lie, below a run."""

PLACES = {"images": ["uri"]}
"""Columns that tell where inputs lay, by table."""


def differences(before: Path, after: Path) -> list[str]:
    """What differs between two local runs, a line each; empty if nothing does."""
    lines = []
    for table, files in TABLES.items():
        holders = [run for run in (before, after) if any(run.glob(files))]
        if len(holders) == 2:
            lines += [
                f"{table}: {line}" for line in of_table(f"{before}/{files}", f"{after}/{files}", PLACES.get(table, []))
            ]
        elif holders and table != "latents":
            lines.append(f"{table}: only {holders[0]} has this table")
    parts = [json.loads((run / "run.json").read_text())["parts"] for run in (before, after)]
    for part in sorted((parts[0].keys() | parts[1].keys()) - {"inputs"}):
        if parts[0].get(part) != parts[1].get(part):
            lines.append(f"fingerprint: {part} is {parts[0].get(part)!r} before and {parts[1].get(part)!r} after")
    return lines


def of_table(before: str, after: str, omitted: Collection[str]) -> list[str]:
    """What differs between the rows of two globs of Parquet files, in every column that is not omitted."""
    columns = [[(name, kind) for name, kind, *_ in ask(f"DESCRIBE FROM '{files}'")] for files in (before, after)]
    if columns[0] != columns[1]:
        return [f"columns are {columns[0]} before and {columns[1]} after"]
    names = ", ".join(f'"{name}"' for name, _ in columns[0] if name not in omitted)
    lines = []
    for files, others, when in ((before, after, "before"), (after, before, "after")):
        rows = f"SELECT {names} FROM '{files}' EXCEPT ALL SELECT {names} FROM '{others}'"
        [[count]] = ask(f"SELECT count(*) FROM ({rows})")
        if count:
            lines.append(f"{count:,} row{'s' * (count != 1)} only {when}")
    [[total]] = ask(f"SELECT count(*) FROM '{before}'")
    print(f"{Path(before).parent.name if '*' in before else Path(before).stem}: {total:,} rows compared")
    return lines


def ask(query: str) -> list[tuple[Any, ...]]:
    return duckdb.sql(query).fetchall()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_tables", description="Do two runs hold the same data?"
    )
    parser.add_argument("before", type=Path, help="a run, on this machine")
    parser.add_argument("after", type=Path, help="another run, on this machine")
    given = parser.parse_args(argv)
    for run in (given.before, given.after):
        if not (run / "run.json").is_file():
            parser.error(f"{run} holds no run")
    lines = differences(given.before, given.after)
    print("\n".join(lines) or "equal: every value of every table, and all parts of the fingerprints")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
