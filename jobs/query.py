"""Questions to a finished run on the command line: `saecore.results`, one sub-command a question.

    python -m jobs.query top runs/photos 53                         the images for which latent 53 fires most strongly
    python -m jobs.query image runs/photos 000036.jpg               the latents that fire for an image
    python -m jobs.query maps runs/photos 000036.jpg                where in the image they come from
    python -m jobs.query target runs/photos "text: a red square"    the images that a text, or a concept, fits best
    python -m jobs.query find runs/photos red                       latents by name
    python -m jobs.query cofiring runs/photos 53                    which others fire for its images
    python -m jobs.query histogram runs/photos 53                   how strongly it fires
    python -m jobs.query compare runs/photos "width > height"       what sets some images apart from the others
    python -m jobs.query latents runs/photos                        all of them, commonest first
    python -m jobs.query sql runs/photos "SELECT count(*) FROM images"

Tables fit the terminal, 80 columns where there is none; `--json` has every column. Without by_latent/ (`python -m jobs.index`)
answers are the same and take longer.
"""

import dataclasses
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import duckdb
import numpy as np
import pyarrow as pa
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs import session
from saecore import results
from saecore.results import Results
from saecore.storage import write_atomic

WIDEST = 28
"""Characters of a column: what is longer is cut."""

Latent = Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="LATENT")]
Image = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]


@dataclasses.dataclass(frozen=True)
class Question:
    """What all questions have."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a complete run of jobs.explain, local or s3:// or gs://."""
    json: bool = dataclasses.field(default=False, kw_only=True)
    """Print a JSON list with one object a row and every column."""

    columns: ClassVar[tuple[str, ...]] = ()
    """What is printed, as far as it is there; nothing is everything."""

    def ask(self, run: Results) -> pa.Table:
        """The answer; ValueError for a question that has none."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Top(Question):
    """The images for which a latent fires most strongly."""

    latent: Latent
    """Its number."""
    n: int = 20
    """Images, at most."""

    columns = ("image_id", "activation", "key", "uri")

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        return run.top_images(self.latent, self.n)


@dataclasses.dataclass(frozen=True)
class OfTarget(Question):
    """The images for which a text or concept of --targets has its largest values."""

    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """As the tables have it: "text: a red square", "concept: red"."""
    n: int = 20
    """Images, at most."""

    columns = ("image_id", "pre_activation", "key", "uri")

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        return run.top_images_of(self.target, self.n)


@dataclasses.dataclass(frozen=True)
class OfImage(Question):
    """The kept latents of an image."""

    image: Image
    """Its key, or its image_id."""

    columns = ("rank", "latent", "activation", "pre_activation", "name", "score")

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        return run.latents_of(number_or_key(self.image))


@dataclasses.dataclass(frozen=True)
class OfMaps(Question):
    """The relevance maps of an image: where the strongest patch is, and what they add up to."""

    image: Image
    """Its key, or its image_id."""
    method: str = ""
    """By which method; nothing is the run's first."""
    npy: str = ""
    """File to write the maps to, for np.load: float32 (maps, H, W), in the order of the table."""

    columns = ("latent", "target", "row", "column", "strongest", "sum", "remainder", "method")

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        if self.npy:
            session.check_file("--npy", self.npy)
        found = run.maps(number_or_key(self.image), self.method or None)
        if self.npy:
            sink = io.BytesIO()
            np.save(sink, found.maps)
            write_atomic(self.npy if self.npy.endswith(".npy") else f"{self.npy}.npy", sink.getvalue())
        return found.table()


@dataclasses.dataclass(frozen=True)
class Find(Question):
    """Latents by what they are called."""

    word: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WORD")]
    """Or a part of one, in upper or lower case."""

    columns = ("latent", "name", "score", "runner_up", "margin", "images", "rate")

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        return run.find(self.word)


@dataclasses.dataclass(frozen=True)
class CoFiring(Question):
    """The latents that fire for the same images as another."""

    latent: Latent
    """The number of that other."""
    n: int = 20
    """Latents, at most."""

    columns = ("latent", "images", "share", "lift", "jaccard", "name")

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        return run.co_firing(self.latent, self.n)


@dataclasses.dataclass(frozen=True)
class Histogram(Question):
    """How strongly a latent fires."""

    latent: Latent
    """Its number."""
    bins: int = 20
    """Bins of one width."""

    columns = ("low", "high", "images", "bar")

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        return run.histogram(self.latent, self.bins)


