"""A run that grew is the run that was made at once; rows that were there stay as they are, whenever it is stopped."""

import functools
import io
import itertools
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import embed, explain, origin, run
from saecore import storage
from saecore.demo import drawing, scenes
from saecore.query import results
from saecore.report.holdings import holdings
from saecore.runs.files import read_plan
from saecore.runs.record import read_record
from saecore.schema import growths_of
from saecore.towers import loading
from tests.helpers.mistakes import mistake

BEFORE, AFTER = ("c", "m"), ("a", "k", "z")
"""Shards of before, and shards and images that come later; in the order of names new ones lie between and around them."""


class KilledError(BaseException):
    """The process ends here: nothing may catch it."""


def pictures(name: str) -> dict[str, bytes]:
    """Three images, others for each letter."""
    first = 10 * ord(name)
    return {f"{name}{number}.jpg": drawing.jpeg(scenes.scene_at(7, first + number), 96) for number in range(3)}


def as_tar(folder: Path, name: str) -> None:
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for key, data in pictures(name).items():
            member = tarfile.TarInfo(key)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def as_parquet(folder: Path, name: str) -> None:
    held = [{"bytes": data, "path": key} for key, data in pictures(name).items()]
    pq.write_table(pa.table({"image": held}), folder / f"{name}.parquet")


def as_folder(folder: Path, name: str) -> None:
    for key, data in pictures(name).items():
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / key).write_bytes(data)


KINDS: dict[str, Callable[[Path, str], None]] = {"tar": as_tar, "parquet": as_parquet, "folder": as_folder}


def command(images: Path, out: Path, *more: str) -> list[str]:
    """Batches of one image: how images are grouped to batches must not round their rows otherwise."""
    fixed = ["--clip", "demo", "--chunk-size", "2", "--batch-size", "1", "--local"]
    return ["--images", str(images), "--out", str(out), *fixed, *more]


def explaining(images: Path, out: Path, *more: str) -> list[str]:
    return command(images, out, "--sae", "demo", "--k", "4", "--keep-embeddings", *more)


def inputs(folder: Path, kind: str, names: tuple[str, ...]) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        KINDS[kind](folder, name)
    return folder


def rows(run: Path, names: tuple[str, ...] = ("images", "activations", "maps")) -> dict[str, list[tuple[Any, ...]]]:
    """Every table of the manifest, sorted, with the place and the key of an image for its number; values as they are stored."""
    manifest = pq.read_table(run / "manifest.parquet").to_pylist()
    held = {}
    for name in names:
        files = [str(run / row["path"]) for row in manifest if row["table"] == name]
        images = [str(run / row["path"]) for row in manifest if row["table"] == "images"]
        query = f"""SELECT images.uri, images.key, of.* EXCLUDE (image_id)
            FROM read_parquet({files}) AS of JOIN read_parquet({images}) AS images USING (image_id) ORDER BY ALL"""
        held[name] = [tuple(map(repr, row)) for row in duckdb.sql(query).fetchall()]
    return held


def files(run: Path) -> dict[str, bytes]:
    tables = [run / name for name in ("images", "activations", "maps", "commits")]
    return {path.relative_to(run).as_posix(): path.read_bytes() for table in tables for path in table.glob("*")}


