"""Small pictures of a run's images: read from the shards they came from, cut to what CLIP saw, as WebP.

Only the images asked for are read. One that cannot be had any more, because its shard is gone, out of reach or another one
by now, has no picture; that is never an error.
"""

import functools
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from saecore.images.chunks import read_chunk
from saecore.images.decode import ImageError, open_rgb
from saecore.numbering import index_of
from saecore.query.results import Results
from saecore.runs.files import read_plan

CROP = ("crop_left", "crop_top", "crop_right", "crop_bottom")

QUALITY = 82
"""Of WebP: 5 to 12 KB for a photograph of 224 pixels."""

REMEMBERED = 1024
"""Pictures kept in memory by `Pictures.get`."""

READ_BYTES = 16 << 20
"""Of encoded images at once, which are decoded side by side."""

WORKERS = min(8, os.cpu_count() or 1)
"""Threads that decode. Each may hold half a gigabyte: the largest image that a run takes."""


class Pictures:
    """The pictures of one run. For one thread at a time, as `open_rgb` and `saecore.query.tables` are."""

    def __init__(self, run: Results, side: int = 224) -> None:
        self.run = run
        self.side = side
        """Pixels along the longer side; fewer where the crop has fewer."""
        self._plan = read_plan(run.uri)
        self.get = functools.lru_cache(REMEMBERED)(self._get)
        """One picture by its image's number; None if there is none."""

    def size(self, image: Mapping[str, Any]) -> tuple[int, int]:
        """(width, height) in pixels of the picture of an `images` row."""
        left, top, right, bottom = (image[name] for name in CROP)
        scale = min(1.0, self.side / max(right - left, bottom - top))
        return max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))

    def read(self, image_ids: np.ndarray) -> Iterator[tuple[int, bytes | None]]:
        """Each image's number and picture, None if there is none; chunk by chunk, so that a shard is opened once for all."""
        held = self.run.tables.numbering.chunks_of(image_ids)
        of_run = self._plan.filter(pc.is_in(self._plan["chunk_id"], pa.array(np.unique(held))))
        for chunk in of_run.to_pylist():
            found: dict[int, bytes | None] = dict.fromkeys(image_ids[held == chunk["chunk_id"]].tolist())
            found |= self._of_chunk(chunk, list(found))
            yield from found.items()

    def _get(self, image_id: int) -> bytes | None:
        return next(picture for _, picture in self.read(np.array([image_id])))

    def _of_chunk(self, chunk: Mapping[str, Any], image_ids: list[int]) -> dict[int, bytes | None]:
        shown = self.run.tables.rows("images", image_ids, ("key", *CROP), pc.field("error").is_null()).to_pylist()
        images = {row["image_id"]: row for row in shown}
        wanted = {index_of(image_id) for image_id in images}
        found = dict[int, bytes | None]()
        with warnings.catch_warnings(), ThreadPoolExecutor(WORKERS) as pool:
            # `open_rgb` does the same, for the whole process: threads that end in any order must all leave it so.
            warnings.simplefilter("ignore")
            try:
                for raw in read_chunk(chunk, batch_bytes=READ_BYTES, indices=wanted):
                    ids, rows = raw["image_id"].to_pylist(), raw.to_pylist()
                    pictures = pool.map(self._picture, rows, [images[image_id] for image_id in ids])
                    found |= zip(ids, pictures, strict=True)
            except OSError:
                pass  # the storage does not answer
        return found

    def _picture(self, raw: Mapping[str, Any], image: Mapping[str, Any]) -> bytes | None:
        if raw["error"] is not None or raw["key"] != image["key"]:  # the latter: the shard has changed since
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
