"""A sample of a run: every explained image may be drawn, no other; and the plan reads exactly the images that were drawn."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import explain
from saecore import numbering
from saecore.demo import drawing, scenes
from saecore.images.chunks import count_images, read_chunk
from saecore.judging import sample
from saecore.runs.files import open_dataset


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of loose images, two of them none, and a Parquet file; chunks of 4."""
    folder = tmp_path_factory.mktemp("mixed")
    pictures = [drawing.jpeg(scenes.scene_at(7, index), 64) for index in range(17)]
    (folder / "in" / "deep").mkdir(parents=True)
    for index, data in enumerate(pictures[:8]):
        (folder / "in" / "deep" / f"{index}.jpg").write_bytes(data)
    for name in ("3x.jpg", "zz.jpg"):
        (folder / "in" / "deep" / name).write_bytes(b"no image")
    pq.write_table(pa.table({"image": pa.array(pictures[8:], pa.binary())}), folder / "in" / "more.parquet")
    out = folder / "run"
    given = ["--images", str(folder / "in"), "--clip", "demo", "--sae", "demo", "--chunk-size", "4", "--local"]
    assert explain.main([*given, "--out", str(out)]) == 0
    return str(out)


def explained(run: str) -> dict[int, str]:
    rows = open_dataset(run, "images").to_table().to_pylist()
    return {row["image_id"]: row["key"] for row in rows if row["error"] is None}


def test_every_explained_image_may_be_drawn_and_no_other(run: str) -> None:
    known = explained(run)
    assert len(known) == 17
    assert sample.draw(run, 1000, seed=0).tolist() == sorted(known)
    drawn = [sample.draw(run, 5, seed) for seed in range(60)]
    assert all(len(set(ids.tolist())) == 5 for ids in drawn)
    assert all((np.diff(ids) > 0).all() for ids in drawn)
    counted = np.unique(np.concatenate(drawn), return_counts=True)
    assert counted[0].tolist() == sorted(known)
    assert 5 < counted[1].min() <= counted[1].max() < 35, "each is drawn in 5 of 17 samples"
    np.testing.assert_array_equal(drawn[3], sample.draw(run, 5, seed=3))


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_the_plan_reads_what_was_drawn(run: str, at_once: int) -> None:
    image_ids = sample.draw(run, 9, seed=1)
    plan = sample.plan_of(run, image_ids, at_once)
    assert plan["chunk_id"].to_pylist() == list(range(plan.num_rows))
    assert max(numbering.lengths(plan)) <= at_once
    assert count_images(plan) == 9
    read = [table for row in plan.to_pylist() for table in read_chunk(row, indices=row["only"])]
    images = pa.concat_tables(read)
    assert images["image_id"].to_pylist() == image_ids.tolist()
    known = explained(run)
    assert images["key"].to_pylist() == [known[image_id] for image_id in image_ids.tolist()]
    assert images["data"].null_count == 0
    ids = np.concatenate([numbering.ids_of(row) for row in plan.to_pylist()])
    assert ids.tolist() == image_ids.tolist()
