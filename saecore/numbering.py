"""The number of an image, the chunk that holds it, and its place in the order of a run.

    image_id = shard_id << 32 | index        index: position of the image in its shard, from 0

The shards of a plan are cut into chunks in order, so that image_id rises from chunk to chunk and inside each. Which chunk
holds an image, and which image comes next, is therefore arithmetic on the plan; no table of images is read. Refused images
have numbers and places like the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

INDEX_BITS = 32

MOST_IMAGES = 1 << INDEX_BITS
"""Of a shard, one more than it may have."""

MOST_SHARDS = 1 << 63 - INDEX_BITS
"""Of a plan, one more than it may have: image_id is a signed integer of 64 bits."""

Number = TypeVar("Number", int, np.ndarray)


def id_of(shard_id: Number, index: Number) -> Number:
    """The image_id of the image at this position of the shard."""
    return shard_id << INDEX_BITS | index


def shard_of(image_id: Number) -> Number:
    """The shard_id of an image."""
    return image_id >> INDEX_BITS


def index_of(image_id: Number) -> Number:
    """The position of an image in its shard."""
    return image_id & MOST_IMAGES - 1


def lengths(plan: pa.Table) -> np.ndarray:
    """How many images each chunk of a plan stands for, int64 (chunks,): all from its start to its end or, in a plan with the
    column `only`, those."""
    if "only" in plan.column_names:
        return pc.list_value_length(plan["only"]).to_numpy().astype(np.int64)
    return plan["end"].to_numpy() - plan["start"].to_numpy()


def ids_of(chunk: Mapping[str, Any]) -> np.ndarray:
    """The numbers of the images that a row of a plan stands for, int64, in their order."""
    only = chunk.get("only")
    indices = np.arange(chunk["start"], chunk["end"]) if only is None else np.array(only, np.int64)
    return id_of(chunk["shard_id"], indices)


class Numbering:
    """The images of one plan: their numbers, their chunks, and their places from 0 in the order of the plan."""

    def __init__(self, plan: pa.Table) -> None:
        start, end = plan["start"].to_numpy(), plan["end"].to_numpy()
        first_ids = id_of(plan["shard_id"].to_numpy(), start)
        order = np.argsort(first_ids)
        lengths = (end - start)[order]
        self.n_images = int(lengths.sum())
        self._first_ids = first_ids[order]
        self._first_places = np.cumsum(lengths) - lengths
        self._chunk_ids = plan["chunk_id"].to_numpy()[order]

    def chunks_of(self, image_ids: Sequence[int] | pa.ChunkedArray | np.ndarray) -> np.ndarray:
        """The chunk_id of each of some images; of the nearest chunk for an image that is not of this plan."""
        return self._chunk_ids[self._rows(image_ids)]

    def image_ids(self, places: Sequence[int] | np.ndarray) -> np.ndarray:
        """The numbers of the images at some places."""
        rows = np.searchsorted(self._first_places, places, "right") - 1
        return self._first_ids[rows] + (np.asarray(places, np.int64) - self._first_places[rows])

    def places(self, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The places of some images of this plan."""
        rows = self._rows(image_ids)
        return self._first_places[rows] + (np.asarray(image_ids, np.int64) - self._first_ids[rows])

    def neighbours(self, image_id: int) -> tuple[int | None, int | None]:
        """The images before and after this one; None where there is none."""
        place = int(self.places([image_id])[0])
        before, after = (
            int(self.image_ids([other])[0]) if 0 <= other < self.n_images else None for other in (place - 1, place + 1)
        )
        return before, after

    def _rows(self, image_ids: Sequence[int] | pa.ChunkedArray | np.ndarray) -> np.ndarray:
        return np.maximum(np.searchsorted(self._first_ids, np.asarray(image_ids, np.int64), "right") - 1, 0)
