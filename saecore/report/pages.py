"""Pages of a run as HTML, each made by itself: `saecore.report.static` writes them, `saecore.report.explorer` serves them.

A page holds maps as numbers, 8 bits a patch, and `site/static/maps.js` draws them over the picture as `saecore.report.display`
does. Everything that comes from a run is text on a page: Jinja escapes it, and data for scripts is JSON in which no tag can
begin. Pages load only files of the same report, by relative addresses.
"""

import base64
import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markupsafe

from saecore.judging import verdict, wording
from saecore.methods import ACTIVATION, METHODS
from saecore.query import search
from saecore.query.finding import find_images, find_targets, index, numbered, strongest_images
from saecore.report import captions
from saecore.report.captions import number, percent
from saecore.report.holdings import holdings, maps_in_words, naming
from saecore.report.pictures import Pictures
from saecore.report.views import ImageView, LatentView, Section, TargetView, Tile, Views
from saecore.storage import join_uri, split_settings

EXPLORER = "explorer"
"""Key of `Site.hints`: the command that shows every latent and every image."""

FOLDER = Path(__file__).parent / "site"
"""Templates, and the files that pages load."""

SPREAD = 8
"""Images of a latent's page besides the strongest."""

SHOWCASE, SHOWCASE_IMAGES = 4, 3
"""Latents of the first page, and images of each."""

LISTED_LATENTS, LISTED_IMAGES = 200, 120
"""Entries on one page of a list that is served."""

DEAD_LISTED = 200
"""Latents that fire for no image, of which the list names so many."""


class Figure(NamedTuple):
    """A tile, with the words about its map by the run's first method."""

    number: int
    """Its number on the page."""
    tile: Tile
    label: str
    caption: str
    active: str
    """What the map of its activation shows, in words; empty if there is none beside the map."""


class Group(NamedTuple):
    """A section with the meaning of its colours by the run's first method."""

    number: int
    title: str
    figures: list[Figure]
    has_maps: bool
    meaning: str
    active: str
    """The same of the activation, if it is shown beside the maps."""
    row: dict[str, Any] | None
    """On the first page: the row of the latent that the group is about."""


