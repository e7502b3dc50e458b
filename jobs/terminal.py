"""A table for a terminal, or as JSON. Names of files are data, and must not steer the terminal."""

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDEST = 28
"""Characters of a column; longer texts are cut."""

UNSURE = "names with ? did not pass the thresholds of a valid name"


def show(answer: pa.Table, columns: Sequence[str]) -> None:
    """Print a table that fits the terminal: as many of `columns` as have room, without empty ones, and the names of the others.

    Without `columns`, all columns as they are. With them, a question mark follows a name that is not valid.
    """
    console = Console(highlight=False)
    empty = [name for name in answer.column_names if columns and 0 < answer.num_rows == answer[name].null_count]
    wanted = [name for name in columns or answer.column_names if name in answer.column_names and name not in empty]
    cells = {name: [cell(value, name) for value in answer[name].to_pylist()] for name in wanted}
    marks = [False] * answer.num_rows
    if columns and "name" in wanted and "valid" in answer.column_names:
        marks = [
            bool(name) and sure is False for name, sure in zip(cells["name"], answer["valid"].to_pylist(), strict=True)
        ]
        cells["name"] = [f"{name} ?" if mark else name for name, mark in zip(cells["name"], marks, strict=True)]
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, padding=(0, 2, 0, 0), show_edge=False)
    room = console.width
    shown: list[str] = []
    for name in wanted:
        room -= max(map(cell_len, [name, *cells[name]])) + 2
        if room < 0 and shown:
            break
        shown.append(name)
        numbers = pa.types.is_integer(answer[name].type) or pa.types.is_floating(answer[name].type)
        table.add_column(Text(name), justify="right" if numbers else "left", no_wrap=True, overflow="ellipsis")
    for row in zip(*(cells[name] for name in shown), strict=True):
        table.add_row(*map(Text, row))
    console.print(table)
    if "name" in shown and any(marks):
        console.print(Text(UNSURE))
    if hidden := [name for name in answer.column_names if name not in shown and name not in empty]:
        console.print(Text(f"{answer.num_rows:,} rows; not shown: {', '.join(hidden)} (--json has them)"))


def cell(value: Any, column: str) -> str:
    """A value as a person reads it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = printable(str(value))
    if len(text) <= WIDEST:
        return text
    # The end of an address tells most.
    return "…" + text[1 - WIDEST :] if column in ("uri", "key") else text[: WIDEST - 1] + "…"


def printable(text: str) -> str:
    """The text as one line, without characters that steer a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def plain(value: Any) -> Any:
    """The value as JSON can hold it: null for NaN and infinity, hexadecimal for bytes, text for dates and the like."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int | str) else str(value)
