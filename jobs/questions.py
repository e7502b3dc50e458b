"""The questions of the command line: the arguments of each, its answer, and the columns that a terminal shows."""

import dataclasses
import io
from typing import Annotated, ClassVar

import numpy as np
import pyarrow as pa
import tyro

from saecore.query import results
from saecore.query.results import Results
from saecore.query.search import matching, words_of
from saecore.storage import write_atomic

from . import commands

CANDIDATES = 3
"""Latents that are proposed where a name was given instead of a number."""

Latent = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="LATENT")]
Image = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]


@dataclasses.dataclass(frozen=True)
class Question:
    """What all questions have."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a complete run of jobs.explain: a local path, s3:// or gs://."""
    json: bool = dataclasses.field(default=False, kw_only=True)
    """Print a JSON list with one object for each row, and every column."""

    columns: ClassVar[tuple[str, ...]] = ()
    """Columns that the terminal shows, those that the answer has; empty means all."""
    example: ClassVar[str] = ""
    """The arguments of a command for --help."""

    def ask(self, run: Results) -> pa.Table:
        """The answer; ValueError for a question that has none."""
        raise NotImplementedError

    def drawn(self, answer: pa.Table) -> pa.Table:
        """The answer as the terminal shows it."""
        return answer


@dataclasses.dataclass(frozen=True)
class Top(Question):
    """The images for which a latent fires most strongly."""

    latent: Latent
    """The latent's number."""
    n: int = 20
    """Images, at most."""

    columns = ("key", "activation", "image_id", "uri")
    example = "top runs/photos 53"

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        return run.top_images(latent_number(run, self.latent), self.n)


@dataclasses.dataclass(frozen=True)
class OfTarget(Question):
    """The images for which a text or a concept has its largest values."""

    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """A text or concept that the run explained, as --targets of jobs.explain takes it: "text:a red square", "concept:red"."""
    n: int = 20
    """Images, at most."""

    columns = ("key", *results.VALUES.values(), "image_id", "uri")
    example = 'target runs/photos "text:a red square"'

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        if not run.targets:
            raise ValueError(
                f"target {self.target}: this run explains latents only; "
                "jobs.explain --targets kept 'text:A PHRASE' makes maps of a text too"
            )
        return run.top_images_of(self.target, self.n)


@dataclasses.dataclass(frozen=True)
class OfImage(Question):
    """The kept latents of an image."""

    image: Image
    """The image's key, or its image_id."""

    columns = ("rank", "latent", "activation", "pre_activation", "patch", "patches", "name", "score")
    example = "image runs/photos 000036.jpg"

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        return run.latents_of(id_or_key(self.image))


@dataclasses.dataclass(frozen=True)
class OfMaps(Question):
    """The relevance maps of an image: the strongest patch of each map, and the sum of its patches.

    The strongest patch is that of the largest value; where a patch weighs more against the target, it is named too.
    Rows and columns of patches count from 1, from the top left.
    """

    image: Image
    """The image's key, or its image_id."""
    method: str = ""
    """Method of the maps; by default the first of the run."""
    npy: str = ""
    """File to which the maps are written too, for np.load: float32 (maps, H, W), in the order of the table."""

    columns = ("latent", "target", "row", "column", "strongest", "against", "sum", "remainder", "method")
    example = "maps runs/photos 000036.jpg --npy maps.npy"

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        if self.npy:
            commands.check_file("--npy", self.npy)
        maps = run.maps(id_or_key(self.image), self.method or None)
        if self.npy:
            sink = io.BytesIO()
            np.save(sink, maps.maps)
            write_atomic(self.npy if self.npy.endswith(".npy") else f"{self.npy}.npy", sink.getvalue())
        return maps.table()

    def drawn(self, answer: pa.Table) -> pa.Table:
        """The patch against the target in one column, value and place: most maps have none, and three would not fit."""
        against = (answer[name].to_pylist() for name in ("against", "against_row", "against_column"))
        text = [
            None if value is None else f"{value:.4g} at {row}, {column}"
            for value, row, column in zip(*against, strict=True)
        ]
        answer = answer.drop_columns(["against_row", "against_column", "against"])
        return answer.append_column("against", pa.array(text, pa.string()))


