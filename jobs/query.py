"""Questions to a finished run on the command line: `saecore.query.results`, one sub-command a question.

    python -m jobs.query top runs/photos 53                         the images for which latent 53 fires most strongly
    python -m jobs.query image runs/photos 000036.jpg               the latents that fire for an image
    python -m jobs.query maps runs/photos 000036.jpg                where in the image they come from
    python -m jobs.query target runs/photos "text:a red square"     the images that a text, or a concept, fits best
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
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar

import numpy as np
import pyarrow as pa
import tyro

from saecore.query import results
from saecore.query.results import Results
from saecore.query.search import matching
from saecore.storage import write_atomic

from . import commands
from .terminal import plain, printable, show

MOST = {"n": results.LARGEST, "bins": 10_000}
"""Of what is counted in numbers: more bins than that are a table that nobody reads."""

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

    def drawn(self, answer: pa.Table) -> pa.Table:
        """The answer as the terminal has it."""
        return answer


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
    """As --targets took it: "text:a red square", "concept:red"."""
    n: int = 20
    """Images, at most."""

    columns = ("image_id", *results.VALUES.values(), "key", "uri")

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
        return run.latents_of(id_or_key(self.image))


@dataclasses.dataclass(frozen=True)
class OfMaps(Question):
    """The relevance maps of an image: where each one's strongest patch is, and what the map adds up to.

    The strongest patch is that of the largest value; where a patch weighs more against the target, that one is named too.
    Rows and columns count from 1, from the top left.
    """

    image: Image
    """Its key, or its image_id."""
    method: str = ""
    """By which method; nothing is the run's first."""
    npy: str = ""
    """File to write the maps to, for np.load: float32 (maps, H, W), in the order of the table."""

    columns = ("latent", "target", "row", "column", "strongest", "against", "sum", "remainder", "method")

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        if self.npy:
            commands.check_file("--npy", self.npy)
        found = run.maps(id_or_key(self.image), self.method or None)
        if self.npy:
            sink = io.BytesIO()
            np.save(sink, found.maps)
            write_atomic(self.npy if self.npy.endswith(".npy") else f"{self.npy}.npy", sink.getvalue())
        return found.table()

    def drawn(self, answer: pa.Table) -> pa.Table:
        """With the place of what is against beside its value: most maps have none, and three columns would not fit."""
        against = (answer[name].to_pylist() for name in ("against", "against_row", "against_column"))
        text = [
            None if value is None else f"{value:.4g} at {row}, {column}"
            for value, row, column in zip(*against, strict=True)
        ]
        answer = answer.drop_columns(["against_row", "against_column", "against"])
        return answer.append_column("against", pa.array(text, pa.string()))


@dataclasses.dataclass(frozen=True)
class Find(Question):
    """Latents by what they are called."""

    words: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WORDS")]
    """One or several, of which all must occur: "purple star". Whole words come first, then beginnings; parts where there is no
    other."""

    columns = ("latent", "name", "also", "score", "runner_up", "margin", "images", "rate")

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        if not self.words.split():
            raise ValueError("WORDS is empty: give a word to look for")
        return run.find(self.words)

    def drawn(self, answer: pa.Table) -> pa.Table:
        """With those of a latent's other words that were found: else `red` would find "circle" for no visible reason."""
        if "words" not in answer.column_names:
            return answer
        others = [(words or [])[1:] for words in answer["words"].to_pylist()]
        every = [(word, ()) for words in others for word in words]
        found = {every[place][0] for word in self.words.split() for _, place in matching(word, every)}
        also = [", ".join(word for word in words if word in found) or None for words in others]
        return answer.append_column("also", pa.array(also, pa.string()))


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

    def drawn(self, answer: pa.Table) -> pa.Table:
        """With bars."""
        images = answer["images"].to_pylist()
        most = max(images, default=0) or 1
        return answer.append_column("bar", [["#" * round(24 * n / most) for n in images]])


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
        if not self.a.strip():
            raise ValueError('CONDITION is empty: give SQL on the columns of images, such as "width > height"')
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
    """DuckDB's answer about the tables images, activations, maps, by_latent, top_images and latents, and no other file."""

    query: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUERY")]
    """One SELECT (FROM, WITH, VALUES, DESCRIBE, SUMMARIZE and SHOW are some too)."""

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        return run.sql(self.query)


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
    return commands.run_job(lambda: query(sys.argv[1:] if argv is None else list(argv)))


def query(argv: list[str]) -> int:
    """Ask, and print the answer."""
    parse = tyro.extras.subcommand_cli_from_dict
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    with commands.mistakes():
        question = parse(QUESTIONS, args=argv, prog="python -m jobs.query", config=config)
        answer = asked(question)
    if question.json:
        print(json.dumps(plain(answer.to_pylist()), indent=1))
    else:
        show(question.drawn(answer), question.columns)
    return 0


def asked(question: Question) -> pa.Table:
    """The answer; ValueError, in one line that steers no terminal, if there is none, or the run cannot be read."""
    try:
        for name, most in MOST.items():
            if not 1 <= (given := getattr(question, name, 1)) <= most:
                raise ValueError(f"--{name} {given}: must be {'at least 1' if given < 1 else f'at most {most:,}'}")
        for given in dataclasses.astuple(question):
            if isinstance(given, str) and not _is_unicode(given):
                raise ValueError(f"{given}: not UTF-8, and nothing in a run is called so")
        return question.ask(results.open(question.run))
    except OSError as error:
        raise ValueError(printable(f"{question.run} cannot be read: {error}")) from error
    except ValueError as error:
        raise ValueError(printable(str(error))) from error


def _is_unicode(text: str) -> bool:
    """Whether it can be asked for: bytes of a command line that are no UTF-8 reach Python as surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def id_or_key(image: str) -> int | str:
    """As `Results` takes it: digits alone are an image_id."""
    number = results.number(image)
    return image if number is None else number


if __name__ == "__main__":
    sys.exit(main())