class Site:
    """Pages of a run. `latents` and `images`: those that have a page, None for all; links lead only to these."""

    def __init__(
        self,
        views: Views,
        live: bool = False,
        strongest: int = 12,
        latents: Collection[int] | None = None,
        images: Sequence[int] | None = None,
        hints: Mapping[str, str] | None = None,
    ) -> None:
        run = views.run
        self.run = run
        self.live = live
        """Whether a server answers: it makes any page and searches the whole run."""
        self.views = views
        self.pictures = Pictures(run, 448 if live else 224)
        self.hints = hints or {}
        """Command lines that pages name: by `Holding.what` those that add what is missing, and `EXPLORER`."""
        self.missing: set[int] = set()
        """Images known to have no picture."""
        self.uri = split_settings(run.uri)[0]  # settings may hold what nobody else should read
        self.name = self.uri.rstrip("/").rpartition("/")[2]
        self.day = run.record.started[:10]
        self.grid = run.grid
        has_both = run.record.reads_tokens and ACTIVATION in run.methods and len(run.methods) > 1
        self.beside = ACTIVATION if has_both else ""
        """The method whose maps are shown beside all others': of an SAE that reads tokens, where a latent is active."""
        self.methods = [method for method in run.methods if method != self.beside]
        """From which readers choose."""
        self.images = f"{run.n_images:,}"
        self.n_latents = f"{run.n_latents:,}"
        self.targets = run.targets
        """Texts and concepts; the place of each in this list is the number of its page."""
        self.no_map = (
            f"no map: this run holds maps of {maps_in_words(run)} only" if run.methods else "no map: this run has none"
        )
        """The words in the place of a map that is not there."""
        self.verdict = verdict.read(join_uri(run.uri, verdict.FOLDER))
        """Whether the run's maps are faithful; None if nobody has judged them."""
        self._strongest = strongest
        self._naming = naming(run)
        self._latents = None if latents is None else frozenset(latents)
        self._images = images
        self._image_places = {} if images is None else {image_id: place for place, image_id in enumerate(images)}
        self._env = jinja2.Environment(
            loader=jinja2.FileSystemLoader(FOLDER),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._env.filters |= {"number": number, "percent": percent, "count": "{:,}".format, "counted": captions.counted}

    def has_latent(self, latent: int) -> bool:
        """Whether it has a page."""
        return latent in self._latents if self._latents is not None else 0 <= latent < self.run.n_latents

    def has_image(self, image_id: int) -> bool:
        """Whether it has a page."""
        return self._images is None or image_id in self._image_places

    # ---- Pages.

    def overview(self) -> str:
        """index.html."""
        view, record = self.views.overview, self.run.record
        shown = [
            (latent, self.views.latent(latent, min(SHOWCASE_IMAGES, self._strongest), 0).sections[0])
            for latent in self._showcase
        ]
        groups, data = self._drawn([section for _, section in shown])
        rows = [self.views.latents[latent] for latent, _ in shown]
        decades = -round(view.rates.edges[0])
        rate = "How often latents fire", "share of images", "latents"
        charts = [captions.chart(*rate, view.rates, lambda power: f"{100 * 10**power:g} %", decades)]
        for name, bins in view.histograms.items():
            charts.append(captions.chart(*captions.FIGURES[name], "images", bins))
        return self._html(
            "index",
            cards=captions.cards(self.run, view.figures, len(self.views.by_rate)),
            groups=[group._replace(row=row) for group, row in zip(groups, rows, strict=True)],
            named=any(row["valid"] for row in rows),
            data=data,
            charts=charts,
            view=view,
            figures=captions.FIGURES,
            methods={name: captions.gives(method, record.reads_tokens) for name, method in METHODS.items()},
            decompose=[name for name, method in METHODS.items() if method.decomposes],
            refused=record.refused,
            holdings=holdings(self.run),
            made=captions.made(record),
        )

    def latent(self, latent: int, view: LatentView | None = None) -> str:
        """latents/{latent}.html."""
        view = view or self.views.latent(latent, self._strongest, SPREAD)
        row, (groups, data) = view.latent, self._drawn(view.sections)
        title = "Activations of the images for which it fires"
        chart = captions.chart(title, "activation", "images", view.activations)
        before, after = self._neighbours(latent)
        return self._html(
            "latent",
            "../",
            row=row,
            chart=chart,
            groups=groups,
            data=data,
            co_firing=view.co_firing,
            unit=captions.name_unit(row, self._naming),
            doubt=captions.doubt(row, self._naming) if row["name"] and not row["valid"] else "",
            before=before,
            after=after,
        )

    def target(self, place: int, view: TargetView | None = None) -> str:
        """targets/{place}.html."""
        view = view or self.views.target(self.targets[place], self._strongest, SPREAD)
        groups, data = self._drawn(view.sections)
        unit = captions.value(view.sections[0].kind) if view.sections else ""
        chart = captions.chart("Values for all images", unit, "images", view.values)
        after = place + 1 if place + 1 < len(self.targets) else None
        before = place - 1 if place else None
        shown = {"target": view.target, "unit": unit, "chart": chart, "groups": groups, "data": data}
        return self._html("target", "../", **shown, before=before, after=after)

    def image(self, view: ImageView) -> str:
        """images/{image_id}.html."""
        groups, data = self._drawn(view.sections)
        before, after = self._image_neighbours(view.image["image_id"])
        return self._html("image", "../", image=view.image, groups=groups, data=data, before=before, after=after)

    def latent_list(self, rows: Sequence[int], thumbs: Mapping[int, list[Mapping[str, Any]]], first: int = 0) -> str:
        """latents.html: latents that fire, from the `first` on, with the images to show of each."""
        firing = len(self.views.by_rate)
        return self._html(
            "latents",
            rows=[self.views.latents[latent] for latent in rows],
            thumbs=thumbs,
            first=first,
            firing=firing,
            named=any(row["name"] for row in self.views.latents),
            dead=[row["latent"] for row in self.views.latents if not row["images"]][:DEAD_LISTED] if not first else [],
            most=self.views.latents[self.views.by_rate[0]]["rate"] if firing else 1.0,
            **self._steps(first, LISTED_LATENTS, firing),
        )

    def image_list(self, views: Sequence[ImageView], first: int = 0) -> str:
        """images.html: some images, in the order of the plan from the `first` on."""
        total = self.run.record.images
        return self._html("images", views=views, total=total, first=first, **self._steps(first, LISTED_IMAGES, total))

    def search(self) -> str:
        """search.html."""
        return self._html("search")

    def judgement(self) -> str:
        """evaluation.html: whether the run's maps are faithful."""
        found = self.verdict
        assert found is not None
        drawing = markupsafe.Markup(wording.curves_svg(found))
        return self._html(
            "evaluation", found=found, tables=wording.tables_of(found), meanings=wording.MEANINGS, curves=drawing
        )

    def not_found(self, words: str, root: str = "") -> str:
        """The page that a server shows for an address without one."""
        return self._html("missing", root, words=words)

    def search_results(self, text: str, most: int) -> dict[str, list[Any]]:
        """What search.js shows for a text: the best latents, images and targets of the whole run, at most `most` of each."""
        latent = numbered(text)
        by_number = [latent] if latent is not None and self.has_latent(latent) else []
        named = search.latents(text, self.views.latents)
        return self.index(
            list(dict.fromkeys([*by_number, *named]))[:most],
            find_images(self.run, text, most),
            find_targets(self.targets, text)[:most],
        )

    def index(
        self, latents: Sequence[int], images: Sequence[tuple[int, str | None]], targets: Sequence[int]
    ) -> dict[str, list[Any]]:
        """The list that search.js reads, or shows; see `saecore.query.finding.index`."""
        rows = [self.views.latents[latent] for latent in latents]
        return index(rows, self._strongest_images, images, [(place, self.targets[place]) for place in targets])

    @functools.cached_property
    def _strongest_images(self) -> dict[int, int]:
        return strongest_images(self.run)

    # ---- What they are made of.

    def _html(self, template: str, root: str = "", **content: Any) -> str:
        return self._env.get_template(f"{template}.html").render(site=self, root=root, here=template, **content)

    def _drawn(self, sections: Sequence[Section]) -> tuple[list[Group], dict[str, Any]]:
        """Sections for a template, and the data from which maps.js draws their maps."""
        groups, maps = list[Group](), list[dict[str, Any]]()
        shown = self.methods[0] if self.methods else ""
        for place, section in enumerate(sections):
            figures = []
            for tile in section.tiles:
                said = {
                    method: (captions.label(tile, one), captions.caption(one, method))
                    for method, one in tile.maps.items()
                }
                active = said.get(self.beside, ("", ""))[0]
                figures.append(Figure(len(maps), tile, *said.get(shown, ("", "")), active))
                by_method = {
                    method: [base64.b64encode(one.values).decode(), one.scale, *said[method]]
                    for method, one in tile.maps.items()
                }
                maps.append({"section": place, "sinks": tile.image.get("sinks") or [], "by": by_method})
            meaning, active = (captions.meaning(method, section.kind) for method in (shown, self.beside))
            groups.append(Group(place, section.title, figures, bool(section.limits), meaning, active, None))
        held = [
            {
                "limits": section.limits,
                "meanings": {method: captions.meaning(method, section.kind) for method in section.limits},
                "units": {method: captions.units(method, section.kind) for method in section.limits},
            }
            for section in sections
        ]
        with_signs = [method for method in self.run.methods if captions.has_signs(method)]
        if not any(group.has_maps for group in groups):
            maps = []  # then the page loads no script that draws
        data = {"grid": self.grid, "methods": self.methods, "beside": self.beside, "signed": with_signs}
        data |= {"sections": held, "maps": maps}
        return groups, data

    @functools.cached_property
    def _showcase(self) -> list[int]:
        """The latents of the first page: those with the surest names, or else those that fire most often."""
        able = [latent for latent in self.views.by_rate if self.has_latent(latent)]
        rows = [self.views.latents[latent] for latent in able]
        named = sorted((row for row in rows if row["valid"]), key=lambda row: -row["margin"])
        return ([row["latent"] for row in named if row["images"] >= SHOWCASE_IMAGES] or able)[:SHOWCASE]

    def _neighbours(self, latent: int) -> tuple[int | None, int | None]:
        """The latents with a page before and after this one."""
        if self._latents is None:
            numbers = [latent - 1, latent + 1]
            return numbers[0] if latent > 0 else None, numbers[1] if numbers[1] < self.run.n_latents else None
        before = [other for other in self._latents if other < latent]
        after = [other for other in self._latents if other > latent]
        return max(before, default=None), min(after, default=None)

    def _image_neighbours(self, image_id: int) -> tuple[int | None, int | None]:
        if self._images is None:
            return self.run.tables.numbering.neighbours(image_id)
        place = self._image_places[image_id]
        before = self._images[place - 1] if place else None
        return before, self._images[place + 1] if place + 1 < len(self._images) else None

    def _steps(self, first: int, listed: int, total: int) -> dict[str, Any]:
        """Where the pages before and after this one of a served list begin."""
        earlier = max(first - listed, 0) if self.live and first else None
        return {"earlier": earlier, "later": first + listed if self.live and first + listed < total else None}
