"""A run's dataset card: its globs are the run's files, and nothing in a run can break it or leak through it."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from jobs import embed, index
from saecore.query import results
from saecore.runs import card, latents
from saecore.runs.files import read_manifest
from saecore.runs.record import Record, from_document
from tests.conftest import command
from tests.helpers import album, planted


def configs(run: Path | str) -> dict[str, dict[str, Any]]:
    """The tables that the card names, by name."""
    said = DatasetCard((Path(run) / "README.md").read_text()).data.to_dict()
    assert [one["config_name"] for one in said["configs"] if one.get("default")] == ["images"]
    return {one["config_name"]: one for one in said["configs"]}


def matched(run: Path | str) -> dict[str, set[str]]:
    """The files that each glob of the card matches, below the run."""
    paths = {str(path.relative_to(run)) for path in Path(run).rglob("*") if path.is_file()}
    globs = {name: one["data_files"] for name, one in configs(run).items()}
    return {name: {path for path in paths if fnmatch(path, glob)} for name, glob in globs.items()}


def written(run: Path | str) -> dict[str, set[str]]:
    """The files of each table that the run itself wrote, by its manifest."""
    rows = read_manifest(str(run)).to_pylist()
    return {table: {row["path"] for row in rows if row["table"] == table} for table in {row["table"] for row in rows}}


def test_every_glob_matches_the_manifests_files(tmp_path: Path) -> None:
    uri = planted.write(tmp_path / "run", 2)
    assert matched(uri) == written(uri)
    assert index.main(["--run", uri]) == 0
    for _ in range(2):  # indexed; then grown, which writes the card again, and indexed in two segments
        held = results.open(uri).tables.index
        assert held is not None
        rows = {file.path for segment in held.segments for file in segment.rows}
        top = {file.path for segment in held.segments for file in segment.top}
        assert matched(uri) == {**written(uri), "latents": {"latents.parquet"}, "by_latent": rows, "top_images": top}
        planted.write(uri)
        assert set(matched(uri)) == {"images", "activations", "maps", "latents", "by_latent", "top_images"}
        assert index.main(["--run", uri]) == 0


def test_a_table_that_is_not_there_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = planted.write(tmp_path / "without maps", methods=())
    assert set(matched(uri)) == {"images", "activations"}
    latents.merge(uri, pa.table({"latent": pa.array([0], pa.int32()), "name": ["a"]}))
    card.write(uri, results.open(uri).record)
    assert set(matched(uri)) == {"images", "activations", "latents"}
    monkeypatch.setattr(planted, "IMAGES", [[(key, 0, []) for key, *_ in chunk] for chunk in planted.IMAGES])
    refused = planted.write(tmp_path / "refused")
    assert set(matched(refused)) == {"images"}
    assert index.main(["--run", refused]) == 0
    assert set(matched(refused)) == {"images", "latents"}


def test_a_real_run_says_what_made_it_and_not_where(album_run: Path) -> None:
    said = (album_run / "README.md").read_text()
    assert matched(album_run).items() >= written(album_run).items()
    for words in (
        "25, of which 1 were refused",
        "CLIP: `demo`",
        "80 latents",
        "`contrib`, `chefer`, 8 x 8 patches",
        album.TEXT,
    ):
        assert words in said
    for path in (album_run.parent, Path.cwd(), Path.home()):
        assert str(path) not in said
    # The one line of NumPy that it shows decodes a map.
    row = pq.read_table(next((album_run / "maps").glob("*.parquet"))).slice(0, 1).to_pylist()[0]
    line = next(line for line in said.splitlines() if line.startswith("relevance = "))
    names: dict[str, Any] = {"row": row, "np": np}
    exec(line, names)
    maps = results.open(str(album_run)).maps(row["image_id"], row["method"])
    expected = maps.maps[maps.latents.index(row["latent"])]
    np.testing.assert_allclose(names["relevance"], expected, rtol=1e-6)


def test_embeddings_have_a_card_too(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "clip"
    given = [
        word
        for word in command(shards, out, "--local", "--limit", "8", "--no-npy")
        if word not in ("--sae", "--keep-embeddings")
    ]
    given.remove("demo")  # the SAE's
    assert embed.main(given) == 0
    assert matched(out) == written(out)
    assert "embeddings" in (out / "README.md").read_text()


def test_nothing_in_a_run_ends_what_the_card_says(tmp_path: Path) -> None:
    hostile = "x\n---\n# `` <script>alert(1)</script> ``` \x1b[31m | a"
    document = {
        "status": "complete",
        "images": 3,
        "refused": {},
        "rows": {"images": 3},
        "parts": {"targets": [f"text:{hostile}"], "clip": "0123"},
        "config": {
            "clip": "/home/somebody/secret/models/vit",
            "sae": "s3://bucket/private/sae?endpoint_override=host:9000",
        },
        "n_latents": 4,
    }
    said = card.text(hostile, from_document(document), ["images"])
    assert DatasetCard(said).data.to_dict()["configs"] == [
        {"config_name": "images", "data_files": "images/*.parquet", "default": True}
    ]
    for leak in ("somebody", "secret", "bucket", "private", "9000", "\x1b"):
        assert leak not in said
    assert "CLIP: `vit`" in said
    assert "SAE: `sae`" in said
    # Each time on one line, in a code span that is longer than any run of backticks in it.
    shown = [line for line in said.splitlines() if "<script>" in line]
    assert len(shown) == 2
    assert all(
        "```` x --- # `` <script>alert(1)</script> ``` [31m | a ````" in line.replace("text:", "") for line in shown
    )


def test_a_card_that_somebody_made_their_own_is_left_alone(tmp_path: Path) -> None:
    uri = planted.write(tmp_path / "run", 2)
    place = Path(uri) / "README.md"
    ours = place.read_text()
    assert card.MARK in ours
    place.write_text(ours.replace(card.MARK, "").replace("tags:", "license: cc-by-4.0\ntags:"))
    theirs = place.read_text()
    planted.write(uri)
    assert index.main(["--run", uri]) == 0
    assert place.read_text() == theirs
    place.unlink()
    assert index.main(["--run", uri]) == 0
    assert card.MARK in place.read_text()


def test_the_card_comes_before_the_run_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds a complete run finds its card."""

    def refuse(uri: str, record: Record) -> None:
        raise OSError(f"no card for {record.images} images")

    monkeypatch.setattr(card, "write", refuse)
    with pytest.raises(OSError, match="no card for 6 images"):
        planted.write(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    monkeypatch.undo()
    assert set(matched(planted.write(tmp_path / "run"))) == {"images", "activations", "maps"}


def test_a_card_at_an_address(store: Path) -> None:
    uri = planted.write("s3://bucket/run")
    assert set(matched(store / "run")) == {"images", "activations", "maps"}
    assert index.main(["--run", uri]) == 0
    assert set(matched(store / "run")) == {"images", "activations", "maps", "latents", "by_latent", "top_images"}
