"""Numbers, chunks and places of images, against a list of every image of a plan."""

import numpy as np
import pyarrow as pa
import pytest

from saecore import schema
from saecore.numbering import MOST_IMAGES, MOST_SHARDS, Numbering, id_of, index_of, shard_of

# chunk_id, shard_id, start, end: shard 1 has no image, and shard 2 was cut by a limit.
CHUNKS = [(0, 0, 0, 3), (1, 0, 3, 4), (2, 2, 0, 3), (3, 2, 3, 5), (4, 7, 0, 1)]
EVERY = [(chunk, shard * 2**32 + index) for chunk, shard, start, end in CHUNKS for index in range(start, end)]
"""(chunk_id, image_id) of every image, in order."""


@pytest.fixture
def numbering() -> Numbering:
    fixed = {"uri": "a.tar", "kind": "tar", "bytes": 0, "mtime_ns": 0}
    rows = [dict(zip(("chunk_id", "shard_id", "start", "end"), chunk, strict=True)) | fixed for chunk in CHUNKS]
    return Numbering(pa.Table.from_pylist(rows, schema=schema.PLAN))


def test_a_number_is_shard_and_index_and_fits_64_bits() -> None:
    for shard, index in ((0, 0), (0, 7), (3, 0), (MOST_SHARDS - 1, MOST_IMAGES - 1)):
        image_id = id_of(shard, index)
        assert image_id == shard * 2**32 + index <= 2**63 - 1
        assert (shard_of(image_id), index_of(image_id)) == (shard, index)
    assert id_of(np.array([0, 2]), np.array([5, 1])).tolist() == [5, 2**33 + 1]


def test_every_image_has_its_chunk_its_place_and_its_neighbours(numbering: Numbering) -> None:
    chunks, image_ids = zip(*EVERY, strict=True)
    assert numbering.n_images == len(EVERY)
    assert numbering.chunks_of(image_ids).tolist() == list(chunks)
    assert numbering.image_ids(range(len(EVERY))).tolist() == list(image_ids)
    assert numbering.places(image_ids).tolist() == list(range(len(EVERY)))
    around = [None, *image_ids, None]
    for place, image_id in enumerate(image_ids):
        assert numbering.neighbours(image_id) == (around[place], around[place + 2])


def test_an_image_of_another_plan_has_the_nearest_chunk(numbering: Numbering) -> None:
    assert numbering.chunks_of([-1, 2**32 + 5, 2**40]).tolist() == [0, 1, 4]
