"""Open a finished run and ask it questions.

    run = saecore.query.results.open("runs/photos")          # or s3://bucket/run
    run.top_images(53, n=20)                           # a pyarrow table; .to_pandas() makes a data frame
    run.maps("000036.jpg").maps                        # float32 (k, H, W), pre-activation units
    run.sql("SELECT count(*) FROM activations JOIN images USING (image_id) WHERE width > 640")

With by_latent/, which jobs.index makes, questions about one latent are fast. Without it, or for images that it does not cover
yet, the run's own files are read from end to end; answers are the same.

A latent *fires* for an image if it is kept there with an activation other than zero. No table knows of latents that were not
kept.
"""

import functools
from collections.abc import Collection
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saecore import heatmaps
from saecore.query import by_latent, histograms, search
from saecore.query.by_latent import MAP, SHOWN
from saecore.query.contrast import contrast
from saecore.query.maps import ImageMaps
from saecore.query.tables import Tables
from saecore.runs.latents import lookup
from saecore.runs.record import Record, read_complete

NAMES = ("name", "score", "valid")
"""Columns of `latents` with a latent's name and how sure it is, if jobs.name wrote them."""

STRENGTH = ("activation", "pre_activation")

VALUES = {"text": "cosine", "concept": "weighted_mean"}
"""What `pre_activation` means for each kind of target; that of a concept is the mean of its latents', weighted."""

LARGEST = 2**63 - 1
"""The largest number that an image can have."""


def number(text: str) -> int | None:
    """The number that a text of nothing but digits stands for; None for any other text, and for numbers above `LARGEST`."""
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST)) else None
    return value if value is None or value <= LARGEST else None


def open(uri: str) -> "Results":  # noqa: A001 - `results.open` is what it is
    """A complete run of jobs.explain, local or at an address; ValueError if there is none, or if its index is another run's."""
    return Results(uri, read_complete(uri))


def decode(table: pa.Table, grid: tuple[int, int]) -> np.ndarray:
    """Rows with the columns `map` and `scale` -> float32 (rows, H, W) in pre-activation units; NaN where there is no map."""
    blank = bytes(grid[0] * grid[1])
    stored = b"".join(one or blank for one in table["map"].to_pylist())
    return heatmaps.decode(stored, table["scale"].to_numpy(), (table.num_rows, *grid))


