"""What is told of changed inputs is what was changed, and nothing else."""

import os
from pathlib import Path

import pytest

from saecore.images.changes import Changes, since
from saecore.images.chunks import empty_shards, plan_chunks
from saecore.images.listing import Shard, list_shards
from saecore.pipeline.growth import divide, groups_of, grown, new_chunks
from saecore.schema import growths_of
from tests.images.test_chunks import PICTURES, make, write_tar


def inputs(folder: Path) -> list[Shard]:
    return list_shards([str(folder)], files_per_shard=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tars with images, one without, and ten loose images in three groups."""
    make(tmp_path, *(f"p/{index}.jpg" for index in range(10)))
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", PICTURES)
    write_tar(tmp_path / "empty.tar", [("note.txt", b"no image")])
    return tmp_path


def test_nothing_changes_by_itself(folder: Path) -> None:
    plan = plan_chunks(inputs(folder), chunk_size=3)
    assert empty_shards(plan) == [f"{folder}/empty.tar"]
    assert since(plan, inputs(folder), is_limited=False) == Changes([], [], [])
    assert str(since(plan, inputs(folder), is_limited=False)) == ""
    assert since(plan, list_shards([str(folder)]), is_limited=False) == Changes([], [], [])  # grouped otherwise


def test_shards_and_loose_images_are_told_by_name(folder: Path) -> None:
    plan = plan_chunks(inputs(folder), chunk_size=3)
    (folder / "a.tar").unlink()
    (folder / "p" / "3.jpg").unlink()
    make(folder, "c.tar", "p/new.jpg")
    os.utime(folder / "b.tar", ns=(1, 1))
    found = since(plan, inputs(folder), is_limited=False)
    assert found == Changes(
        gone=[f"{folder}/p/3.jpg", f"{folder}/a.tar"],
        new=[f"{folder}/p/new.jpg", f"{folder}/c.tar"],
        changed=[f"{folder}/b.tar"],
    )
    assert str(found) == (
        f"2 no longer listed ({folder}/p/3.jpg, {folder}/a.tar), 2 new ({folder}/p/new.jpg, {folder}/c.tar), "
        f"1 changed in size or time ({folder}/b.tar)"
    )


def test_an_image_of_a_folder_that_changes_changes_the_folder(folder: Path) -> None:
    plan = plan_chunks(inputs(folder), chunk_size=3)
    (folder / "p" / "9.jpg").write_bytes(b"longer than before")
    assert since(plan, inputs(folder), is_limited=False) == Changes([], [], [str(folder)])


def test_a_folder_that_is_gone_is_told_by_its_first_images(folder: Path) -> None:
    plan = plan_chunks(inputs(folder), chunk_size=3)
    found = since(plan, [], is_limited=False)
    assert len(found.gone) == 12
    assert str(found).startswith(f"12 no longer listed ({folder}/p/0.jpg, {folder}/p/1.jpg, {folder}/p/2.jpg, ..)")


def test_a_limited_plan_does_not_know_what_is_new(folder: Path) -> None:
    plan = plan_chunks(inputs(folder), chunk_size=3, limit=6)
    make(folder, "c.tar")
    assert since(plan, inputs(folder), is_limited=True) == Changes([], [], [])
    (folder / "p" / "0.jpg").unlink()
    assert since(plan, inputs(folder), is_limited=True).gone == [f"{folder}/p/0.jpg"]


def test_a_plan_grows_after_its_last_number_and_keeps_its_rows(folder: Path) -> None:
    """New names between the old ones, one old name gone: groups of the plan stay, and the new ones make groups of their own."""
    plan = plan_chunks(inputs(folder), chunk_size=3)
    make(folder, "aa.tar", *(f"p/{index}5.jpg" for index in range(5)))
    write_tar(folder / "bare.tar", [("note.txt", b"no image")])
    (folder / "p" / "3.jpg").unlink()
    groups = groups_of(plan)
    known, new = divide(plan, list_shards([str(folder)], files_per_shard=4, groups=groups), groups)
    assert sorted(len(shard.members or []) for shard in known) == [0, 0, 0, 2, 3, 4]
    assert [shard.members for shard in new if shard.members] == [[f"p/{n}5.jpg" for n in range(4)], ["p/45.jpg"]]
    chunks = new_chunks(plan, new, chunk_size=3)
    whole = grown(plan, chunks, {"time": "now"})
    assert whole.slice(0, plan.num_rows).equals(plan.replace_schema_metadata(whole.schema.metadata))
    after = whole.slice(plan.num_rows).to_pylist()
    assert [row["chunk_id"] for row in after] == list(range(plan.num_rows, whole.num_rows))
    assert {row["shard_id"] for row in after} == {max(plan["shard_id"].to_pylist()) + number for number in (1, 2, 3)}
    assert empty_shards(whole) == [f"{folder}/empty.tar", f"{folder}/bare.tar"]
    told = {"shards": 3, "chunks": len(after), "images": sum(row["end"] - row["start"] for row in after)}
    assert growths_of(whole) == [{"time": "now", **told, "first_chunk": plan.num_rows}]
    listed = list_shards([str(folder)], files_per_shard=4, groups=groups_of(whole))
    assert divide(whole, listed, groups_of(whole)).new == []
    assert since(whole, listed, is_limited=False) == Changes([f"{folder}/p/3.jpg"], [], [])
