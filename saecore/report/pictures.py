"""Small pictures of a run's images, as WebP: read from the run's input, cut to what CLIP saw.

Only the images that are asked for are read. An image whose shard is gone, out of reach, or changed has no picture; that is
never an error.
"""

import functools
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from saecore.images.decode import ImageError, open_rgb
from saecore.query.results import Results

CROP = ("crop_left", "crop_top", "crop_right", "crop_bottom")

QUALITY = 82
"""WebP's quality: a photograph of 224 pixels takes 5 to 12 KB."""

REMEMBERED = 1024
"""Pictures kept in memory by `Pictures.get`."""

WORKERS = min(8, os.cpu_count() or 1)
"""Threads that decode. Each may hold half a gigabyte: the largest image that a run takes."""


class Pictures:
    """The pictures of one run. For one thread at a time, as `open_rgb` and `saecore.query.tables` are."""

    def __init__(self, run: Results, side: int = 224) -> None:
        self.run = run
        self.side = side
        """Pixels along the longer side; fewer if the crop has fewer."""
        self.get = functools.lru_cache(REMEMBERED)(self._get)
        """One picture by its image's number; None if there is none."""

    def size(self, image: Mapping[str, Any]) -> tuple[int, int]:
        """(width, height) in pixels of the picture of an `images` row."""
        left, top, right, bottom = (image[name] for name in CROP)
        scale = min(1.0, self.side / max(right - left, bottom - top))
        return max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))

    def read(self, image_ids: np.ndarray) -> Iterator[tuple[int, bytes | None]]:
        """Each image's number and picture, or None, chunk by chunk, so that a shard is opened once for all its images."""
        chunk_ids = self.run.tables.numbering.chunks_of(image_ids)
        for chunk_id in np.unique(chunk_ids):
            yield from self._of_chunk(image_ids[chunk_ids == chunk_id].tolist()).items()

    def _get(self, image_id: int) -> bytes | None:
        return next(picture for _, picture in self.read(np.array([image_id])))

    def _of_chunk(self, image_ids: list[int]) -> dict[int, bytes | None]:
        pictures = dict[int, bytes | None].fromkeys(image_ids)
        shown = self.run.tables.rows("images", image_ids, ("key", *CROP), pc.field("error").is_null()).to_pylist()
        images = {row["image_id"]: row for row in shown}
        with warnings.catch_warnings(), ThreadPoolExecutor(WORKERS) as pool:
            # `open_rgb` changes warnings for the whole process and restores them. Threads end in any order, so each must
            # restore the same state.
            warnings.simplefilter("ignore")
            for raw in self.run.tables.originals(list(images)):
                ids = raw["image_id"].to_pylist()
                pictures |= zip(
                    ids,
                    pool.map(self._picture, raw.to_pylist(), [images[image_id] for image_id in ids]),
                    strict=True,
                )
        return pictures

    def _picture(self, raw: Mapping[str, Any], image: Mapping[str, Any]) -> bytes | None:
        if raw["error"] is not None or raw["key"] != image["key"]:  # another key: the shard has changed
            return None
        try:
            whole = open_rgb(raw["data"]).image
        except ImageError:
            return None
        left, top, right, bottom = (image[name] for name in CROP)
        small = whole.crop((left, top, right, bottom)).resize(
            self.size(image), Image.Resampling.BICUBIC, reducing_gap=3
        )
        sink = io.BytesIO()
        small.save(sink, "WEBP", quality=QUALITY)
        return sink.getvalue()