@dataclasses.dataclass(frozen=True)
class Find(Question):
    """Latents by their names."""

    words: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WORDS")]
    """One word, or several that must all occur: "purple star". Whole words come first, then beginnings of words; parts inside
    words count only where nothing else fits."""

    columns = ("latent", "name", "also", "score", "runner_up", "margin", "images", "rate")
    example = "find runs/photos red"

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        if not self.words.split():
            raise ValueError("WORDS is empty: give a word to look for")
        return run.find(self.words)

    def drawn(self, answer: pa.Table) -> pa.Table:
        """With those of a latent's other words that fit: else `red` would find "circle" for no visible reason."""
        if "words" not in answer.column_names:
            return answer
        others = [(words or [])[1:] for words in answer["words"].to_pylist()]
        every = [(word, ()) for words in others for word in words]
        fitting = {every[place][0] for word in self.words.split() for _, place in matching(word, every)}
        also = [", ".join(word for word in words if word in fitting) or None for words in others]
        return answer.append_column("also", pa.array(also, pa.string()))


@dataclasses.dataclass(frozen=True)
class CoFiring(Question):
    """The latents that fire for the same images as another."""

    latent: Latent
    """That other latent's number."""
    n: int = 20
    """Latents, at most."""

    columns = ("latent", "images", "share", "lift", "jaccard", "name")
    example = "cofiring runs/photos 53"

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        return run.co_firing(latent_number(run, self.latent), self.n)


@dataclasses.dataclass(frozen=True)
class Histogram(Question):
    """How strongly a latent fires."""

    latent: Latent
    """The latent's number."""
    bins: int = 20
    """Bins, all of the same width."""

    columns = ("low", "high", "images", "bar")
    example = "histogram runs/photos 53 --bins 10"

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        return run.histogram(latent_number(run, self.latent), self.bins)

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
    """Condition of the second set; by default all other images."""
    n: int = 10
    """Latents most typical of each set, at most."""

    columns = ("latent", "name", "rate_a", "rate_b", "effect", "q", "odds_ratio")
    example = 'compare runs/photos "width > height"'

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        if not self.a.strip():
            raise ValueError('CONDITION is empty: give SQL on the columns of images, such as "width > height"')
        latents = run.compare(self.a, self.b)
        places = np.arange(latents.num_rows)
        return latents.take(places[(places < self.n) | (places >= latents.num_rows - self.n)])


@dataclasses.dataclass(frozen=True)
class OfLatents(Question):
    """All latents, sorted by a column of latents.parquet."""

    by: str = "images"
    """The column; the largest values come first."""
    least: bool = False
    """The smallest values come first."""
    n: int = 20
    """Latents, at most."""

    columns = ("latent", "name", "images", "rate", "mean", "max", "extent")
    example = "latents runs/photos --by extent --least"

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        known = run.latents.column_names
        if self.by not in known:
            hint = "" if "images" in known else f"; {commands.line('index', '--run', self.run)} adds what they do"
            raise ValueError(f"--by {self.by}: the columns of latents are {', '.join(known)}{hint}")
        order = "ascending" if self.least else "descending"
        return run.latents.sort_by([(self.by, order), ("latent", "ascending")])[: self.n]


@dataclasses.dataclass(frozen=True)
class Sql(Question):
    """An SQL query about the tables images, activations, maps, by_latent, top_images and latents, and no other file."""

    query: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUERY")]
    """One SELECT of DuckDB; FROM, WITH, VALUES, DESCRIBE, SUMMARIZE and SHOW are SELECTs too."""

    example = 'sql runs/photos "SELECT format, count(*) FROM images GROUP BY format"'

    def ask(self, run: Results) -> pa.Table:
        """See `Question.ask`."""
        return run.sql(self.query)


QUESTIONS: dict[str, type[Question]] = {
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


def latent_number(run: Results, text: str) -> int:
    """The number of a latent; ValueError for another text, with the latents of that name if there are some."""
    number = results.number(text.removeprefix("-"))
    if number is not None:
        return -number if text.startswith("-") else number
    if "name" not in run.latents.column_names:
        raise ValueError(
            f"LATENT {text} is no number, and this run's latents have no names yet: jobs.name gives them some"
        )
    words = set(text.casefold().split())
    called = [row for row in run.find(text).to_pylist() if words <= words_of(row["name"] or "")]
    # A name that is not valid is proposed only where no valid one fits.
    rows = [row for row in called if row.get("valid")] or called
    if not rows:
        raise ValueError(
            f"LATENT {text} is no number, and no latent of this run has that name; jobs.query find looks further"
        )
    proposed = "; ".join(f"latent {row['latent']}, {row['name']}" for row in rows[:CANDIDATES])
    raise ValueError(f"LATENT {text} is no number: did you mean {proposed}?")


def id_or_key(image: str) -> int | str:
    """An image as `Results` takes it: digits only are an image_id."""
    number = results.number(image)
    return image if number is None else number