class Results:
    """A finished run."""

    def __init__(self, uri: str, record: Record) -> None:
        self.uri = uri
        self.record = record
        """run.json."""
        self.grid = record.grid
        self.n_latents = record.n_latents
        self.n_images = record.images - record.n_refused
        """Images that were not refused."""
        self.tables = Tables(uri, record)

    @property
    def methods(self) -> list[str]:
        """How maps were computed; `method=None` means the first. Empty if the run has no maps."""
        return by_latent.methods(self.tables.schemas["maps"]) if "maps" in self.tables.schemas else []

    @property
    def has_embeddings(self) -> bool:
        """Whether it keeps the embeddings of some images."""
        return self.record.keeps_embeddings and self.n_images > 0

    @property
    def latents(self) -> pa.Table:
        """One row per latent: `schema.LATENTS` and the columns of jobs.name, as far as they were written."""
        return self.tables.latents

    @functools.cached_property
    def targets(self) -> list[str]:
        """What maps explain besides latents, as in MAPS: `text: a red square`, `concept: red`. Every image has the same."""
        if not self.methods:
            return []
        one = self.sql("SELECT image_id FROM images WHERE error IS NULL LIMIT 1")["image_id"]
        targets = self.tables.rows("maps", one, ("target",))["target"].to_pylist()
        return [target for target in dict.fromkeys(targets) if target is not None]

    def sql(self, query: str, *parameters: Any) -> pa.Table:
        """DuckDB's answer about `images`, `activations`, `by_latent`, `latents`, `maps` and `top_images`; `?` is a parameter.

        by_latent has all rows of activations, sorted or not. A join stays as it is written: put the small side right.
        A query is one SELECT, which writes nothing and reads no other file; ValueError for anything else, and for a mistake
        in the SQL. To join files of your own, open the run's Parquet files with DuckDB itself.
        """
        try:
            return self.tables.sql(query, parameters)
        except duckdb.Error as error:
            told = str(error).splitlines()[0]
            if isinstance(error, duckdb.PermissionException):
                told += "; a question is about the tables of the run only"
            raise ValueError(told) from error

    # ---- One latent.

    def top_images(self, latent: int, n: int = 20, method: str | None = None, maps: bool = False) -> pa.Table:
        """The images for which a latent fires most strongly: image_id, activation, pre_activation, and `SHOWN`.

        The strongest comes first. With `maps`, the columns of `MAP` too, by one method: `decode(table, run.grid)` makes arrays.
        """
        fired = self._fired(latent, n).sort_by([("activation", "descending"), ("image_id", "ascending")])[: _count(n)]
        by_method = pc.field("method") == self._method(method) if maps else None
        columns = (*SHOWN, *MAP) if maps else SHOWN
        copied = [] if self.tables.reader is None else self.tables.reader.top_images(latent)
        ready = [part.filter(by_method) if maps else part for part in copied]
        ready = [part.select(["image_id", *columns]) for part in ready]
        known = pa.chunked_array([chunk for part in ready for chunk in part["image_id"].chunks], pa.int64())
        missing = fired["image_id"].filter(pc.invert(pc.is_in(fired["image_id"], known)))
        if len(missing) or not ready:
            more = self.tables.rows("images", missing, SHOWN)
            if maps:
                condition = (pc.field("latent") == latent) & by_method
                more = lookup(more, self.tables.rows("maps", missing, MAP, condition), "image_id")
            ready.append(more)
        # Columns may be null in the copies, and not in the run's own files.
        return lookup(fired, pa.concat_tables(ready, promote_options="default"), "image_id")

    def _fired(self, latent: int, n: int | None = None) -> pa.Table:
        """image_id and `STRENGTH` of images for which a latent fires: the n strongest and perhaps more, or all."""
        if not 0 <= latent < self.n_latents:
            raise ValueError(f"latent {latent}: the latents of this run are 0 to {self.n_latents - 1}")
        columns = ["image_id", *STRENGTH]
        parts = [] if self.tables.reader is None else self.tables.reader.first_rows(latent, n)
        parts = [part.select(columns) for part in parts]
        if len(self.tables.not_indexed):
            best = "" if n is None else f"ORDER BY activation DESC, image_id LIMIT {_count(n)}"
            query = f"SELECT {', '.join(columns)} FROM waiting WHERE latent = ? AND activation <> 0 {best}"
            waiting = self.tables.files("activations", self.tables.not_indexed)
            parts.append(self.tables.sql(query, (latent,), waiting=waiting))
        none = self.tables.schemas["activations"].empty_table().select(columns)
        return pa.concat_tables([none, *(part.cast(none.schema) for part in parts)])

    def histogram(self, latent: int, bins: int = 20) -> pa.Table:
        """How strongly a latent fires: low, high, images, in bins of the same width; one row if all activations are equal."""
        edges, images = histograms.count(self._fired(latent)["activation"].to_numpy(), bins)
        columns = {"low": edges[:-1], "high": edges[1:]}
        return pa.table(
            {
                **{name: pa.array(ends, pa.float64()) for name, ends in columns.items()},
                "images": pa.array(images, pa.int64()),
            }
        )

    def co_firing(self, latent: int, n: int = 20) -> pa.Table:
        """The latents that fire for the same images: latent, images (of both), share, lift, jaccard, names; by jaccard.

        share: the share of this latent's images for which the other fires too. lift: how many times as often both fire as if
        they were independent. jaccard: the share of images where both fire, of those where either does; sorted by it, neither
        a latent that fires everywhere nor one that fires once comes first.
        """
        own = self._fired(latent).select(["image_id"])
        pairs = self.tables.sql(
            """SELECT *, images / $1 AS share, images * $2 / ($1 * alone) AS lift, images / ($1 + alone - images) AS jaccard
            FROM (SELECT latent, count(own.image_id) AS images, count(*) AS alone
                FROM activations LEFT JOIN own USING (image_id) WHERE activation <> 0 GROUP BY latent)
            WHERE latent <> $3 AND images > 0 ORDER BY jaccard DESC, latent LIMIT $4""",
            (own.num_rows, self.n_images, latent, _count(n)),
            own=own,
        )
        return self._named(pairs.drop_columns("alone"))

    # ---- One text or concept.

    def label(self, target: str) -> str:
        """A text or concept as in MAPS, from any spelling that jobs.explain takes; ValueError if the run has no such target."""
        labels = {_spelling(label): label for label in reversed(self.targets)}
        if target in self.targets:
            return target
        if _spelling(target) not in labels:
            known = "; ".join(self.targets) or "nothing"
            raise ValueError(f"target {target}: besides latents, this run explains {known}")
        return labels[_spelling(target)]

    def values_of(self, target: str, n: int | None = None) -> pa.Table:
        """The target's n largest values, or all, largest first: image_id, and the value under its name in `VALUES`."""
        label = self.label(target)
        value = VALUES[label.partition(":")[0]]
        query = f"""SELECT image_id, pre_activation AS {value} FROM maps WHERE target = ? AND method = ?
            ORDER BY pre_activation DESC, image_id {"" if n is None else f"LIMIT {_count(n)}"}"""
        return self.sql(query, label, self._method(None))

    def top_images_of(self, target: str, n: int = 20, method: str | None = None, maps: bool = False) -> pa.Table:
        """The images for which a target has its largest values: as `top_images`, without an activation. Reads all maps."""
        images = self.values_of(target, n)
        images = lookup(images, self.tables.rows("images", images["image_id"], SHOWN), "image_id")
        if not maps:
            return images
        condition = (pc.field("target") == self.label(target)) & (pc.field("method") == self._method(method))
        return lookup(images, self.tables.rows("maps", images["image_id"], MAP, condition), "image_id")

    # ---- One image.

    def image_id(self, image: int | str) -> int:
        """An image's number, from its number or its key; ValueError if no image has it, or if several images have the key."""
        if isinstance(image, int | np.integer):
            if 0 <= image <= LARGEST and self.tables.rows("images", [int(image)], ()).num_rows:
                return int(image)
            raise ValueError(f"image {image}: this run has none of that number")
        rows = self.sql("SELECT image_id, uri FROM images WHERE key = ? ORDER BY image_id LIMIT 3", image).to_pylist()
        if not rows:
            raise ValueError(f"image {image}: this run has none of that key")
        if len(rows) > 1:
            places = ", ".join(f"{row['image_id']} of {row['uri']}" for row in rows)
            raise ValueError(f"image {image}: several have this key; name one by its number, such as {places}")
        return rows[0]["image_id"]

    def image(self, image: int | str) -> dict[str, Any]:
        """An image's row of `images`."""
        names = self.tables.schemas["images"].names
        return self.tables.rows("images", [self.image_id(image)], names).to_pylist()[0]

    def crop_box(self, image: int | str) -> tuple[int, int, int, int]:
        """The part of an image that CLIP saw, and that its maps cover: left, top, right, bottom, as `Image.crop` takes them.

        Pixels are counted after a turn that EXIF data asks for.
        """
        row = self._explained(image)
        return row["crop_left"], row["crop_top"], row["crop_right"], row["crop_bottom"]

    def picture(self, image: int | str) -> bytes:
        """The bytes of an image's file, out of its shard; ValueError if the run's input is gone or has changed."""
        row = self._explained(image)
        for raw in self.tables.originals([row["image_id"]]):
            if raw["key"][0].as_py() == row["key"] and raw["error"][0].as_py() is None:
                return raw["data"][0].as_py()
        raise ValueError(f"image {image}: its file cannot be read from {row['uri']} any more")

    def _explained(self, image: int | str) -> dict[str, Any]:
        """The row of `images` of an image; ValueError if it was refused."""
        row = self.image(image)
        if row["error"] is not None:
            raise ValueError(f"image {image}: it was refused ({row['error']}), so CLIP saw nothing of it")
        return row

    def latents_of(self, image: int | str) -> pa.Table:
        """An image's kept latents, strongest first: rank, latent, activation, pre_activation (patch, patches), names."""
        at = ("patch", "patches") if self.record.reads_tokens else ()
        kept = self.tables.rows("activations", [self.image_id(image)], ("rank", "latent", *STRENGTH, *at))
        return self._named(kept.drop_columns("image_id").sort_by("rank"))

    def maps(self, image: int | str, method: str | None = None) -> ImageMaps:
        """An image's relevance maps by one method."""
        by_method = pc.field("method") == self._method(method)
        columns = ("latent", "target", "method", "map", "scale", "remainder")
        image_id = self.image_id(image)
        rows = self.tables.rows("maps", [image_id], columns, by_method)
        kept = self.tables.rows("activations", [image_id], ("latent", "rank"))
        ranks = lookup(rows.select(["latent"]), kept, "latent")["rank"]
        rows = rows.take(pc.sort_indices(pc.fill_null(ranks, np.iinfo(np.int16).max)))
        latents, targets, methods = (rows[name].to_pylist() for name in ("latent", "target", "method"))
        return ImageMaps(decode(rows, self.grid), latents, targets, methods, rows["remainder"].to_numpy())

    # ---- All latents.

    def find(self, words: str) -> pa.Table:
        """The latents that words find, best first: see `saecore.query.search.latents`. ValueError if no latent has a name."""
        if "name" not in self.latents.column_names:
            raise ValueError(f"{self.uri}: its latents have no names yet; jobs.name gives them some")
        held = [name for name in ("name", "words", "valid", "score") if name in self.latents.column_names]
        places = search.latents(words, self.latents.select(held).to_pylist())
        return self.latents.take(pa.array(places, pa.int64()))

    def compare(self, a: str | Collection[int], b: str | Collection[int] = "") -> pa.Table:
        """Which latents fire more on one set of images than on another; those most typical of the first set come first.

        A set is an SQL condition on the columns of `images`, or the image_ids of its images; without `b`, it is all images that
        are not in the first. Columns, test and correction: `saecore.query.contrast.contrast`. ValueError for what is no
        condition, an empty set, or an image in both.
        """
        chosen = {name: _ids(images) for name, images in (("set_a", a), ("set_b", b)) if not isinstance(images, str)}
        first = a if isinstance(a, str) else "image_id IN (FROM set_a)"
        second = (b if isinstance(b, str) else "image_id IN (FROM set_b)") or f"({first}\n) IS NOT TRUE"
        # A line break follows each condition, since it may end in a comment.
        sides = f"""SELECT image_id, ({first}\n) IS TRUE AS a, ({second}\n) IS TRUE AS b
            FROM images WHERE error IS NULL"""
        sizes = "SELECT count(*) FILTER (a), count(*) FILTER (b), count(*) FILTER (a AND b)"
        try:
            for condition in (first, second):
                # It must be one expression: it closes no bracket of ours and begins no statement.
                duckdb.SQLExpression(condition)
            n_a, n_b, n_both = self.tables.sql(f"{sizes} FROM ({sides})", **chosen).to_pylist()[0].values()
        except duckdb.Error as error:
            raise ValueError(f"no condition on images: {str(error).splitlines()[0]}") from error
        if not n_a or not n_b:
            raise ValueError(
                f"every image meets the condition {first}, so none is left to compare with"
                if n_a and not len(b)
                else f"no image meets the condition {second if n_a else first}"
            )
        if n_both:
            raise ValueError(f"{n_both:,} images are in both sets; the test compares two sets without a common image")
        counts = self.tables.sql(
            f"""SELECT latent, count(*) FILTER (a) AS images_a, count(*) FILTER (b) AS images_b
            FROM activations JOIN ({sides}) USING (image_id)
            WHERE activation <> 0 AND (a OR b) GROUP BY latent ORDER BY latent""",
            **chosen,
        )
        return self._named(contrast(counts, n_a, n_b))

    # ---- What these share.

    def _named(self, table: pa.Table) -> pa.Table:
        names = [name for name in NAMES if name in self.latents.column_names]
        return lookup(table, self.latents.select(["latent", *names]), "latent")

    def _method(self, method: str | None) -> str:
        if not self.methods:
            raise ValueError(f"{self.uri} was made without maps")
        if method is not None and method not in self.methods:
            raise ValueError(f"method {method}: this run has maps by {', '.join(self.methods)}")
        return method or self.methods[0]


def _ids(image_ids: Collection[int]) -> pa.Table:
    return pa.table({"image_id": pa.array(np.asarray(image_ids, np.int64))})


def _count(n: int) -> int:
    """The largest number of rows, as DuckDB takes it."""
    if n < 1:
        raise ValueError(f"n {n}: must be at least 1")
    return min(n, LARGEST)


def _spelling(target: str) -> str:
    """One spelling for all that differ in whitespace only."""
    kind, _, words = target.partition(":")
    return f"{kind.strip()}:{' '.join(words.split())}"
