"""`preview.png` of a run: its first images, each with its strongest maps. Pages of a run: `saecore.report.pages`."""

import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from saecore import heatmaps
from saecore.query import results
from saecore.query.results import Results
from saecore.report import captions, display
from saecore.report.pictures import Pictures
from saecore.report.views import ImageView, Section, Views
from saecore.storage import join_uri, write_atomic

SIDE = 232
"""Pixels along the longer side of each picture."""

MOST_CHUNKS = 64
"""Chunks that are looked at: where the whole input is gone, the end of a run must not wait for a look at all of it."""


class Example(NamedTuple):
    """One image of a run with its first maps by the run's first method: of latents, else of texts, else of concepts.

    Maps of one kind have one unit, so that they can share a scale.
    """

    key: str
    picture: np.ndarray
    """uint8 (height, width, 3): the crop that CLIP saw, made small."""
    targets: list[str]
    pre_activations: list[float]
    maps: np.ndarray
    """float32 (n targets, H, W), in the method's units."""
    meaning: str
    """What the colours of the maps mean."""


def write_preview(uri: str, n_images: int = 3, n_maps: int = 3) -> str | None:
    """Write `preview.png` into the run at `uri`; its address, or None if no image has a picture and a map."""
    shown = examples(results.open(uri), n_images, n_maps)
    if not shown:
        return None
    address = join_uri(uri, "preview.png")
    write_atomic(address, display.png(preview(shown)))
    return address


def examples(run: Results, n_images: int, n_maps: int) -> list[Example]:
    """The first images of a run that were not refused and whose picture can still be read."""
    views, shown = Views(run), list[Example]()
    for image_id, picture in _pictures(run, n_images):
        view = next(views.images(np.array([image_id])))
        if (section := _with_maps(view, run.methods[0])) is not None:
            shown.append(_example(run, view, section, picture, n_maps))
        if len(shown) == n_images:
            break
    return shown


def preview(shown: list[Example]) -> Image.Image:
    """One row for each image: the crop that CLIP saw, then its maps on a scale that the row shares."""
    rows: list[list[display.Tile]] = []
    for example in shown:
        picture, limit = display.resized(example.picture, SIDE), display.shared_limit(example.maps)
        named = zip(example.targets, example.pre_activations, example.maps, strict=True)
        maps = [
            (display.overlay(picture, relevance, limit), f"{target[-26:]}   {value:.2f}")
            for target, value, relevance in named
        ]
        rows.append([(picture, example.key.rsplit("/", 1)[-1][-32:]), *maps])
    return display.mosaic(rows, foot=f"{shown[0].meaning}; one scale per row")


def _pictures(run: Results, at_once: int) -> Iterator[tuple[int, np.ndarray]]:
    """The first images of each of the first chunks, in the order of the plan, with their pictures: those that have one."""
    pictures = Pictures(run, SIDE)
    for chunk_id in np.unique(run.tables.manifest["chunk_id"].to_numpy())[:MOST_CHUNKS]:
        images = run.tables.files("images", np.array([chunk_id]))
        explained = images.to_table(["image_id"], filter=pc.field("error").is_null())["image_id"].to_numpy()
        for image_id, encoded in pictures.read(explained[:at_once]):
            if encoded is not None:
                yield image_id, np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def _with_maps(view: ImageView, method: str) -> Section | None:
    """The image's first section that has maps by this method."""
    return next((section for section in view.sections if method in section.limits), None)


def _example(run: Results, view: ImageView, section: Section, picture: np.ndarray, n_maps: int) -> Example:
    method = run.methods[0]
    tiles = [tile for tile in section.tiles if method in tile.maps][:n_maps]
    drawn = [tile.maps[method] for tile in tiles]
    return Example(
        key=view.image["key"],
        picture=picture,
        targets=[tile.target for tile in tiles],
        pre_activations=[tile.pre_activation for tile in tiles],
        maps=np.stack([heatmaps.decode(one.values, one.scale, run.grid) for one in drawn]),
        meaning=captions.meaning(method, section.kind),
    )