def test_a_run_resizes_its_images_as_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scenes of 96 pixels are resized to 64, so `fast` and `exact` are two results."""
    folder, fast, exact = inputs(tmp_path / "in", "folder", BEFORE), tmp_path / "fast", tmp_path / "exact"
    assert explain.main(explaining(folder, fast)) == 0
    assert read_record(str(fast)).parts["resize"] == "fast"
    assert explain.main(explaining(folder, exact, "--resize", "exact")) == 0
    assert "resize" not in read_record(str(exact)).parts  # as in runs of before `fast`
    assert "(resize was None, now 'fast')" in mistake(
        explain.main, explaining(folder, exact, "--resize", "fast"), capsys
    )

    inputs(folder, "folder", AFTER)
    for out in (fast, exact):
        assert explain.main(explaining(folder, out, "--grow")) == 0
        whole = tmp_path / f"{out.name}-whole"
        assert explain.main(explaining(folder, whole, "--resize", out.name)) == 0
        assert rows(out) == rows(whole)
    assert rows(fast) != rows(exact)

    for name in ("jobs.decoding.can_be_fast", "saecore.images.preprocess.can_be_fast"):
        monkeypatch.setattr(name, lambda: False)
    assert "--resize 'quick': must be one of auto, fast, exact" in mistake(
        explain.main, explaining(folder, tmp_path / "new", "--resize", "quick"), capsys
    )
    needs = "the package cykooz.resizer, which is not installed here"
    assert needs in mistake(explain.main, explaining(folder, fast), capsys)
    assert needs in mistake(explain.main, explaining(folder, tmp_path / "new", "--resize", "fast"), capsys)
    assert explain.main(explaining(folder, exact)) == 0
    assert explain.main(explaining(folder, tmp_path / "new", "--dry-run")) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_grew_twice_is_the_run_made_at_once(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out, whole = inputs(tmp_path / "in", kind, BEFORE), tmp_path / "grown", tmp_path / "whole"
    assert explain.main(explaining(folder, out, "--grow")) == 0  # nothing there yet: the run begins
    begun, before = read_record(str(out)), files(out)
    numbers = {row["key"]: row["image_id"] for row in results.open(str(out)).sql("FROM images").to_pylist()}
    inputs(folder, kind, AFTER[:2])
    assert "--grow takes them in" in mistake(explain.main, explaining(folder, out), capsys)
    assert explain.main(explaining(folder, out, "--grow", "--dry-run")) == 0
    assert f"would explain 6 images of {1 if kind == 'folder' else 2} shards in" in capsys.readouterr().out
    assert explain.main(explaining(folder, out, "--grow")) == 0
    assert "grows by 6 images in" in capsys.readouterr().out
    inputs(folder, kind, AFTER[2:])
    assert explain.main(explaining(folder, out, "--grow")) == 0
    capsys.readouterr()
    assert explain.main(explaining(folder, out)) == 0
    said = capsys.readouterr().out
    assert "is complete: nothing to do" in said
    assert "changed" not in said
    assert explain.main(explaining(folder, whole)) == 0

    assert rows(out) == rows(whole)
    assert len(rows(out)["images"]) == 15
    assert before.items() <= files(out).items()
    run, record, at_once = results.open(str(out)), read_record(str(out)), read_record(str(whole))
    later = {row["key"]: row["image_id"] for row in run.sql("FROM images").to_pylist()}
    assert numbers.items() <= later.items()
    assert all(number > max(numbers.values()) for key, number in later.items() if key not in numbers)
    assert (record.images, record.rows, record.refused) == (at_once.images, at_once.rows, at_once.refused)
    assert (record.fingerprint, record.parts) == (begun.fingerprint, begun.parts)
    assert [(growth["images"], growth["inputs"]) for growth in record.growths] == [
        (6, [str(folder)]),
        (3, [str(folder)]),
    ]
    assert [run.tables.numbering.neighbours(number)[1] for number in sorted(later.values())] == [
        *sorted(later.values())[1:],
        None,
    ]
    last = max(later, key=lambda key: later[key])
    assert run.picture(last) == pictures("z")["z2.jpg"]


def killing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that says before which of the writes to come the process is killed; 0 is none.

    Many jobs follow, so what takes most of their time is done once.
    """
    for owner, name in ((loading, "load_tower"), (origin, "versions")):
        monkeypatch.setattr(owner, name, functools.cache(getattr(owner, name)))
    write, left = storage.atomic_file, [0]

    def atomic_file(target: Path) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KilledError
        return write(target)

    monkeypatch.setattr(storage, "atomic_file", atomic_file)
    return lambda number: left.__setitem__(0, number)


def ends_by_kill(job: Callable[[list[str]], int], argv: list[str]) -> bool:
    """Whether a job is killed; otherwise it must end well."""
    try:
        assert job(argv) == 0
    except KilledError:
        return True
    return False


