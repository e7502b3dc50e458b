"""Which maps are judged by which masks: on the demo's scenes, whose true masks are known."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import evaluate, explain
from saecore.demo.scenes import COLOURS, SEED_DEMO, scene_at
from saecore.demo.writing import write_masks, write_shards
from saecore.evaluation import localisation
from saecore.judging import places, verdict
from saecore.judging.places import METRICS, Places, Sight, places_of, scored
from saecore.numbering import index_of, shard_of
from saecore.runs.files import open_dataset
from tests.helpers.mistakes import mistake

SCENES = 96

SIGHT = Sight((64, 64), (8, 8), 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("placed")
    write_shards(made / "in", SCENES, 2)
    write_masks(made / "masks.parquet", SCENES)
    given = [
        "--images",
        str(made / "in"),
        "--clip",
        "demo",
        "--sae",
        "demo",
        "--local",
        "--targets",
        "kept",
        "text:red",
    ]
    assert explain.main([*given, "--out", str(made / "run")]) == 0
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> Places:
    ids = np.sort(open_dataset(str(folder / "run"), "images").to_table()["image_id"].to_numpy())
    return places_of(str(folder / "run"), str(folder / "masks.parquet"), ids, ["red"], SIGHT, seed=0)


def test_latents_of_colours_are_judged_on_objects_of_their_colour(found: Places) -> None:
    rows = found.table.to_pylist()
    of_latents = [row for row in rows if row["latent"] is not None]
    by_label = {label: {row["latent"] for row in of_latents if row["label"] == label} for label in COLOURS}
    assert sum(map(bool, by_label.values())) >= 5
    assert all(len(latents) <= 1 for latents in by_label.values())
    of_texts = [row for row in rows if row["target"] is not None]
    assert {(row["target"], row["label"]) for row in of_texts} == {("text: red", "red")}
    red = {index for index in range(SCENES) if "red" in {thing.colour for thing in scene_at(SEED_DEMO, index).things}}
    assert 0 < len(of_texts) <= len(red)
    for row in rows:
        assert len(row["shares"]) == 64
        assert 0 < max(row["shares"]) <= 1
    assert "latents follow" in found.said


def test_only_the_half_that_did_not_choose_is_judged(found: Places) -> None:
    """Two shards of equal length, so an image's place follows from its number."""
    ids = np.array([row["image_id"] for row in found.table.to_pylist() if row["latent"] is not None])
    placed = shard_of(ids) * (SCENES // 2) + index_of(ids)
    assert not localisation.halves(SCENES, seed=0)[placed].any()
    assert len(np.unique(placed)) > SCENES // 4


def test_scores_are_those_of_each_map_and_its_mask() -> None:
    drawn = np.random.default_rng(2)
    maps = drawn.normal(size=(2, 3, 3, 16))  # 2 images, 3 methods, 3 targets: 2 latents and a text
    maps[0, :, 1] = np.nan  # does not fire
    latents = np.array([[7, 9, -1], [9, 7, -1]])
    covers = [(drawn.random(16) > 0.6).astype(np.float32) for _ in range(5)]
    rows = [
        {"image_id": 5, "latent": 7, "target": None, "label": "cat", "shares": covers[0]},
        {"image_id": 5, "latent": 9, "target": None, "label": "cat", "shares": covers[1]},
        {"image_id": 8, "latent": None, "target": "text: red", "label": "red", "shares": covers[2]},
        {"image_id": 8, "latent": 9, "target": None, "label": "", "shares": covers[3]},
        {"image_id": 8, "latent": 11, "target": None, "label": "dog", "shares": covers[4]},
    ]
    made = scored(pa.Table.from_pylist(rows, schema=places.TABLE), np.array([5, 8]), latents, ["text: red"], maps)
    assert made.keys() == {*METRICS, *(f"{metric}_foreground" for metric in METRICS)}
    expected = np.full((2, 3, 3), np.nan)
    for method in range(3):
        expected[0, method, 0] = localisation.average_precision(maps[0, method, :1], covers[0][None])[0]
        expected[1, method, 2] = localisation.average_precision(maps[1, method, 2:], covers[2][None])[0]
    np.testing.assert_allclose(made["average_precision"], expected, rtol=1e-6)
    of_foreground = np.full((2, 3, 3), np.nan)
    of_foreground[1, :, 0] = localisation.pointing(maps[1, :, 0], np.tile(covers[3], (3, 1)))
    np.testing.assert_allclose(made["pointing_foreground"], of_foreground, rtol=1e-6)


def test_the_command_says_where_maps_lie(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = folder / "run", folder / "judged"
    few = ["--steps", "1", "--shapley-subsets", "0", "--checks", "none", "--images-sample", "80", "--out", str(out)]
    given = ["--run", str(run), *few, "--masks", str(folder / "masks.parquet")]
    assert evaluate.main(given) == 0
    assert "labels, latents follow" in capsys.readouterr().out
    found = verdict.read(str(out))
    assert found is not None
    contrib, attention, random = (found.mean(name, "pointing") for name in ("contrib", "attention", "random"))
    assert contrib is not None
    assert attention is not None
    assert random is not None
    assert contrib.value > 0.9 > attention.value > random.value
    assert found.mean("contrib", "pointing_foreground") is None
    texts = open_dataset(str(out), "faithfulness").to_table().to_pylist()
    assert any(row["target"] == "text: red" and row["metric"] == "miou" for row in texts)
    # Other masks are another judgement.
    few_masks = pq.read_table(folder / "masks.parquet").slice(0, 60)
    pq.write_table(few_masks, folder / "few.parquet")
    assert "holds a run made otherwise (masks" in mistake(
        evaluate.main, [*given[:-1], str(folder / "few.parquet")], capsys
    )


def test_masks_of_no_image_are_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for masks, expected in ((folder / "in", "holds no mask of any of these images"), (folder / "no", "does not exist")):
        words = ["--run", str(folder / "run"), "--out", str(folder / "no"), "--masks", str(masks)]
        assert expected in mistake(evaluate.main, words, capsys)
