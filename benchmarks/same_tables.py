"""Do two runs hold the same data? Their tables compared row by row, to the last bit, and what they were made of.

    python -m benchmarks.same_tables runs/before runs/after

A change of the code that promises to leave data as they are is held to that promise by this comparison: make the demo's run
with the code before and after it, and compare. Column `uri` of `images` says where a run's inputs lay, and so does the part
`inputs` of its fingerprint: neither is compared. `latents.parquet` is compared where both runs have one.

Exit code 0 if everything is equal, 1 if something differs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

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
        paths = [f"{run}/{files}" for run in (before, after)]
        there = [any(run.glob(files)) for run in (before, after)]
        if not any(there) or (table == "latents" and not all(there)):
            continue
        if not all(there):
            lines.append(f"{table}: only {(before, after)[there.index(True)]} has this table")
            continue
        columns = [
            [(name, kind) for name, kind, *_ in duckdb.sql(f"DESCRIBE FROM '{path}'").fetchall()] for path in paths
        ]
        if columns[0] != columns[1]:
            lines.append(f"{table}: columns are {columns[0]} before and {columns[1]} after")
            continue
        names = ", ".join(f'"{name}"' for name, _ in columns[0] if name not in PLACES.get(table, []))
        for here, there_path, when in ((*paths, "before"), (*reversed(paths), "after")):
            rows = f"SELECT {names} FROM '{here}' EXCEPT ALL SELECT {names} FROM '{there_path}'"
            [[count]] = duckdb.sql(f"SELECT count(*) FROM ({rows})").fetchall()
            if count:
                lines.append(f"{table}: {count:,} rows are there {when} only")
        [[total]] = duckdb.sql(f"SELECT count(*) FROM '{paths[0]}'").fetchall()
        print(f"{table}: {total:,} rows compared in {len(columns[0])} columns")
    parts = [json.loads((run / "run.json").read_text())["parts"] for run in (before, after)]
    for part in sorted((parts[0].keys() | parts[1].keys()) - {"inputs"}):
        if parts[0].get(part) != parts[1].get(part):
            lines.append(f"fingerprint: {part} is {parts[0].get(part)!r} before and {parts[1].get(part)!r} after")
    return lines


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
    print("\n".join(lines) or "equal: every value of every table, and all that the fingerprints are made of")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
