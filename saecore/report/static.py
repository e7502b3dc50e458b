"""A report as a folder of files: the pages of `saecore.report.pages` for a part of a run, with everything that they load.

    REPORT/index.html  latents.html  images.html  search.html  evaluation.html, if the run was judged
    REPORT/latents/53.html  images/4294967342.html  targets/0.html     a page each
    REPORT/pictures/4294967342.webp                    what CLIP saw of an image, once
    REPORT/static/  data/search.js                     style and scripts; the list that the search reads
    REPORT/report.json                                 which run it is a report of

A report is written next to its place and moved there when it is whole. It replaces an earlier report, and never anything else.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from jinja2.utils import htmlsafe_json_dumps

from saecore.query.results import Results
from saecore.report.pages import FOLDER, SPREAD, Site
from saecore.report.views import ImageView, Views
from saecore.storage import reason, writing

MARK = "report.json"

AT_ONCE = 64
"""Images whose maps are held in memory together."""

THUMBS = 3
"""Pictures of each latent in the list."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """How much of a run a report holds."""

    latent_pages: int = 256
    """Latents with a page of their own: those that fire most often."""
    image_pages: int = 512
    """Images with a page of their own, spread evenly over the run."""
    top: int = 12
    """Images on a latent's page for which it fires most strongly; some others across its range come after them."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} {getattr(self, field.name)}: must be at least 1")


def check_place(out: Path) -> None:
    """ValueError if anything other than a report is at `out`."""
    try:
        other = out.exists() and not (out / MARK).is_file() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise ValueError(f"{out} cannot be read: {reason(error)}") from error
    if other:
        raise ValueError(f"{out} holds something other than a report; name a new or empty folder")


class Report:
    """A report to be written. `len` is its number of files, not counting those that every report has."""

    def __init__(self, run: Results, choice: Choice, hints: Mapping[str, str] | None = None) -> None:
        """`hints`: command lines that the pages name, see `Site.hints`."""
        views = Views(run)
        latents = views.by_rate[: choice.latent_pages]
        n_images = run.record.images
        spread = np.unique(np.linspace(0, n_images - 1, min(choice.image_pages, n_images)).astype(int))
        refused = [row["image_id"] for row in views.overview.refused]
        self.image_ids = np.union1d(run.tables.numbering.image_ids(spread), np.array(refused, np.int64))
        self.site = Site(views, strongest=choice.top, latents=latents, images=self.image_ids.tolist(), hints=hints)
        self.latents = {latent: views.latent(latent, choice.top, SPREAD) for latent in latents}
        self.targets = [views.target(target, choice.top, SPREAD) for target in self.site.targets]
        sections = [section for view in self.latents.values() for section in view.sections]
        sections += [section for view in self.targets for section in view.sections]
        tiles = [tile for section in sections for tile in section.tiles]
        shown = run.tables.rows("images", self.image_ids, (), pc.field("error").is_null())
        self.pictured = np.union1d(
            shown["image_id"].to_numpy(), np.array([tile.image["image_id"] for tile in tiles], np.int64)
        )

    def __len__(self) -> int:
        return len(self.pictured) + len(self.latents) + len(self.targets) + len(self.image_ids)

    def write(self, out: Path) -> Iterator[None]:
        """Write the files; yields after each. `site.missing` then has the images without a picture."""
        folder, before = out.with_name(f".{out.name}.unfinished"), out.with_name(f".{out.name}.before")
        for left in (folder, before):  # a stopped job left them
            shutil.rmtree(left, ignore_errors=True)
        try:
            with writing(str(out)):
                shutil.copytree(FOLDER / "static", folder / "static")
                for name in ("pictures", "latents", "targets", "images", "data"):
                    (folder / name).mkdir()
            yield from self._pictures(folder / "pictures")
            yield from self._pages(folder)
            with writing(str(out)):
                if out.exists():
                    out.rename(before)
                folder.rename(out)
            shutil.rmtree(before, ignore_errors=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _pictures(self, folder: Path) -> Iterator[None]:
        for image_id, picture in self.site.pictures.read(self.pictured):
            if picture is None:
                self.site.missing.add(image_id)
            else:
                with writing(str(folder)):
                    (folder / f"{image_id}.webp").write_bytes(picture)
            yield

    def _pages(self, folder: Path) -> Iterator[None]:
        site = self.site
        for latent, view in self.latents.items():
            _write(folder / "latents" / f"{latent}.html", site.latent(latent, view))
            yield
        for place, target in enumerate(self.targets):
            _write(folder / "targets" / f"{place}.html", site.target(place, target))
            yield
        listed = []
        for start in range(0, len(self.image_ids), AT_ONCE):
            for image in site.views.images(self.image_ids[start : start + AT_ONCE]):
                _write(folder / "images" / f"{image.image['image_id']}.html", site.image(image))
                listed.append(image._replace(sections=[]))
                yield
        thumbs = {
            latent: [tile.image for tile in view.sections[0].tiles[:THUMBS]] for latent, view in self.latents.items()
        }
        _write(folder / "index.html", site.overview())
        _write(folder / "latents.html", site.latent_list(list(self.latents), thumbs))
        _write(folder / "images.html", site.image_list(listed))
        _write(folder / "search.html", site.search())
        if site.verdict is not None:
            _write(folder / "evaluation.html", site.judgement())
        _write(folder / "data" / "search.js", f"window.searchIndex = {self._search_index(listed)};\n")
        mark = {"run": site.uri, "fingerprint": site.run.record.fingerprint}
        _write(folder / MARK, json.dumps(mark) + "\n")

    def _search_index(self, listed: list[ImageView]) -> str:
        keys = [(view.image["image_id"], view.image["key"]) for view in listed]
        missing = self.site.missing | {view.image["image_id"] for view in listed if view.image["error"]}
        places = range(len(self.targets))
        index = self.site.index(list(self.latents), keys, places)
        return htmlsafe_json_dumps(index | {"missing": sorted(missing)})


def _write(path: Path, text: str) -> None:
    with writing(str(path.parent)):
        path.write_text(text, encoding="utf-8", newline="\n")
