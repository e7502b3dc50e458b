"""What was refused since it was away is read again once it is back: the run is then that of an undisturbed job."""

import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import collection, embed, explain, index, retry
from saecore.hub import DEMO_CLIP
from saecore.query import results
from saecore.runs.files import open_dataset
from saecore.runs.record import read_record
from saecore.runs.run import run_at
from tests.helpers.mistakes import mistake
from tests.jobs.test_growth import command, ends_by_kill, explaining, inputs, killing, rows

LOST = ["deep/c1.jpg", "deep/m0.jpg", "t.tar"]
"""Two loose images of two chunks, and all three images of a tar."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Loose images, of which one is none, and a tar."""
    made = inputs(inputs(tmp_path / "in", "folder", ("c", "m")), "tar", ("t",))
    (made / "deep" / "x.jpg").write_bytes(b"no image")
    return made


def while_away(job: Callable[[list[str]], int], argv: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose inputs `LOST` are away from the moment when the plan is there until it ends."""
    away, begin = folder.parent / "away", collection.begin_run

    def begin_run(*given: Any) -> Any:
        run = begin(*given)
        for name in LOST:
            (away / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(folder / name, away / name)
        return run

    with monkeypatch.context() as patch:
        patch.setattr(collection, "begin_run", begin_run)
        assert job(argv) == 0
    for name in LOST:
        shutil.move(away / name, folder / name)


def of_run(out: Path) -> tuple[Any, ...]:
    record = read_record(str(out))
    return (
        record.images,
        record.refused,
        record.rows,
        record.bytes,
        record.fit,
        record.lost,
        record.worst_completeness_error,
    )


def test_images_that_are_back_get_their_rows_and_no_others_are_touched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert explain.main(explaining(folder, whole)) == 0
    while_away(explain.main, explaining(folder, out), folder, monkeypatch)
    assert read_record(str(out)).refused == {"missing-file": 2, "not-an-image": 1, "damaged-shard": 3}
    assert index.main(["--run", str(out)]) == 0
    capsys.readouterr()

    assert retry.main([str(out), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("to read again: 5 images of 4 chunks (missing-file, unreadable, ")
    assert retry.main([str(out), "--reason", "not-an-image,unheard-of", "--dry-run"]) == 0
    assert capsys.readouterr().out == "to read again: 1 images of 1 chunks (not-an-image, unheard-of)\n"
    tar = (folder / "t.tar").read_bytes()
    (folder / "t.tar").write_bytes(tar + bytes(512))
    assert retry.main([str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        f"passed over 1 shards that are gone, or have changed in size ({folder}/t.tar)\nto read again: 2 images"
    )
    (folder / "t.tar").write_bytes(tar)
    for name in ("deep/c0.jpg", "deep/c2.jpg"):
        (folder / name).unlink()  # fine before: their rows need them no more
    assert retry.main([str(out), "--reason", "missing-file"]) == 0
    said = capsys.readouterr().out
    assert "regained      2 of 2 images" in said
    assert read_record(str(out)).refused == {"not-an-image": 1, "damaged-shard": 3}
    stale = results.open(str(out))
    assert stale.tables.index is not None
    assert stale.tables.index.segments == []  # the chunks of its one segment are others now
    assert retry.main([str(out)]) == 0
    assert "regained      3 of 3 images" in capsys.readouterr().out

    assert rows(out) == rows(whole)
    assert of_run(out)[:3] == of_run(whole)[:3]
    assert of_run(out)[4:] == of_run(whole)[4:]
    assert len({path.name[:14] for path in (out / "images").iterdir()}) == len(list((out / "images").iterdir())) == 6
    for path in (out / "maps").iterdir():
        assert pq.read_schema(path).metadata == pq.read_schema(whole / "maps" / f"{path.name[:14]}.parquet").metadata
    assert index.main(["--run", str(whole)]) == index.main(["--run", str(out)]) == 0
    again, at_once = results.open(str(out)), results.open(str(whole))
    query = "SELECT * FROM by_latent ORDER BY ALL"
    assert stale.uri == again.uri
    assert again.sql(query).equals(at_once.sql(query))
    assert again.latents.equals(at_once.latents)
    capsys.readouterr()
    assert retry.main([str(out)]) == 0
    assert capsys.readouterr().out.startswith("to read again: 0 images of 0 chunks (missing-file")
    assert explain.main([*explaining(folder, out)]) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out


def test_wherever_it_is_stopped_each_image_has_one_row_and_the_same_command_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, whole = tmp_path / "begun", tmp_path / "whole"
    (folder / "deep" / "m0.jpg").unlink()  # a chunk less
    monkeypatch.setattr(sys.modules[__name__], "LOST", LOST[::2])
    assert explain.main(explaining(folder, whole)) == 0
    while_away(explain.main, explaining(folder, begun), folder, monkeypatch)
    old, new = rows(begun), rows(whole)
    kill_at = killing(monkeypatch)
    for number in itertools.count(1):
        out = Path(shutil.copytree(begun, tmp_path / f"run{number}"))
        kill_at(number)
        is_killed = ends_by_kill(retry.main, [str(out)])
        kill_at(0)
        if is_killed:
            assert rows(out) in (old, new)
            run = run_at(str(out))
            assert run is not None
            assert run.pending().num_rows == 0
            assert sum(commit.images for commit in run.commits()) == 9
            assert retry.main([str(out)]) == 0
        assert rows(out) == new
        assert of_run(out)[:3] == of_run(whole)[:3]
        assert [len(list((out / table).iterdir())) for table in ("images", "maps", "commits")] == [5, 5, 5]
        if not is_killed:
            break
    assert number > 14  # try, four files for each of three chunks, manifest, card, record


@pytest.mark.parametrize("where", ["--local", "--ray"])
def test_a_run_of_embeddings(
    where: str,
    ray_session: None,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    # All on Ray, or nothing: another number of threads rounds the last bit otherwise.
    for_whole, for_run = (
        [where if word == "--local" else word for word in command(folder, run)] for run in (whole, out)
    )
    assert embed.main(for_whole) == 0
    while_away(embed.main, for_run, folder, monkeypatch)
    assert retry.main([str(out), where]) == 0
    assert rows(out, ("images",)) == rows(whole, ("images",))
    assert "    # says that the run is complete, and writes its memory map" in capsys.readouterr().out
    assert embed.main(command(folder, out)) == 0
    held = [
        {path.name.split("_")[-1]: np.fromfile(path, np.float32) for path in run.glob("*.npy")} for run in (out, whole)
    ]
    [(name, whole_map)] = held[1].items()
    assert np.array_equal(held[0][name], whole_map)


def test_tokens_that_are_drawn_again_are_those_of_an_undisturbed_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And none of the images that were fine before is drawn otherwise."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    site = ["--site", "layer1.residual:patches", "--tokens-per-image", "3", "--seed", "5"]
    assert embed.main(command(folder, whole, *site)) == 0
    while_away(embed.main, command(folder, out, *site), folder, monkeypatch)
    assert rows(out, ("images",)) != rows(whole, ("images",))
    capsys.readouterr()
    assert retry.main([str(out), "--local"]) == 0
    said = capsys.readouterr().out
    assert "regained      5 of 5 images" in said
    assert "memory map" not in said
    assert "--latents LATENTS" in said
    assert rows(out, ("images",)) == rows(whole, ("images",))
    tokens = [row["tokens"] for row in open_dataset(str(out), "images").to_table().to_pylist() if row["error"] is None]
    assert {len(drawn) for drawn in tokens} == {3}
    assert len({tuple(drawn) for drawn in tokens}) > 3


def test_what_a_gpu_ran_in_bfloat16_is_retried_in_bfloat16_on_a_cpu(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planted: a run in bfloat16 whose record has the configuration of a run on a GPU, which was asked for nothing."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert explain.main([*explaining(folder, whole), "--precision", "bfloat16"]) == 0
    while_away(explain.main, [*explaining(folder, out), "--precision", "bfloat16"], folder, monkeypatch)
    record = out / "run.json"
    asked = '"precision": "bfloat16"'
    assert record.read_text().count(asked) == 1
    record.write_text(record.read_text().replace(asked, '"precision": "auto"'))
    assert retry.main([str(out)]) == 0
    assert "regained      5 of 5 images" in capsys.readouterr().out
    assert rows(out) == rows(whole)


def test_mistakes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, clip = tmp_path / "run", Path(shutil.copytree(DEMO_CLIP, tmp_path / "clip"))
    assert "holds no run" in mistake(retry.main, [str(out)], capsys)
    while_away(embed.main, [*command(folder, out), "--clip", str(clip)], folder, monkeypatch)
    assert "--reason names none" in mistake(retry.main, [str(out), "--reason", " ,"], capsys)
    clip.rename(tmp_path / "moved")
    said = mistake(retry.main, [str(out)], capsys)
    assert said.startswith(f"the models that made {out} are needed again: {clip}")
    (tmp_path / "moved").rename(clip)
    weights = clip / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = mistake(retry.main, [str(out)], capsys)
    assert said.startswith(f"{out} was made with other models, or in another way (clip was '")
    (out / "commits" / "chunk-00000001.json").unlink()
    assert f"{out} is not complete; the command that began it" in mistake(retry.main, [str(out)], capsys)
