"""What the pages of a report say, as plain values: the run, one latent, one image. No HTML, no files, no pictures.

Maps are compared within a `Section`, on one scale for each method: the strongest patch of all its maps has full colour. Rows
and columns of patches count from 1, from the top left.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saecore import heatmaps
from saecore.query import histograms
from saecore.query.by_latent import MAP
from saecore.query.histograms import Bins
from saecore.query.maps import Patch, peaks
from saecore.query.results import STRENGTH, Results
from saecore.report.overview import BINS, Overview, overview
from saecore.report.pictures import CROP
from saecore.runs.latents import lookup

CO_FIRING = 10
"""Latents that a latent's page names as firing for the same images."""

TITLES = {"latent": "Latents", "text": "Texts", "concept": "Concepts"}
"""Titles of an image's sections, by kind of target: the maps of a text are in other units than those of a latent."""

LATENT_COLUMNS = (
    "images",
    "rate",
    "mean",
    "max",
    "median",
    "extent",
    "patches",
    "rank_correlation",
    "peak_distance",
    "name",
    "score",
    "margin",
    "runner_up",
    "runner_up_score",
    "valid",
    "by_data",
    "words",
    "scores",
)
CO_COLUMNS = ("co_latents", "co_share", "co_lift")
"""Columns of latents.parquet that pages show, if it has them."""


class Map(NamedTuple):
    """One relevance map."""

    values: bytes
    """int8 of each patch, row-major."""
    scale: float
    """Value of a patch = int8 x `scale`."""
    strongest: Patch
    """The patch of the largest value."""
    against: Patch | None
    """The patch of the least value, if it outweighs the strongest; else None."""
    total: float
    """Sum of all patches."""
    remainder: float
    """NaN if the method does not decompose."""
    sink_share: float


class Tile(NamedTuple):
    """One target on one image."""

    image: Mapping[str, Any]
    """image_id, key, crop, sinks."""
    latent: int | None
    target: str
    """`latent 53`, or a text or concept as in MAPS."""
    activation: float | None
    """None if the target is not a kept latent."""
    pre_activation: float
    place: str
    """In words, its place among the latent's images, or among the image's latents."""
    maps: dict[str, Map]
    """Each map by its method."""


class Section(NamedTuple):
    """Tiles whose maps are compared."""

    title: str
    kind: str
    """latent, text or concept."""
    tiles: list[Tile]
    limits: dict[str, float]
    """The |value| of full colour, by method."""


class LatentView(NamedTuple):
    """What the page of a latent says."""

    latent: dict[str, Any]
    """Its row of `Views.latents`."""
    activations: Bins
    sections: list[Section]
    co_firing: list[dict[str, Any]]
    """latent, share, lift, as in `Results.co_firing`."""


class TargetView(NamedTuple):
    """What the page of a text or concept says."""

    target: str
    """As in MAPS."""
    values: Bins
    """A histogram of its values for all images."""
    sections: list[Section]


class ImageView(NamedTuple):
    """What the page of an image says."""

    image: dict[str, Any]
    """Its row of IMAGES, without the embedding."""
    sections: list[Section]


