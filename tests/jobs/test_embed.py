"""Images and words to embeddings: the same numbers as `jobs.explain --keep-embeddings`, in tables and in the memory map."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import embed, explain
from saecore import schema
from saecore.demo import drawing, scenes
from saecore.runs.commits import Commit
from saecore.runs.files import open_dataset
from saecore.runs.run import Run
from saecore.towers.loading import load_text_tower
from saecore.towers.text import embed_texts
from saecore.training import memmaps
from tests.conftest import N_SCENES, command
from tests.helpers.mistakes import mistake


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    return ["--images", str(images), "--out", str(out), "--clip", "demo", "--chunk-size", "8", *more]


def images_of(run: Path) -> list[dict[str, Any]]:
    return open_dataset(str(run), "images").to_table().sort_by("image_id").to_pylist()


def assert_same_embeddings(one: Path, other: Path) -> None:
    a, b = images_of(one), images_of(other)
    for name in ("image_id", "uri", "key", "width", "crop_right", "format", "error"):
        assert [row[name] for row in a] == [row[name] for row in b]
    np.testing.assert_allclose([r["embedding"] for r in a], [r["embedding"] for r in b], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def embedded(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "my_scenes"
    assert embed.main(arguments(shards, out, "--local")) == 0
    return out


def test_embeddings_are_those_that_explain_writes(embedded: Path, local_run: Path) -> None:
    assert_same_embeddings(embedded, local_run)
    table = open_dataset(str(embedded), "images").to_table()
    assert table.schema.remove_metadata() == schema.IMAGES
    assert table.schema.metadata[b"clip"] == b"demo"
    assert all(table[name].null_count == N_SCENES for name in ("l0", "cosine", "fvu"))
    assert {path.name for path in embedded.iterdir() if path.is_dir()} == {"images", "commits"}
    record = json.loads((embedded / "run.json").read_text())
    assert (record["status"], record["parts"]["kind"], record["rows"]) == ("complete", "embed", {"images": N_SCENES})


def test_ray_writes_the_same_rows(ray_session: None, shards: Path, embedded: Path, tmp_path: Path) -> None:
    assert (
        embed.main(
            arguments(shards, tmp_path / "run", "--batch-size", "7", "--split", "val", "--dataset", "a_b", "--ray")
        )
        == 0
    )
    assert_same_embeddings(tmp_path / "run", embedded)
    assert (tmp_path / "run" / f"a_b_demo_val_image_{N_SCENES}_128.npy").exists()


def test_the_memory_map_has_the_rows_of_the_table_without_the_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken image in the middle of a chunk, one that ends another: the rows around them close up, in order."""
    folder, out = tmp_path / "scenes", tmp_path / "run"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(10):
                data = drawing.jpeg(scenes.scene_at(scenes.SEED_EVALUATION, 10 * shard + index), 64)
                data = b"broken" if index in (2, 3) else data
                info = tarfile.TarInfo(f"{index}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    given = ["--images", str(folder), "--out", str(out), "--clip", "demo", "--chunk-size", "4", "--local"]
    assert embed.main([*given, "--no-npy"]) == 0
    assert not list(out.glob("*.npy"))
    assert embed.main(given) == 0  # nothing is embedded again for it
    said = capsys.readouterr().out
    assert "is complete: nothing to do" in said
    assert "run_demo_train_image_16_128.npy: raw float32 16 x 128" in said
    found = np.memmap(out / "run_demo_train_image_16_128.npy", np.float32, "r").reshape(16, 128)
    rows = images_of(out)
    assert [row["error"] for row in rows].count("not-an-image") == 4
    np.testing.assert_array_equal(
        found, np.array([row["embedding"] for row in rows if row["error"] is None], np.float32)
    )
    assert not list(out.glob(".*"))


def test_an_interrupted_run_is_resumed(
    ray_session: None,
    shards: Path,
    embedded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the Ray that others use in this process goes on."""
    import ray

    whole, out = Run.write_chunk, tmp_path / "run"

    def stop_at_3(self: Run, chunk_id: int, *rest: Any) -> Commit:
        if chunk_id == 3:
            raise KeyboardInterrupt
        return whole(self, chunk_id, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_chunk", stop_at_3)
        assert embed.main(arguments(shards, out, "--local")) == 130
    assert ray.is_initialized()
    done = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert len(done) == 3
    assert embed.main(arguments(shards, out, "--local")) == 0
    assert f"resuming: 24 of {N_SCENES} images are done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert_same_embeddings(out, embedded)


def test_a_memory_map_that_falls_short_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="4 numbers came for 3 rows of 2"):
        memmaps.write(tmp_path / "x.npy", [np.zeros((2, 2))], (3, 2))
    assert not list(tmp_path.iterdir())


def test_an_object_store_gets_no_memory_map() -> None:
    told = embed.Arguments(out="s3://bucket/run?region=eu-1", images=("x",), clip="demo")
    said = embed.write_memory_map(told, "demo", "train", "image", (1, 2), [np.zeros((1, 2))])
    assert said.startswith("memory map    none: s3://bucket/run")


def test_dry_run_says_what_and_writes_nothing(
    shards: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed.main(arguments(shards, tmp_path / "run", "--dry-run", "--limit", "20")) == 0
    assert "would embed 20 images of 2 shards in 3 chunks" in capsys.readouterr().out
    assert embed.main(["--text", str(words), "--clip", "demo", "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "would embed them in 1 templates" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.fixture
def words(tmp_path: Path) -> Path:
    file = tmp_path / "shape_words.txt"
    file.write_text("red\n\ncircle\nred\n" + "blue " * 60 + "\n")
    return file


def test_a_vocabulary_becomes_a_table_and_a_memory_map(
    words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--text", str(words), "--clip", "demo", "--out", str(tmp_path / "texts"), "--batch-size", "2"]
    assert embed.main(given) == 0
    said = capsys.readouterr().out
    assert "3 words; dropped: 1 blank lines, 1 repeated words" in said
    assert "1 texts are longer than the 40 tokens" in said
    table = pq.read_table(tmp_path / "texts" / "texts.parquet")
    assert table.schema.remove_metadata() == schema.TEXTS
    assert table.schema.metadata[b"clip"] == b"demo"
    assert table.schema.metadata[b"templates"] == b'["{}"]'
    assert table["word"].to_pylist() == ["red", "circle", ("blue " * 60).strip()]
    expected = embed_texts(load_text_tower("demo"), table["word"].to_pylist())
    np.testing.assert_allclose(table["embedding"].to_pylist(), expected, rtol=1e-5, atol=1e-5)
    file = tmp_path / "texts" / "shape_words_demo_-1_text_3_128.npy"
    np.testing.assert_array_equal(np.fromfile(file, np.float32), table["embedding"].combine_chunks().flatten())

    before = file.stat().st_mtime_ns
    assert embed.main(given) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out
    assert file.stat().st_mtime_ns == before
    said = mistake(embed.main, [*given, "--templates", "a {}", "the {}"], capsys)
    assert "templates was ['{}'], now ['a {}', 'the {}']" in said


def test_the_wrong_folder_is_refused(
    shards: Path, embedded: Path, local_run: Path, words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path for run in (embedded, local_run) for path in run.rglob("*")}
    said = mistake(embed.main, arguments(shards, local_run, "--local"), capsys)
    assert "holds an 'explain' run, and this is an 'embed' one" in said
    said = mistake(explain.main, command(shards, embedded, "--local"), capsys)
    assert "holds an 'embed' run, and this is an 'explain' one" in said
    said = mistake(embed.main, ["--text", str(words), "--clip", "demo", "--out", str(embedded)], capsys)
    assert "holds a run over images" in said
    assert {path for run in (embedded, local_run) for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--clip", "demo"], "either --images or --text"),
        (["--images", "{shards}", "--text", "w.txt", "--clip", "demo"], "either --images or --text"),
        (["--images", "{shards}"], "--clip"),
        (["--images", "/no/such/folder", "--clip", "demo"], "/no/such/folder"),
        (["--images", "{shards}", "--clip", "/no/clip"], "--clip /no/clip"),
        (["--images", "{shards}", "--clip", "demo", "--chunk-size", "0"], "--chunk-size 0"),
        (["--images", "{shards}", "--clip", "demo", "--dataset", "a/b"], "--dataset a/b"),
        (["--images", "{shards}", "--clip", "demo", "--templates", "a {{}}"], "--templates is for --text"),
        (["--text", "/no/words.txt", "--clip", "demo"], "--text /no/words.txt"),
        (["--text", "{shards}", "--clip", "demo"], "--text"),
        (["--text", "w.txt", "--clip", "demo", "--templates", "a photo"], "--templates 'a photo'"),
    ],
)
def test_a_mistake_is_one_sentence(
    given: list[str], complaint: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(shards=shards) for argument in given]
    assert complaint in mistake(embed.main, [*given, "--local", "--out", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()
