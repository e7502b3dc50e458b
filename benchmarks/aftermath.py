"""What became of runs that `benchmarks.chaos` disturbed: rows and files against an undisturbed run's, work done again, tables.

Tables are compared value by value and file by file. Left out: `run.json`, its card and the preview, which say when and where.
"""

from pathlib import Path
from typing import Any

import duckdb

from benchmarks.faults import Struck
from saecore.runs.files import read_manifest, read_plan
from saecore.runs.record import read_record

KEYS = {"images": "image_id", "activations": "image_id, rank", "maps": "image_id, latent, target, method"}
"""What makes a row the same row, by table."""

SHOULD_BE_NONE = {
    "lost": "rows lost",
    "double": "rows double",
    "unequal": "rows unequal",
    "files_unequal": "files unequal",
    "stray": "stray files",
    "finished_again": "images of finished chunks explained again",
}
"""What the target says is 0, in words."""


def compared(run: Path, undisturbed: Path) -> dict[str, int]:
    """Rows and files of a run against those of the undisturbed one."""
    found = dict.fromkeys(("rows", "lost", "double", "unequal", "files_unequal", "stray", "hidden"), 0)
    is_complete = (run / "run.json").exists() and read_record(str(run)).is_complete
    for table, key in KEYS.items():
        one = rows_of(undisturbed, table)
        [[n_rows]] = ask(f"SELECT count(*) FROM {one}")
        found["rows"] += n_rows
        if not is_complete:
            found["lost"] += n_rows
            continue
        other = rows_of(run, table)
        [[lost]] = ask(f"SELECT count(*) FROM (SELECT {key} FROM {one} EXCEPT SELECT {key} FROM {other})")
        [[double]] = ask(f"SELECT count(*) - count(DISTINCT ({key})) FROM {other}")
        [[changed]] = ask(f"SELECT count(*) FROM (FROM {other} EXCEPT ALL FROM {one})")
        found["lost"] += lost
        found["double"] += double
        found["unequal"] += max(0, changed - double)
    names, expected = visible(run), visible(undisturbed)
    found["stray"] = len(names - expected)
    found["hidden"] = sum(1 for path in run.rglob(".*.tmp-*"))
    tables = [name for name in expected if name.split("/")[0] in KEYS]
    found["files_unequal"] = sum(1 for name in tables if bytes_of(run / name) != bytes_of(undisturbed / name))
    return found


def rows_of(run: Path, table: str) -> str:
    """A table of a complete run, by its manifest, as DuckDB reads it."""
    files = [row["path"] for row in read_manifest(str(run)).to_pylist() if row["table"] == table]
    return f"read_parquet({[str(run / name) for name in files]})"


def visible(run: Path) -> set[str]:
    """The files of a run that readers may see, but for its log."""
    names = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return {str(name) for name in names if not any(part.startswith(".") for part in name.parts)} - {"run.log"}


def bytes_of(path: Path) -> bytes | None:
    """A file's content; None if there is no file."""
    return path.read_bytes() if path.is_file() else None


def ask(query: str) -> list[tuple[Any, ...]]:
    return duckdb.sql(query).fetchall()


def again(undisturbed: Path, meet: Path, told: list[Struck]) -> dict[str, int]:
    """Images that were explained more than once; those that were in flight at a fault; those of chunks committed before one."""
    begun = [tuple(map(int, line.split())) for line in (meet / "explained").read_text().splitlines()]
    size = {row["chunk_id"]: row["end"] - row["start"] for row in read_plan(str(undisturbed)).to_pylist()}
    hits = [each for each in told if each.hit]
    finished = sum(size[chunk] for at, chunk in begun if any(each.at < at and chunk in each.committed for each in hits))
    in_flight = sum(
        size[chunk] for each in hits for chunk in {chunk for at, chunk in begun if at < each.at} - set(each.committed)
    )
    explained = sum(size[chunk] for _, chunk in begun)
    return {"again": explained - sum(size.values()), "in_flight": in_flight, "finished_again": finished}


# ---- As a person reads it.


def line(played: dict[str, Any]) -> str:
    """What came of one round."""
    came = ", ".join(
        f"{fault['kind']} ({fault['moment']}{'' if fault['hit'] else ', too late'})" for fault in played["faults"]
    )
    ended = "; ".join(f"exit code {each['code']} after {each['seconds']:.1f} s" for each in played["sessions"])
    wrong = [f"{played[name]} {words}" for name, words in SHOULD_BE_NONE.items() if played[name]]
    return f"{played['where']}: {came}: {ended}; {', '.join(wrong) or 'equal'}"


HEAD = (
    "", "hit", "too late", "rows compared", "lost", "double", "unequal", "stray files", "images again", "finished again",
    "processes left", "worst seconds to end", "exit codes",
)  # fmt: skip


def table(played: list[dict[str, Any]]) -> str:
    """One line for each place and kind, in Markdown. A round with several faults counts for the kind of each."""
    kinds = dict.fromkeys((each["where"], fault["kind"]) for each in played for fault in each["faults"])
    lines = [HEAD, ("---",) * len(HEAD)]
    for where, kind in sorted(kinds):
        of_kind = [
            each for each in played if each["where"] == where and kind in {fault["kind"] for fault in each["faults"]}
        ]
        lines.append((f"{where}: {kind}", *figures(of_kind, kind)))
    lines.append(("all", *figures(played, "")))
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def figures(played: list[dict[str, Any]], kind: str) -> list[str]:
    """The columns of `HEAD` over some rounds, for the faults of one kind, or for all."""
    came = [fault for each in played for fault in each["faults"] if kind in ("", fault["kind"])]
    # What a fault that ends the job does is told by the first session; a job that survives goes on as long as it has to.
    ended = [each["sessions"][0] for each in played if each["faults"][-1]["hit"]]
    hits = sum(fault["hit"] for fault in came)
    total = {name: sum(each[name] for each in played) for name in played[0] if isinstance(played[0][name], int)}
    left = sum(len(session["left"]) for each in played for session in each["sessions"])
    slowest = max((session["seconds"] + session["gone_seconds"] for session in ended), default=0.0)
    codes = " ".join(sorted({str(session["code"]) for session in ended}))
    counted = [hits, len(came) - hits, total["rows"], total["lost"], total["double"]]
    counted += [
        total["unequal"] + total["files_unequal"],
        total["stray"],
        total["again"],
        total["finished_again"],
        left,
    ]
    return [*(f"{count:,}" for count in counted), f"{slowest:.1f}", codes]


def verdict(played: list[dict[str, Any]], n_faults: int) -> tuple[bool, str]:
    """Whether the target is met, and a line that says so."""
    hits = sum(fault["hit"] for each in played for fault in each["faults"])
    total = {name: sum(each[name] for each in played) for name in SHOULD_BE_NONE}
    left = sum(len(session["left"]) for each in played for session in each["sessions"])
    beyond = sum(each["again"] > each["in_flight"] for each in played)
    good = hits >= n_faults and not any(total.values()) and not left and not beyond
    counts = ", ".join(f"{count:,} {SHOULD_BE_NONE[name]}" for name, count in total.items())
    return good, (
        f"{'yes' if good else 'NO'}: {hits} of {n_faults} faults hit; {counts}; {left} processes left; in {beyond} rounds more "
        "was done again than was in flight"
    )