class Views:
    """What there is to see of a run. For one thread at a time, as `saecore.query.tables` is."""

    def __init__(self, run: Results) -> None:
        self.run = run

    # ---- The run.

    @functools.cached_property
    def latents(self) -> list[dict[str, Any]]:
        """Each latent by its number: `latent` and LATENT_COLUMNS, None for what is not known."""
        known = self.run.latents
        held = [name for name in LATENT_COLUMNS if name in known.column_names]
        table = pa.table({"latent": pa.array(range(self.run.n_latents), pa.int32())})
        table = lookup(table, known.select(["latent", *held]), "latent")
        if "images" not in held:  # jobs.index has not counted yet
            query = """SELECT latent, count(*) AS images, count(*) / ? AS rate, avg(activation) AS mean,
                max(activation) AS max, median(activation) AS median
                FROM by_latent WHERE activation <> 0 GROUP BY latent"""
            table = lookup(table, self.run.sql(query, max(self.run.n_images, 1)), "latent")
        rows = [dict.fromkeys(LATENT_COLUMNS) | row for row in table.to_pylist()]
        return [row | {"images": row["images"] or 0, "rate": row["rate"] or 0.0} for row in rows]

    @functools.cached_property
    def by_rate(self) -> list[int]:
        """The latents that fire, the most frequent first."""
        firing = [row for row in self.latents if row["images"]]
        return [row["latent"] for row in sorted(firing, key=lambda row: (-row["images"], row["latent"]))]

    @functools.cached_property
    def overview(self) -> Overview:
        """See `Overview`; reads three columns of all images."""
        return overview(self.run, [row["rate"] for row in self.latents if row["images"]])

    # ---- One latent.

    def latent(self, latent: int, strongest: int, spread: int) -> LatentView:
        """A latent with its strongest images, and with others spread evenly over the ranks of the rest."""
        row, counts = self.latents[latent], self.run.histogram(latent, BINS)
        bins = Bins([*counts["low"].to_pylist(), *counts["high"][-1:].to_pylist()], counts["images"].to_pylist())
        places = _spread(strongest, row["images"], spread)
        top = [self.run.top_images(latent, strongest, method, maps=True) for method in self.run.methods]
        best = top[0] if top else self.run.top_images(latent, strongest)
        rest = self._at(latent, places)
        maps = [table.select(["image_id", *MAP]).drop_null() for table in top]
        if top:
            maps.append(self.run.tables.rows("maps", rest["image_id"], MAP, pc.field("latent") == latent))
        by_image = self._by_image(maps)
        images = self._shown([*best["image_id"].to_pylist(), *rest["image_id"].to_pylist()])
        tiles = [
            Tile(
                images[shown["image_id"]],
                latent,
                f"latent {latent}",
                shown["activation"],
                shown["pre_activation"],
                _place(place, row["images"]),
                by_image[shown["image_id"]],
            )
            for place, shown in zip(
                [*range(best.num_rows), *places], [*best.to_pylist(), *rest.to_pylist()], strict=True
            )
        ]
        return LatentView(row, bins, _in_two(tiles, best.num_rows, "latent"), self._co_firing(latent))

    def _at(self, latent: int, places: list[int]) -> pa.Table:
        """image_id, `STRENGTH`, place: of the images for which it fires, strongest first, those at some places from 0."""
        query = """SELECT image_id, activation, pre_activation, place FROM (
                SELECT *, row_number() OVER (ORDER BY activation DESC, image_id) - 1 AS place
                FROM by_latent WHERE latent = ? AND activation <> 0)
            WHERE list_contains(?, place) ORDER BY place"""
        return self.run.sql(query, latent, places or [-1])

    def _co_firing(self, latent: int) -> list[dict[str, Any]]:
        known = self.run.latents
        if "co_latents" in known.column_names:  # jobs.index counted them
            row = known.filter(pc.equal(known["latent"], latent)).select(CO_COLUMNS).to_pylist()[0]
            others = zip(*(row[name] or [] for name in CO_COLUMNS), strict=True)
            return [dict(zip(("latent", "share", "lift"), other, strict=True)) for other in others][:CO_FIRING]
        return self.run.co_firing(latent, CO_FIRING).select(["latent", "share", "lift"]).to_pylist()

    # ---- One text or concept.

    def target(self, target: str, strongest: int, spread: int) -> TargetView:
        """A target with the images of its largest values, and with others spread evenly over the ranks of the rest."""
        values = self.run.values_of(target)
        values = values.rename_columns(["image_id", "value"])
        bins = histograms.count(values["value"].to_numpy(), BINS)
        places = [*range(min(strongest, values.num_rows)), *_spread(strongest, values.num_rows, spread)]
        shown = values.take(pa.array(places, pa.int64()))
        by_image = self._by_image([self.run.tables.rows("maps", shown["image_id"], MAP, pc.field("target") == target)])
        images = self._shown(shown["image_id"].to_pylist())
        tiles = [
            Tile(
                images[row["image_id"]],
                None,
                target,
                None,
                row["value"],
                _place(place, values.num_rows),
                by_image[row["image_id"]],
            )
            for place, row in zip(places, shown.to_pylist(), strict=True)
        ]
        sections = _in_two(tiles, strongest, target.partition(":")[0])
        return TargetView(target, bins, sections)

    # ---- Images.

    def images(self, image_ids: np.ndarray) -> Iterator[ImageView]:
        """Some images, in that order, without those that are not of the run."""
        tables = self.run.tables
        columns = [name for name in tables.datasets["images"].schema.names if name not in ("image_id", "embedding")]
        images = {row["image_id"]: row for row in tables.rows("images", image_ids, columns).to_pylist()}
        kept, maps = defaultdict(list), defaultdict(list)
        for row in tables.rows("activations", image_ids, ("rank", "latent", *STRENGTH)).sort_by("rank").to_pylist():
            kept[row["image_id"]].append(row)
        if "maps" in tables.datasets:
            columns = ["latent", "target", "pre_activation", *MAP]
            for row in tables.rows("maps", image_ids, columns).to_pylist():
                maps[row["image_id"]].append(row)
        for image_id in image_ids.tolist():
            if image_id in images:
                yield ImageView(images[image_id], self._sections(images[image_id], kept[image_id], maps[image_id]))

    def _sections(
        self, image: Mapping[str, Any], kept: list[dict[str, Any]], maps: list[dict[str, Any]]
    ) -> list[Section]:
        """The image's targets: its kept latents, strongest first, then everything else that has a map."""
        tiles = {
            f"latent {row['latent']}": Tile(
                image,
                row["latent"],
                f"latent {row['latent']}",
                row["activation"],
                row["pre_activation"],
                f"{row['rank'] + 1} of {len(kept)} kept",
                {},
            )
            for row in kept
        }
        for row in maps:
            target = row["target"] or f"latent {row['latent']}"
            new = Tile(
                image,
                row["latent"],
                target,
                None,
                row["pre_activation"],
                "not kept" if row["latent"] is not None else "",
                {},
            )
            tiles.setdefault(target, new).maps[row["method"]] = self._map(row)
        by_kind = defaultdict(list)
        for target, tile in tiles.items():
            by_kind["latent" if tile.latent is not None else target.partition(":")[0]].append(tile)
        return [
            Section(title, kind, by_kind[kind], shared_limits(by_kind[kind]))
            for kind, title in TITLES.items()
            if kind in by_kind
        ]

    def _shown(self, image_ids: list[int]) -> dict[int, dict[str, Any]]:
        columns = [name for name in ("key", *CROP, "sinks") if name in self.run.tables.datasets["images"].schema.names]
        return {row["image_id"]: row for row in self.run.tables.rows("images", image_ids, columns).to_pylist()}

    def _by_image(self, tables: Sequence[pa.Table]) -> dict[int, dict[str, Map]]:
        """Maps of one target, by image and method."""
        maps: dict[int, dict[str, Map]] = defaultdict(dict)
        for row in (row for table in tables for row in table.to_pylist()):
            maps[row["image_id"]][row["method"]] = self._map(row)
        return maps

    def _map(self, row: Mapping[str, Any]) -> Map:
        relevance = heatmaps.decode(row["map"], row["scale"], self.run.grid)
        most_for, against = peaks(relevance)
        return Map(
            values=row["map"],
            scale=row["scale"],
            strongest=most_for,
            against=against,
            total=float(relevance.sum(dtype=np.float64)),
            remainder=row["remainder"],
            sink_share=row["sink_share"],
        )


def _spread(strongest: int, n: int, spread: int) -> list[int]:
    """Up to `spread` places of n, evenly from the first after the strongest to the last."""
    return np.unique(np.linspace(strongest, n - 1, min(spread, max(n - strongest, 0))).astype(int)).tolist()


def _place(place: int, n: int) -> str:
    return f"{place + 1:,} of {n:,}"


def _in_two(tiles: list[Tile], strongest: int, kind: str) -> list[Section]:
    """The strongest images of a target and the others, on one scale."""
    parts = {"Strongest images": tiles[:strongest], "Across the rest of its range": tiles[strongest:]}
    limits = shared_limits(tiles)
    return [Section(title, kind, part, limits) for title, part in parts.items() if part]


def shared_limits(tiles: Sequence[Tile]) -> dict[str, float]:
    """By method: the largest |value| of any patch of these tiles' maps."""
    limits: dict[str, float] = {}
    for method, one in (item for tile in tiles for item in tile.maps.items()):
        limits[method] = max(
            limits.get(method, 0.0), *(abs(patch.value) for patch in (one.strongest, one.against) if patch)
        )
    return limits
