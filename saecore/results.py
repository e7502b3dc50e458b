"""Open a finished run and ask it questions.

    run = saecore.results.open("runs/photos")          # or s3://bucket/run
    run.top_images(53, n=20)                           # pyarrow tables; .to_pandas() where that is wanted
    run.maps("000036.jpg").maps                        # float32 (k, H, W), pre-activation units
    run.sql("SELECT count(*) FROM activations JOIN images USING (image_id) WHERE width > 640")

Files are read through the run's manifest, and by_latent/ through its own (`saecore.by_latent`), which makes questions about one
latent fast and is not needed for any. A latent *fires* for an image where it is kept with an activation other than zero: what
a run did not keep, these tables do not know.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq

from saecore import latents as latents_table
from saecore.contrast import contrast
from saecore.runs import TABLES
from saecore.schema import INDEX_BITS
from saecore.storage import filesystem_of, join_uri

SHOWN = ("uri", "key", "width", "height", "crop_left", "crop_top", "crop_right", "crop_bottom")
"""Columns of `images` with which an image is shown, and its map laid over it."""

MAP = ("method", "map", "scale", "remainder", "sink_share")
"""Columns of `maps` that make one map."""


NAMES = ("name", "score")
"""Columns of `latents` that say what a latent is called, where jobs.name wrote them."""


class Maps(NamedTuple):
    """The relevance maps of one image, strongest latent first."""

    maps: np.ndarray
    """float32 (k, H, W), pre-activation units."""
    latents: list[int | None]
    """None where the target is not a latent."""
    targets: list[str | None]
    """None where it is one."""
    methods: list[str]
    remainders: np.ndarray
    """float32 (k): what of each pre-activation no patch accounts for; NaN where the method is no decomposition."""


def open(uri: str) -> "Results":  # noqa: A001 - results.open is what it is
    """A complete run of jobs.explain, local or at an address; ValueError if there is none at `uri`."""
    record = read_record(uri)
    if record.get("parts", {}).get("kind", "explain") != "explain":
        raise ValueError(f"{uri} is a run of another job and holds no latents; jobs.explain makes those")
    if record["status"] != "complete":
        raise ValueError(f"{uri} is not complete: the command that began it, given again, ends it: {record['command']}")
    return Results(uri, record)


def read_record(uri: str) -> dict[str, Any]:
    """run.json at `uri`; ValueError if there is none."""
    filesystem, path = filesystem_of(join_uri(uri, "run.json"))
    if filesystem.get_file_info(path).type != pyarrow.fs.FileType.File:
        raise ValueError(f"{uri} holds no run: there is no run.json")
    with filesystem.open_input_stream(path) as stream:
        return json.loads(stream.read())


def decode(table: pa.Table, grid: tuple[int, int]) -> np.ndarray:
    """Rows with the columns `map` and `scale` -> float32 (rows, H, W) in pre-activation units."""
    maps = np.frombuffer(b"".join(table["map"].to_pylist()), np.int8).reshape(table.num_rows, *grid)
    return maps * table["scale"].to_numpy().astype(np.float32)[:, None, None]


class Results:
    """A finished run. Cheap to make: files are opened when they are asked for."""

    def __init__(self, uri: str, record: Mapping[str, Any]) -> None:
        self.uri = uri
        self.record = record
        """run.json."""
        self.grid: tuple[int, int] = tuple(record["grid"])
        self.n_latents: int = record["n_latents"]
        self.n_images: int = record["images"] - sum(record["refused"].values())
        """Images that were not refused."""

    # ---- Tables.

    @functools.cached_property
    def _manifest(self) -> pa.Table:
        filesystem, path = filesystem_of(join_uri(self.uri, "manifest.parquet"))
        return pq.read_table(path, filesystem=filesystem, columns=["chunk_id", "table", "path"])

    @functools.cached_property
    def _chunk_starts(self) -> tuple[np.ndarray, np.ndarray]:
        """The plan's chunks in the order of their images: their first image_id, their chunk_id."""
        filesystem, path = filesystem_of(join_uri(self.uri, "plan.parquet"))
        plan = pq.read_table(path, filesystem=filesystem, columns=["shard_id", "start", "chunk_id"])
        first = plan["shard_id"].to_numpy() << INDEX_BITS | plan["start"].to_numpy()
        order = np.argsort(first)
        return first[order], plan["chunk_id"].to_numpy()[order]

    def dataset(self, table: str, images: Sequence[int] | None = None) -> pyarrow.dataset.Dataset:
        """The files of `images`, `activations` or `maps`; of all chunks, or of those that hold these images."""
        mask = pc.equal(self._manifest["table"], table)
        if images is not None:
            first, chunk_ids = self._chunk_starts
            held = np.unique(chunk_ids[np.searchsorted(first, np.asarray(images), side="right") - 1])
            mask = pc.and_(mask, pc.is_in(self._manifest["chunk_id"], pa.array(held, pa.int64())))
        filesystem, root = filesystem_of(self.uri)
        names = self._manifest.filter(mask)["path"].to_pylist()
        return pyarrow.dataset.dataset([f"{root}/{name}" for name in names], filesystem=filesystem, format="parquet")

    @functools.cached_property
    def methods(self) -> list[str]:
        """How maps were computed; the first is what `method=None` means. None where the run has no maps."""
        metadata = self.dataset("activations").schema.metadata
        return (metadata.get(b"methods") or metadata[b"method"]).decode().split(",")

    @functools.cached_property
    def _database(self) -> duckdb.DuckDBPyConnection:
        database = duckdb.connect(config={"autoinstall_known_extensions": False, "preserve_insertion_order": False})
        for table in TABLES:
            if pc.any(pc.equal(self._manifest["table"], table)).as_py():
                database.register(table, self.dataset(table))
        database.register("by_latent", self.dataset("activations"))
        database.register("latents", self.latents)
        return database

    def sql(self, query: str, parameters: Sequence[Any] = ()) -> pa.Table:
        """DuckDB's answer; it sees `images`, `activations`, `maps`, `by_latent` and `latents`. `?` takes a parameter."""
        return self._database.sql(query, params=list(parameters)).to_arrow_table()

    @functools.cached_property
    def latents(self) -> pa.Table:
        """latents.parquet, or nothing but the numbers of the latents where nothing was written yet."""
        found = latents_table.read(self.uri)
        return found if found is not None else pa.table({"latent": pa.array(range(self.n_latents), pa.int32())})

    # ---- One latent.

    def top_images(self, latent: int, n: int = 20, method: str | None = None, maps: bool = False) -> pa.Table:
        """The images for which it fires most strongly, strongest first: image_id, activation, pre_activation, `SHOWN`.

        With `maps`, the `MAP` columns too, by one method: `decode(table, run.grid)` makes arrays of them.
        """
        self._check_latent(latent)
        found = self.sql(
            """SELECT image_id, activation, pre_activation FROM activations WHERE latent = ? AND activation <> 0
            ORDER BY activation DESC, image_id LIMIT ?""",
            [latent, n],
        )
        found = _lookup(found, self._rows("images", found, SHOWN))
        if not maps:
            return found
        one = (pc.field("latent") == latent) & (pc.field("method") == self._method(method))
        return _lookup(found, self._rows("maps", found, MAP, one))

    def histogram(self, latent: int, bins: int = 20) -> pa.Table:
        """How strongly it fires, in bins of one width: low, high, images."""
        self._check_latent(latent)
        fired = self.sql("SELECT activation FROM by_latent WHERE latent = ? AND activation <> 0", [latent])
        images, edges = np.histogram(fired["activation"].to_numpy(), bins)
        return pa.table({"low": edges[:-1], "high": edges[1:], "images": images})

    def co_firing(self, latent: int, n: int = 20) -> pa.Table:
        """The latents that fire for the same images: latent, images (of both), share, lift, jaccard; by jaccard.

        share: of this latent's images, those where the other fires too. lift: how many times as often as if the two knew
        nothing of each other. jaccard: of the images where either fires, those where both do; neither the latent that
        fires everywhere nor the one that fires once comes first by it.
        """
        self._check_latent(latent)
        found = self.sql(
            """WITH fired AS (FROM activations WHERE activation <> 0),
                 own AS (SELECT image_id FROM by_latent WHERE latent = $1 AND activation <> 0),
                 shared AS (SELECT latent, count(*) AS images FROM fired SEMI JOIN own USING (image_id) GROUP BY latent),
                 alone AS (SELECT latent, count(*) AS each FROM fired GROUP BY latent)
            SELECT latent, images, images / own_images AS share, images * $2 / (own_images * each) AS lift,
                 images / (own_images + each - images) AS jaccard
            FROM shared JOIN alone USING (latent), (SELECT count(*) AS own_images FROM own)
            WHERE latent <> $1 ORDER BY jaccard DESC, latent LIMIT $3""",
            [latent, self.n_images, n],
        )
        return self._named(found)

    # ---- One image.

    def image_id(self, image: int | str) -> int:
        """An image's number, from its number or its key; ValueError for a key that no image, or more than one, has."""
        if isinstance(image, int):
            first, _ = self._chunk_starts
            if image >= first[0] and self._rows("images", pa.table({"image_id": [image]}), ("key",)).num_rows:
                return image
            raise ValueError(f"image {image}: this run has none of that number")
        found = self.sql(
            "SELECT image_id, uri FROM images WHERE key = ? ORDER BY image_id LIMIT 4", [image]
        ).to_pylist()
        if len(found) == 1:
            return found[0]["image_id"]
        if found:
            places = ", ".join(f"{row['image_id']} in {row['uri']}" for row in found[:3])
            raise ValueError(f"image {image}: several have this key, so name one by its number: {places}")
        raise ValueError(f"image {image}: this run has none of that key")

    def image(self, image: int | str) -> dict[str, Any]:
        """Its row of `images`."""
        wanted = pa.table({"image_id": [self.image_id(image)]})
        return self._rows("images", wanted, self._names_of("images")).to_pylist()[0]

    def latents_of(self, image: int | str) -> pa.Table:
        """Its kept latents, strongest first: rank, latent, activation, pre_activation, and their names where they have some."""
        columns = ("rank", "latent", "activation", "pre_activation")
        found = self._rows("activations", pa.table({"image_id": [self.image_id(image)]}), columns)
        return self._named(found.sort_by("rank").drop_columns(["image_id"]))

    def maps(self, image: int | str, method: str | None = None) -> Maps:
        """Its relevance maps by one method: the kept latents' first, strongest first."""
        wanted = pa.table({"image_id": [self.image_id(image)]})
        rows = self._rows("maps", wanted, self._names_of("maps"), pc.field("method") == self._method(method))
        ranks = {
            row["latent"]: row["rank"] for row in self._rows("activations", wanted, ("latent", "rank")).to_pylist()
        }
        order = np.argsort([ranks.get(latent, len(ranks)) for latent in rows["latent"].to_pylist()], kind="stable")
        rows = rows.take(order)
        targets = rows["target"].to_pylist() if "target" in rows.column_names else [None] * rows.num_rows
        return Maps(
            decode(rows, self.grid),
            rows["latent"].to_pylist(),
            targets,
            rows["method"].to_pylist(),
            rows["remainder"].to_numpy(),
        )

    # ---- All latents.

    def find(self, word: str) -> pa.Table:
        """The latents with `word` in one of their names, in any case: those named just so first, then by score."""
        text = [field.name for field in self.latents.schema if field.type in (pa.string(), pa.list_(pa.string()))]
        if not text:
            raise ValueError(f"{self.uri}: its latents have no names yet; jobs.name gives them some")
        wanted, found = word.casefold(), []
        for place, row in enumerate(self.latents.select(text).to_pylist()):
            names = [value for values in row.values() for value in (values if isinstance(values, list) else [values])]
            lowered = [name.casefold() for name in names if name is not None]
            if any(wanted in name for name in lowered):
                # The columns' order is that of their weight: a latent's name comes before its runner-up.
                found.append((wanted not in lowered, [wanted not in name for name in lowered].index(False), place))
        return self.latents.take([place for *_, place in sorted(found)])

    def compare(self, filter_a: str, filter_b: str = "") -> pa.Table:
        """Which latents fire more on one set of images than on another: SQL conditions on the columns of `images`.

        Without `filter_b`, all other images. Columns, tests and correction: `saecore.contrast.contrast`; most typical of
        the first set first. ValueError where a condition is none, a set is empty, or an image is in both.
        """
        other = f"({filter_b})" if filter_b else f"NOT coalesce(({filter_a}), false)"
        sides = f"""SELECT image_id, coalesce(({filter_a}), false) AS a, coalesce({other}, false) AS b
            FROM images WHERE error IS NULL"""
        try:
            n_a, n_b, n_both = (
                self.sql(f"SELECT count(*) FILTER (a), count(*) FILTER (b), count(*) FILTER (a AND b) FROM ({sides})")
                .to_pylist()[0]
                .values()
            )
        except duckdb.Error as error:
            raise ValueError(f"no condition on images: {str(error).splitlines()[0]}") from error
        if n_both:
            raise ValueError(f"{n_both:,} images are in both sets: they must be in one, or no test can tell them apart")
        if not n_a or not n_b:
            raise ValueError(f"no image meets {filter_a if not n_a else filter_b or f'NOT ({filter_a})'}")
        counts = self.sql(
            f"""SELECT latent, count(*) FILTER (a) AS images_a, count(*) FILTER (b) AS images_b FROM activations
            JOIN ({sides}) USING (image_id) WHERE activation <> 0 AND (a OR b) GROUP BY latent ORDER BY latent"""
        )
        return self._named(contrast(counts, n_a, n_b))

    # ---- What these share.

    def _rows(
        self,
        table: str,
        wanted: pa.Table,
        columns: Sequence[str],
        condition: pyarrow.dataset.Expression | None = None,
    ) -> pa.Table:
        """`image_id` and some columns of the rows of these images: only their chunks are opened."""
        image_ids = wanted["image_id"]
        if not len(image_ids):
            return self.dataset(table).schema.empty_table().select(["image_id", *columns])
        these = pc.field("image_id").isin(image_ids)
        return self.dataset(table, image_ids).to_table(
            columns=["image_id", *columns], filter=these if condition is None else these & condition
        )

    def _names_of(self, table: str) -> list[str]:
        return [name for name in self.dataset(table).schema.names if name != "image_id"]

    def _named(self, table: pa.Table) -> pa.Table:
        """With the latents' names, where they have some."""
        return _lookup(table, self.latents.select(["latent", *(set(NAMES) & set(self.latents.column_names))]), "latent")

    def _method(self, method: str | None) -> str:
        if "maps" not in self._manifest["table"].unique().to_pylist():
            raise ValueError(f"{self.uri} was made without maps")
        if method is not None and method not in self.methods:
            raise ValueError(f"method {method}: this run has maps by {', '.join(self.methods)}")
        return method or self.methods[0]

    def _check_latent(self, latent: int) -> None:
        if not 0 <= latent < self.n_latents:
            raise ValueError(f"latent {latent}: this run's are 0 to {self.n_latents - 1}")


def _lookup(table: pa.Table, more: pa.Table, key: str = "image_id") -> pa.Table:
    """`table` with the columns of the row of `more` that has the same key; null where there is none. Lists may travel."""
    place = pc.index_in(table[key], more[key])
    for name in more.column_names:
        if name != key:
            table = table.append_column(name, more[name].take(place))
    return table