def test_wherever_growing_is_stopped_the_old_run_stays_readable_and_the_same_command_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its first write, before its second, and so on."""
    folder, begun = inputs(tmp_path / "in", "folder", BEFORE[:1]), tmp_path / "begun"
    assert explain.main(explaining(folder, begun)) == 0
    old = rows(begun)
    inputs(folder, "folder", AFTER[:1])
    assert explain.main(explaining(folder, tmp_path / "whole")) == 0
    whole = rows(tmp_path / "whole")
    kill_at = killing(monkeypatch)
    for number in itertools.count(1):
        out = Path(shutil.copytree(begun, tmp_path / f"run{number}"))
        kill_at(number)
        is_killed = ends_by_kill(explain.main, explaining(folder, out, "--grow"))
        kill_at(0)
        if is_killed:
            run, seen = results.open(str(out)), rows(out)
            assert seen in (old, whole)
            assert run.tables.numbering.n_images == len(seen["images"]) == run.sql("FROM images").num_rows
            # Once the plan has grown, the command without the flag goes on too.
            has_grown = number % 2 and growths_of(read_plan(str(out)))
            assert explain.main(explaining(folder, out, *([] if has_grown else ["--grow"]))) == 0
        assert rows(out) == whole
        record = read_record(str(out))
        assert (record.images, len(record.growths), sum(record.rows.values())) == (6, 1, sum(map(len, whole.values())))
        if not is_killed:
            break
    assert number > 12  # try, plan, four files for each of two chunks, manifest, card, record


def test_a_run_that_is_not_complete_grows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = inputs(tmp_path / "in", "tar", BEFORE), tmp_path / "run"
    kill_at = killing(monkeypatch)
    kill_at(8)
    with pytest.raises(KilledError):
        explain.main(explaining(folder, out))
    kill_at(0)
    inputs(folder, "tar", AFTER[:1])
    assert explain.main(explaining(folder, out, "--grow")) == 0
    assert explain.main(explaining(folder, tmp_path / "whole")) == 0
    assert rows(out) == rows(tmp_path / "whole")


def test_a_run_of_embeddings_grows_by_other_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its memory map is written again with all rows; what was there before is not needed any more."""
    one, two, out = (
        inputs(tmp_path / "one", "parquet", ("m",)),
        inputs(tmp_path / "two", "tar", ("a",)),
        tmp_path / "run",
    )
    assert embed.main(command(one, out)) == 0
    for path in one.iterdir():
        path.unlink()
    capsys.readouterr()
    assert embed.main(command(two, out, "--grow")) == 0
    said = capsys.readouterr().out
    assert f"changed since the run was made: 1 no longer listed ({one}/m.parquet)" in said
    assert "grows by 3 images in 2 chunks" in said
    embedded = {row["key"]: row["embedding"] for row in pq.read_table(out / "images").to_pylist()}
    assert sorted(embedded) == sorted([*pictures("m"), *pictures("a")])
    maps = {path.name: np.fromfile(path, np.float32) for path in out.glob("*.npy")}
    assert len(maps) == 2
    in_order = np.array([embedded[key] for key in [*pictures("m"), *pictures("a")]], np.float32)
    assert any(np.array_equal(held, in_order.ravel()) for held in maps.values())
    assert embed.main(command(two, out)) == 0
    assert "--grow takes in all images" in mistake(embed.main, command(two, out, "--grow", "--limit", "3"), capsys)


def test_what_changed_in_a_folder_that_grows_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = inputs(tmp_path / "in", "folder", BEFORE), tmp_path / "run"
    assert explain.main(explaining(folder, out)) == 0
    inputs(folder, "folder", AFTER[:1])
    (folder / "deep" / "m2.jpg").write_bytes(b"something else")
    capsys.readouterr()
    assert explain.main(explaining(folder, out, "--grow")) == 0
    said = capsys.readouterr().out
    assert f"inputs have changed since the run was made: 1 changed in size or time ({folder})" in said
    assert "grows by 3 images" in said
    (folder / "deep" / "c1.jpg").unlink()
    assert explain.main(explaining(folder, out)) == 0
    assert f"1 no longer listed ({folder}/deep/c1.jpg)" in capsys.readouterr().out


@pytest.mark.slow
def test_index_names_and_pages_follow(tmp_path: Path) -> None:
    """All steps in one command, before and after; the segment of before stays, and the whole is what is made at once."""
    folder, out, whole = inputs(tmp_path / "in", "tar", BEFORE), tmp_path / "grown", tmp_path / "whole"
    assert run.main(explaining(folder, out)) == 0
    segment = {path: path.read_bytes() for path in (out / "by_latent").glob("*.parquet")}
    inputs(folder, "tar", AFTER)
    assert explain.main(explaining(folder, out, "--grow")) == 0
    stale = results.open(str(out))
    assert sorted({*stale.tables.not_indexed.tolist()}) == [4, 5, 6, 7, 8, 9]
    assert "6 chunks that came after it" in [of.missing for of in holdings(stale)]
    assert run.main(explaining(folder, out, "--grow")) == 0
    assert run.main(explaining(folder, whole)) == 0
    assert segment.items() <= {path: path.read_bytes() for path in (out / "by_latent").glob("*.parquet")}.items()
    grown, at_once = results.open(str(out)), results.open(str(whole))
    assert grown.tables.index is not None
    assert len(grown.tables.index.segments) == 2
    key = "(SELECT key FROM images WHERE images.image_id = of.image_id)"
    query = f"SELECT {key} AS key, of.* EXCLUDE (image_id) FROM by_latent AS of ORDER BY ALL"
    for run_of in (stale, grown):
        assert run_of.sql(query).equals(at_once.sql(query))
    compared = ["latent", "images", "rate", "dead", "max", "median", "maps", "top_activations", "name", "valid"]
    assert grown.latents.select(compared).equals(at_once.latents.select(compared))
    assert (out / "report" / "index.html").stat().st_mtime_ns > (out / "run.json").stat().st_mtime_ns
    assert "15 images" in (out / "report" / "index.html").read_text()
