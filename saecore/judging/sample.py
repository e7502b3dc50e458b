"""A sample of the images of a run: which are judged, and the plan by which they are read.

Every image that the run explained is as likely as any other. The plan has the chunks of the run in pieces of a few images,
which the column `only` names. Different workers read pieces of one chunk, each from the beginning of the chunk.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saecore import schema
from saecore.numbering import Numbering, index_of
from saecore.runs.files import read_plan, scan_table


def draw(uri: str, n: int, seed: int) -> np.ndarray:
    """The numbers of n images of a complete run, or of all that it has, int64, rising; images that were refused are none."""
    explained = [
        batch["image_id"].filter(pc.is_null(batch["error"])).to_numpy()
        for batch in scan_table(uri, "images", ["image_id", "error"])
    ]
    image_ids = np.concatenate([*explained, np.zeros(0, np.int64)])
    drawn = np.random.default_rng(seed).choice(len(image_ids), min(n, len(image_ids)), replace=False)
    return np.sort(image_ids[drawn])


def plan_of(uri: str, image_ids: np.ndarray, at_once: int) -> pa.Table:
    """schema.PART: the chunks of a run that hold these images, in pieces of at most `at_once` images, with ids of their own."""
    plan = read_plan(uri)
    chunk_ids = Numbering(plan).chunks_of(image_ids)
    held = plan.filter(pc.is_in(plan["chunk_id"], pa.array(np.unique(chunk_ids))))
    rows = {row["chunk_id"]: row for row in held.to_pylist()}
    pieces = []
    for chunk_id, row in rows.items():
        indices = index_of(image_ids[chunk_ids == chunk_id]).tolist()
        pieces += [row | {"only": indices[at : at + at_once]} for at in range(0, len(indices), at_once)]
    return pa.Table.from_pylist(
        [piece | {"chunk_id": number} for number, piece in enumerate(pieces)], schema=schema.PART
    )