@dataclasses.dataclass(frozen=True)
class Compare(Question):
    """The latents that fire more on one set of images than on another."""

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONDITION")]
    """The first set: an SQL condition on the columns of `images`, such as "key LIKE '%dog%'"."""
    b: str = ""
    """Condition of the second set; nothing is all other images."""
    n: int = 10
    """Latents most typical of each set, at most."""

    columns = ("latent", "name", "rate_a", "rate_b", "effect", "q", "odds_ratio")

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        found = run.compare(self.a, self.b)
        typical = np.arange(found.num_rows)
        return found.take(typical[(typical < self.n) | (typical >= found.num_rows - self.n)])


@dataclasses.dataclass(frozen=True)
class OfLatents(Question):
    """All latents, by one of the columns of latents.parquet."""

    by: str = "images"
    """Which column, largest first."""
    least: bool = False
    """Smallest first."""
    n: int = 20
    """Latents, at most."""

    columns = ("latent", "name", "images", "rate", "mean", "max", "extent")

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        known = run.latents.column_names
        if self.by not in known:
            hint = "" if "images" in known else f"; python -m jobs.index --run {self.run} counts what they do"
            raise ValueError(f"--by {self.by}: known of latents is {', '.join(known)}{hint}")
        order = "ascending" if self.least else "descending"
        return run.latents.sort_by([(self.by, order), ("latent", "ascending")])[: self.n]


@dataclasses.dataclass(frozen=True)
class Sql(Question):
    """DuckDB's answer about the tables images, activations, maps, by_latent, top_images and latents."""

    query: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUERY")]
    """One SELECT."""

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        try:
            return run.sql(self.query)
        except duckdb.Error as error:
            raise ValueError(str(error).splitlines()[0]) from error


QUESTIONS: dict[str, Callable[..., Question]] = {
    "top": Top,
    "target": OfTarget,
    "image": OfImage,
    "maps": OfMaps,
    "find": Find,
    "cofiring": CoFiring,
    "histogram": Histogram,
    "compare": Compare,
    "latents": OfLatents,
    "sql": Sql,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return session.run_job(lambda: query(sys.argv[1:] if argv is None else list(argv)))


def query(argv: list[str]) -> int:
    """Ask, and print the answer."""
    parse = tyro.extras.subcommand_cli_from_dict
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    with session.mistakes():
        question = parse(QUESTIONS, args=argv, prog="python -m jobs.query", config=config)
        for name in ("n", "bins"):
            if getattr(question, name, 1) < 1:
                raise ValueError(f"--{name} {getattr(question, name)}: must be at least 1")
        answer = question.ask(results.open(question.run))
    if question.json:
        print(json.dumps(plain(answer.to_pylist()), indent=1))
    else:
        show(answer, question.columns)
    return 0


def number_or_key(image: str) -> int | str:
    """As `Results` takes it: digits alone are an image_id."""
    return int(image) if image.isdigit() else image


def plain(value: Any) -> Any:
    """What JSON takes: null for what is no number, hexadecimal for bytes, text for dates and the like."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int | str) else str(value)


def show(answer: pa.Table, columns: Sequence[str]) -> None:
    """Print a table that fits: the first columns whole, and which there are beside them."""
    console = Console(highlight=False)
    if "bar" in columns:
        most = max(answer["images"].to_pylist(), default=0) or 1
        answer = answer.append_column("bar", [["#" * round(24 * n / most) for n in answer["images"].to_pylist()]])
    empty = [name for name in answer.column_names if columns and 0 < answer.num_rows == answer[name].null_count]
    wanted = [name for name in columns or answer.column_names if name in answer.column_names and name not in empty]
    cells = {name: [cell(value, name) for value in answer[name].to_pylist()] for name in wanted}
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, padding=(0, 2, 0, 0), show_edge=False)
    room = console.width
    shown: list[str] = []
    for name in wanted:
        room -= max(map(len, [name, *cells[name]])) + 2
        if room < 0 and shown:
            break
        shown.append(name)
        numbers = pa.types.is_integer(answer[name].type) or pa.types.is_floating(answer[name].type)
        table.add_column(Text(name), justify="right" if numbers else "left", no_wrap=True, overflow="ellipsis")
    for row in zip(*(cells[name] for name in shown), strict=True):
        table.add_row(*map(Text, row))
    console.print(table)
    if hidden := [name for name in answer.column_names if name not in shown and name not in empty]:
        console.print(Text(f"{answer.num_rows:,} rows; not shown: {', '.join(hidden)} (--json has them)"))


def cell(value: Any, column: str) -> str:
    """A value as a person reads it. What a file is called is data, and must not steer the terminal."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(value))
    if len(text) <= WIDEST:
        return text
    # Of an address the end tells most.
    return "…" + text[1 - WIDEST :] if column in ("uri", "key") else text[: WIDEST - 1] + "…"


if __name__ == "__main__":
    sys.exit(main())
