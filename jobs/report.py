"""A finished run to pages to look at: a folder that opens from disk, or an explorer of the whole run on this machine.

    python -m jobs.report --run runs/photos                # runs/photos/report/index.html
    python -m jobs.report --run s3://bucket/run --out report --latent-pages 1000 --image-pages 2000
    python -m jobs.report --run runs/photos --serve        # http://127.0.0.1:8000

    run -> what there is to see (`saecore.report.views`) -> pages (`saecore.report.pages`) -> files (`saecore.report.static`)
                                                                             or answers (`saecore.report.explorer`)

Pictures are read from the input of the run; a page says so where the input of one is gone.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from saecore.query import results
from saecore.query.results import Results
from saecore.report.static import Choice, Report, check_place

from . import commands, console
from .hints import hints
from .summaries import in_bytes

SLOW_ROWS = 1_000_000
"""Rows of activations above which the user is told of jobs.index. Of 200,000 images a latent's page took 0.03 s with an index
and 0.7 s without; the second grows with the run."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Pages of a finished run."""

    run: str
    """Folder of a complete run of jobs.explain: a local path, s3:// or gs://."""
    out: str = ""
    """Local folder for the pages; by default `report` in the run. A report that is there is replaced."""
    latent_pages: int = Choice.latent_pages
    """Latents with a page of their own: those that fire most often."""
    image_pages: int = Choice.image_pages
    """Images with a page of their own, spread evenly over the run."""
    top: int = Choice.top
    """Images on a latent's page for which it fires most strongly; some others across its range come after them."""
    serve: bool = False
    """Write nothing; show the whole run to a browser until Ctrl-C."""
    host: str = "127.0.0.1"
    """Address of --serve; by default only this machine can open the pages. 0.0.0.0 lets in everyone who can reach it."""
    port: int = 8000
    """Port of --serve; 0 is any free one."""

    @property
    def choice(self) -> Choice:
        """How much of the run the pages hold."""
        return Choice(latent_pages=self.latent_pages, image_pages=self.image_pages, top=self.top)

    def check(self) -> None:
        """See `commands.Checked.check`."""
        commands.at_least(self, latent_pages=1, image_pages=1, top=1)
        if self.serve and self.out:
            raise ValueError(f"--serve writes nothing, so omit --out {self.out}")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"--port {self.port}: must be from 0, for any free one, to 65535")
        if not self.serve and not self.out and "://" in self.run:
            raise ValueError(f"--run {self.run} is at an address: name a local folder for the pages with --out")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: make(sys.argv[1:] if argv is None else list(argv)))


def make(argv: list[str]) -> int:
    """Open the run, then write its pages or serve them."""
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "report")
        run = results.open(arguments.run)
    if run.tables.index is None and run.record.rows["activations"] > SLOW_ROWS:
        faster = commands.line("index", "--run", run.uri)
        print(f"this run is large and has no index, which makes pages of latents far faster: {faster}")
    return serve(run, arguments) if arguments.serve else write(run, arguments)


def write(run: Results, arguments: Arguments) -> int:
    """The pages as files; where they are."""
    out = Path(arguments.out or f"{arguments.run}/report").absolute()
    with commands.mistakes():
        with commands.given("--out"):
            check_place(out)
        commands.check_writable("--out", str(out.parent))  # the report is written there, and moved when it is whole
        if out.is_dir():
            commands.check_writable("--out", str(out))
    pages = Report(run, arguments.choice, hints(run))
    progress = console.Progress(len(pages), 0, "files")
    for _ in pages.write(out):
        progress.add(1, 0)
    progress.close()
    missing = len(pages.site.missing)
    print(summary(out, len(pages.latents), len(pages.image_ids), len(pages.pictured) - missing, missing))
    return 0


def summary(folder: Path, latents: int, images: int, pictures: int, missing: int) -> str:
    """What was written, and where to open it."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    lines = [f"pages         {latents:,} latents, {images:,} images, {pictures:,} pictures, {in_bytes(size)}"]
    if missing:
        lines.append(f"not found     {missing:,} pictures: their input has changed, is gone, or cannot be reached")
    return "\n".join([*lines, f"open          {(folder / 'index.html').as_uri()}"])


def serve(run: Results, arguments: Arguments) -> int:
    """The pages of the whole run, until Ctrl-C."""
    from saecore.report import explorer

    with commands.mistakes(), commands.given("--host, --port"):
        waiting = explorer.listen(arguments.host, arguments.port)
    host, port = waiting.getsockname()[:2]
    print(f"explorer of {arguments.run}: http://{host}:{port}/index.html   (Ctrl-C ends it)", flush=True)
    explorer.serve(run, waiting, arguments.top, hints(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
