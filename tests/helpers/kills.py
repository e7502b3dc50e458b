"""A piece of work that is killed at its first step on the disk, at its second, and so on until it gets to its end.

    python -m tests.helpers.kills WORK START FOLDER

WORK is a function of this module. Each attempt begins with a copy of START, in FOLDER/0001, FOLDER/0002, ..; the last one is
complete. Steps are what changes the folder: a file that is opened, half of its content written, all of it synced, renamed or
removed, a folder made or synced. A process of its own, forked for each attempt, since a killed process must not be pytest's.
"""

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from jobs import index as index_job
from saecore import schema, storage
from saecore.runs import latents
from saecore.runs.run import open_run
from tests.helpers import planted

KILLED = 9
"""Exit code of an attempt that was killed."""

STEPS = ("open", "os.rename", "os.remove", "os.mkdir")
"""Audit events that are steps if they are below the folder."""


def run(folder: str) -> None:
    """A run from its plan to its end, as `relmap explain` makes it; from wherever it stands."""
    made_by = {"command": "python -m planted", "grid": list(planted.GRID), "n_latents": planted.N_LATENTS}
    parts = {"schema": schema.VERSION, "methods": list(planted.METHODS)}
    begun = open_run(folder, parts, made_by, planted.plan)
    tags = {"methods": ",".join(planted.METHODS), "grid_height": "1", "grid_width": "3"}
    for chunk in begun.pending()["chunk_id"].to_pylist():
        begun.write_chunk(chunk, planted.explained(chunk, planted.METHODS), {}, tags)
    if not begun.record().is_complete:
        begun.finish(0, 0.0)


def index(folder: str) -> None:
    """`relmap index`: by_latent, top_images, latents.parquet and the card; what it says is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert index_job.main(["--run", folder, "--threads", "1"]) == 0


def names(folder: str) -> None:
    """What `relmap name` writes into latents.parquet."""
    latents.merge(folder, pa.table({"latent": [0, 1], "name": ["red", "round"]}))


class Counting:
    """Ends the process at its n-th step."""

    def __init__(self, folder: str, n: int) -> None:
        self.folder, self.left = folder, n

    def event(self, name: str, given: tuple[Any, ...]) -> None:
        """An audit hook."""
        if name in STEPS and str(given[0]).startswith(self.folder) and (name != "open" or self.writes(given)):
            self.step()

    def writes(self, given: tuple[Any, ...]) -> bool:
        """Whether a file is opened for writing, or a folder to be synced."""
        return given[1] is None or "w" in given[1] or "a" in given[1]

    def step(self, half: Any = None) -> None:
        """Count one, and end here if it is the last; `half` does half of the step before the end."""
        self.left -= 1
        if self.left == 0:
            if half is not None:
                half()
            os._exit(KILLED)

    def sync(self, fd: object) -> None:
        """Stands for os.fsync."""
        self.step()

    @contextmanager
    def atomic_file(self, target: Path) -> Iterator[Any]:
        """Stands for `storage.atomic_file`."""
        with ATOMIC_FILE(target) as file:
            yield Half(file, self)


ATOMIC_FILE = storage.atomic_file


class Half:
    """A file of which half of what is written is there at the kill."""

    def __init__(self, file: BinaryIO, counting: Counting) -> None:
        self.file, self.counting = file, counting

    def write(self, data: Any) -> None:
        """All of the data, or half if it is the last step."""
        content = memoryview(data)

        def half() -> None:
            self.file.write(content[: len(content) // 2])
            self.file.flush()

        self.counting.step(half)
        self.file.write(content)


def main() -> None:
    """The command line."""
    work, start, folder = globals()[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
    code, n = KILLED, 0
    while code == KILLED:
        n += 1
        place = folder / f"{n:04d}"
        shutil.copytree(start, place)
        if not (child := os.fork()):
            counting = Counting(str(place), n)
            os.fsync, storage.atomic_file = counting.sync, counting.atomic_file
            sys.addaudithook(counting.event)
            work(str(place))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(code)


if __name__ == "__main__":
    main()
