"""A finished run to pages to look at: a folder that opens from disk, or an explorer of the whole run on this machine.

    python -m jobs.report --run runs/photos                # runs/photos/report/index.html
    python -m jobs.report --run s3://bucket/run --out report --latents 1000 --images 2000
    python -m jobs.report --run runs/photos --serve        # http://127.0.0.1:8000

    run -> what there is to see (`saecore.report.views`) -> pages (`saecore.report.pages`) -> files (`saecore.report.static`)
                                                                             or answers (`saecore.report.explorer`)

Pictures are read from the run's own input; one that is gone since is shown as not found.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from saecore.query import results
from saecore.query.results import Results
from saecore.report.static import DEFAULT_CHOICE, Choice, Report, check_place

from . import commands, console
from .summaries import in_bytes

SLOW_ROWS = 1_000_000
"""Rows of activations from which on one should know of jobs.index: of 200,000 images a latent's page took 0.03 s with it and
0.7 s without, which grows with the run."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Pages of a finished run."""

    run: str
    """Folder of a complete run of jobs.explain, local or s3:// or gs://."""
    out: str = ""
    """Local folder of the pages; by default `report` in the run. A report that is there is replaced."""
    choice: tyro.conf.OmitArgPrefixes[Choice] = DEFAULT_CHOICE
    serve: bool = False
    """Write nothing, and answer a browser until Ctrl-C, over the whole run."""
    host: str = "127.0.0.1"
    """Address that --serve listens at: this machine alone. 0.0.0.0 lets in everyone who can reach it."""
    port: int = 8000
    """Port that --serve listens at; 0 is any that is free."""

    def check(self) -> None:
        """See `commands.Checked.check`."""
        self.choice.check()
        if self.serve and self.out:
            raise ValueError(f"--serve writes nothing, so leave --out {self.out} away")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"--port {self.port}: must be from 0, for any that is free, to 65535")
        if not self.serve and not self.out and "://" in self.run:
            raise ValueError(f"--run {self.run} is at an address: name a local folder for the pages with --out")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: make(sys.argv[1:] if argv is None else list(argv)))


def make(argv: list[str]) -> int:
    """Open the run, then write its pages or serve them."""
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "jobs.report")
        run = results.open(arguments.run)
    if run.tables.index is None and run.record.rows["activations"] > SLOW_ROWS:
        print(
            f"this run is large and has no index: python -m jobs.index --run {arguments.run} makes pages of latents far faster"
        )
    return serve(run, arguments) if arguments.serve else write(run, arguments)


def write(run: Results, arguments: Arguments) -> int:
    """The pages as files; where they are."""
    out = Path(arguments.out or f"{arguments.run}/report").absolute()
    with commands.mistakes():
        check_place(out)
        commands.check_writable("--out", str(out.parent))  # it is written beside its place
        if out.is_dir():
            commands.check_writable("--out", str(out))
    pages = Report(run, arguments.choice)
    progress = console.Progress(len(pages), 0, "files")
    for _ in pages.write(out):
        progress.add(1, 0)
    progress.close()
    missing = len(pages.site.missing)
    print(summary(out, len(pages.latents), len(pages.image_ids), len(pages.pictured) - missing, missing))
    return 0


def summary(folder: Path, latents: int, images: int, pictures: int, missing: int) -> str:
    """A report that was written, and where to look at it."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    lines = [f"pages         {latents:,} latents, {images:,} images, {pictures:,} pictures, {in_bytes(size)}"]
    if missing:
        lines.append(f"not found     {missing:,} pictures: their input has changed, or is gone or out of reach")
    return "\n".join([*lines, f"open          {(folder / 'index.html').as_uri()}"])


def serve(run: Results, arguments: Arguments) -> int:
    """The pages of the whole run, until Ctrl-C."""
    from saecore.report import explorer

    with commands.mistakes():
        waiting = explorer.listen(arguments.host, arguments.port)
    host, port = waiting.getsockname()[:2]
    print(f"explorer of {arguments.run}: http://{host}:{port}/index.html   (Ctrl-C ends it)", flush=True)
    explorer.serve(run, waiting, arguments.choice.top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
