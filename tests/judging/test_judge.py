"""The scores of a batch of pictures: each against a derivation of its own, and none that depends on the batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from saecore import schema
from saecore.demo import drawing, scenes
from saecore.evaluation.faithfulness import curves, order_of
from saecore.judging.judge import Judge
from saecore.judging.settings import Settings
from saecore.judging.stage import Evaluate
from saecore.judging.subject import Subject
from saecore.judging.verdict import OTHER_ROWS, SHAPLEY, TRAINED, UNTRAINED, Key
from saecore.pipeline.models import load_models
from saecore.removal import ways
from saecore.requests import parse_targets
from saecore.towers.stopped import stopped_at
from saecore.towers.tokens import TokenTower
from saecore.towers.tower import ImageTower
from tests.helpers.towers import SHAPES, SIGLIP_SHAPES, random_pixels, random_sae, random_siglip, random_tower

TOKENS: dict[str, Any] = {"sae": "demo-patches", "pool": "max", "methods": ("activation", "contrib", "attention")}


def settings(**given: Any) -> Settings:
    base: dict[str, Any] = {
        "clip": "demo",
        "sae": "demo",
        "k": 3,
        "methods": ("contrib", "attention"),
        "of": "",
        "sample": 3,
        "steps": 4,
        "shapley_subsets": 0,
        "null_latents": 2,
        "precision": "float32",
    }
    return Settings(**(base | given))


def pixels(n: int = 3) -> np.ndarray:
    return np.stack([drawing.render(scenes.scene_at(7, index), 64) for index in range(n)])


def decoded(shown: np.ndarray, refused: tuple[int, ...] = ()) -> pa.Table:
    rows = [
        {"image_id": 10 + number, "uri": "u", "key": str(number), "error": "truncated" if number in refused else None}
        | {"pixels": None if number in refused else picture.tobytes()}
        for number, picture in enumerate(shown)
    ]
    return pa.Table.from_pylist(rows, schema=schema.DECODED)


def judge(given: Settings, keep_maps: bool = False) -> Judge:
    tower, sae = load_models(given.clip, given.sae, given.site)
    return Judge(Subject(tower, sae, given.methods, given.options, given.pool), given, "cpu", keep_maps)


# ---- Rows.


@pytest.mark.parametrize("given", [{}, {**TOKENS, "checks": ("agreement",)}], ids=["embedding", "tokens"])
def test_rows_do_not_depend_on_the_batch(given: dict[str, Any]) -> None:
    stage = Evaluate(settings(**given))
    shown = pixels()
    together = stage(decoded(shown, refused=(1,)))
    alone = pa.concat_tables([stage(decoded(shown, refused=(1,)).slice(at, 1)) for at in range(len(shown))])
    assert together["faithfulness"].is_null().to_pylist() == [False, True, False]
    for name in ("faithfulness", "curves"):
        one, other = (schema.unnest(table, name) for table in (together, alone))
        assert one.schema == getattr(schema, name.upper())
        told = ["image_id", "latent", "target", "model", "method"]
        assert one.select(told).equals(other.select(told))
    one, other = (schema.unnest(table, "faithfulness")["value"].to_numpy() for table in (together, alone))
    np.testing.assert_allclose(one, other, atol=5e-3)  # ranks of nearly equal values change with rounding


def test_rows_say_what_they_are_of() -> None:
    stage = Evaluate(settings(targets=parse_targets(["kept", "text:a red square"]), ways=("drop", "mean")))
    table = schema.unnest(stage(decoded(pixels())), "faithfulness")
    rows = table.to_pylist()
    assert all((row["latent"] is None) != (row["target"] is None) for row in rows)
    assert {row["target"] for row in rows} == {None, "text: a red square"}
    assert {row["model"] for row in rows if row["target"]} == {TRAINED}
    assert {row["model"] for row in rows} == {TRAINED, OTHER_ROWS, UNTRAINED}
    counted = {
        (model, metric): len({row["latent"] for row in rows if (row["model"], row["metric"], row["image_id"]) == of})
        for of in ((TRAINED, "srg", 10), (UNTRAINED, "srg", 10))
        for model, metric in [of[:2]]
    }
    assert counted == {(TRAINED, "srg"): 3 + 1, (UNTRAINED, "srg"): 2}
    assert {row["metric"] for row in rows if row["method"] == "random"} == {"srg", "srg_mean", "occlusion"}
    assert not any(row["target"] for row in rows if row["metric"] == "other_row"), "a random row is of a latent"


def test_only_what_fires_is_judged() -> None:
    """No scene lets all 80 latents fire, so of 20 that are asked for, some do not."""
    asked = settings(k=0, targets=parse_targets(["latents:" + ",".join(map(str, range(20)))]), checks=(), steps=2)
    stage = Evaluate(asked)
    table = schema.unnest(stage(decoded(pixels(2))), "faithfulness")
    tower, sae = load_models("demo", "demo")
    with torch.inference_mode():
        code = sae.encode_sparse(tower.embed(torch.from_numpy(pixels(2))))
    fires = code.dense(80)[:, :20] != 0
    found = {(row["image_id"] - 10, row["latent"]) for row in table.to_pylist()}
    assert found == {(image, latent) for image, latent in fires.nonzero().tolist()}
    assert 0 < len(found) < 40


# ---- Scores.


def test_scores_are_those_of_their_definitions() -> None:
    given = settings(shapley_subsets=400)
    judged, shown = judge(given, keep_maps=True), torch.from_numpy(pixels())
    found = judged(pixels())
    score: dict[tuple[str, str, str], Any] = {key: found.scores[:, place] for place, key in enumerate(judged.keys)}
    maps = dict(zip(judged.sources, np.moveaxis(found.maps, 1, 0), strict=True))
    subject = Subject(*load_models("demo", "demo"), ("contrib", "attention", "occlusion"))
    with torch.inference_mode():
        seen = subject.show(shown, None, 3)
        remove = seen.remove("drop")
        for name in ("contrib", "attention", SHAPLEY, "random", "centre", "edges"):
            srg = curves(remove, order_of(torch.from_numpy(maps[name])), steps=4).srg
            np.testing.assert_allclose(score[TRAINED, name, "srg"], srg, atol=1e-4)
        whole, none = (remove(torch.arange(64)[None, None, :m].expand(3, 1, -1))[:, 0] for m in (64, 0))
    np.testing.assert_allclose(score[TRAINED, "contrib", "span"], whole - none, atol=1e-4)
    np.testing.assert_array_equal(found.latents[:, 0], seen.latents)
    for image in range(3):
        for target in range(3):
            own = maps["contrib"][image, target]
            for metric, other in (("occlusion", seen.maps["occlusion"].relevance), ("shapley", maps[SHAPLEY])):
                expected = spearmanr(own, np.asarray(other)[image, target]).statistic
                assert score[TRAINED, "contrib", metric][image, target] == pytest.approx(expected, abs=1e-4)
            others = [maps["contrib"][image, place] for place in range(3) if place != target]
            expected = np.mean([abs(spearmanr(own, other).statistic) for other in others])
            assert score[TRAINED, "contrib", "alike"][image, target] == pytest.approx(expected, abs=1e-4)
    kept, rest = np.abs(maps["contrib"].sum(-1)), seen.maps["contrib"].remainder.abs().numpy()
    np.testing.assert_allclose(score[TRAINED, "contrib", "localisable"], kept / (kept + rest), atol=1e-4)
    assert score[TRAINED, "contrib", "completeness"].max() < 1e-5


def test_attention_is_told_to_know_no_target_and_contrib_to_know_its_own() -> None:
    judged = judge(settings())
    found = judged(pixels(4))
    score: dict[tuple[str, str, str], Any] = {key: found.scores[:, place] for place, key in enumerate(judged.keys)}
    np.testing.assert_allclose(score[TRAINED, "attention", "other_row"], 1.0, atol=1e-5)
    np.testing.assert_allclose(score[TRAINED, "attention", "alike"], 1.0, atol=1e-5)
    np.testing.assert_allclose(
        score[TRAINED, "attention", "srg_of_another"], score[TRAINED, "attention", "srg"], atol=1e-5
    )
    assert score[TRAINED, "contrib", "other_row"].mean() < 0.6
    for metric in ("cascade_1", "cascade_half", "cascade_all"):
        assert score[TRAINED, "contrib", metric].mean() < 0.6
    assert score[TRAINED, "contrib", "bfloat16"].min() > 0.95
    assert score[TRAINED, "contrib", "shift"].mean() < score[TRAINED, "contrib", "jpeg"].mean() < 1
    trained, rows, anew = (np.nanmean(score[model, "contrib", "srg"]) for model in (TRAINED, OTHER_ROWS, UNTRAINED))
    assert trained > rows > anew


def test_what_is_not_asked_for_is_not_measured() -> None:
    judged = judge(settings(checks=()))
    found = judged(pixels(2))
    assert {key.model for key in judged.keys} == {TRAINED}
    assert {key.metric for key in judged.keys} == {
        "srg", "span", "srg_of_another", "alike", "sink_share", "completeness", "localisable",
    }  # fmt: skip
    assert found.latents.shape == (2, 1, 3)
    assert judged.curve_keys == [
        Key(TRAINED, name, "drop") for name in ("contrib", "attention", "random", "centre", "edges")
    ]


# ---- SAEs that read tokens.


def test_removal_of_tokens_is_a_forward_without_them() -> None:
    """z of the tokens that are left, by transformers' own layers on a shorter sequence, for sets of patches that differ from
    image to image."""
    given = settings(**TOKENS)
    tower, sae = load_models("demo", given.sae)
    assert isinstance(tower, TokenTower)
    shown = torch.from_numpy(pixels())
    drawn = torch.Generator().manual_seed(3)
    kept = torch.stack([torch.stack([torch.randperm(64, generator=drawn)[:40] for _ in range(2)]) for _ in range(3)])
    with torch.inference_mode():
        seen = Subject(tower, sae, given.methods, pool="max").show(shown, None, 4)
        left = seen.remove("drop")(kept)
        first = tower.first_tokens(shown)
        for image in range(3):
            for number in range(2):
                patches = kept[image, number]
                tokens = first[image][torch.cat([torch.zeros(1, dtype=torch.int64), patches + 1])][None]
                for layer in tower.vision.encoder.layers[: tower.n_layers]:
                    tokens = layer(tokens, None)
                    tokens = tokens[0] if isinstance(tokens, tuple) else tokens
                for target, latent in enumerate(seen.latents[image].tolist()):
                    expected = _at_the_maximum(sae, tower, shown[image : image + 1], latent, patches, tokens[0, 1:])
                    assert float(left[image, number, target]) == pytest.approx(expected, abs=1e-3)


def _at_the_maximum(sae: Any, tower: TokenTower, picture: Tensor, latent: int, patches: Tensor, left: Tensor) -> float:
    """By max, a latent's z is its pre-activation at the patch where it fires most in the whole picture; 0 if that is gone."""
    streams = tower.embed(picture)[0]
    before = sae.encode_sparse(streams).dense(sae.config.n_latents)[:, latent]
    place = (patches == int(before.argmax())).nonzero()
    return float(sae.pre_activations(left)[place[0, 0], latent]) if len(place) else 0.0


def test_filling_with_the_picture_itself_changes_nothing_where_tokens_are_read() -> None:
    tower, sae = load_models("demo", "demo-patches")
    shown = torch.from_numpy(pixels(2))
    none = torch.zeros(2, 1, 0, dtype=torch.int64)
    with torch.inference_mode():
        seen = Subject(tower, sae, ("contrib",), pool="mean").show(shown, None, 4)
        assert (seen.remove("mean")(none)[:, 0] - seen.values).abs().max() > 0.1
        all_stay = torch.arange(64).expand(2, 1, -1)
        for way in ways.WAYS:
            torch.testing.assert_close(seen.remove(way)(all_stay)[:, 0], seen.values, rtol=1e-4, atol=1e-4)


def test_given_latents_are_shown_where_tokens_are_read() -> None:
    tower, sae = load_models("demo", "demo-patches")
    shown, latents = torch.from_numpy(pixels(2)), torch.tensor([[3, 200], [17, 3]])
    subject = Subject(tower, sae, ("contrib",), pool="max")
    with torch.inference_mode():
        together = subject.show(shown, latents)
        swapped = dataclasses.replace(subject, methods=("contrib", "attention")).show(shown.flip(0), latents.flip(0))
    assert together.latents.tolist() == latents.tolist()
    torch.testing.assert_close(
        together.maps["contrib"].relevance, swapped.maps["contrib"].relevance.flip(0), rtol=1e-4, atol=1e-4
    )


# ---- Other towers.


def siglip() -> ImageTower:
    return random_siglip(**SIGLIP_SHAPES[2])[1]


def inside() -> ImageTower:
    return stopped_at(random_tower(**SHAPES[2])[1], 1)


@pytest.mark.parametrize("make", [siglip, inside])
def test_towers_without_cls_and_towers_that_stop_are_judged(make: Callable[[], ImageTower]) -> None:
    """Without a token of its own, a model needs a patch: there are no Shapley values, and the last point keeps one."""
    tower = make()
    sae = random_sae(tower.n_outputs)
    asked = settings(steps=3, shapley_subsets=3 * tower.grid[0] * tower.grid[1], methods=("contrib", "attention"))
    judged = Judge(Subject(tower, sae, asked.methods), asked, "cpu")
    shown = random_pixels(tower, 2).numpy()
    found = judged(shown)
    score: dict[tuple[str, str, str], Any] = {key: found.scores[:, place] for place, key in enumerate(judged.keys)}
    assert ((TRAINED, "contrib", "shapley") in score) == bool(tower.n_own)
    assert {key[0] for key in score} == {TRAINED, OTHER_ROWS, UNTRAINED}
    curve = found.curves[:, judged.curve_keys.index(Key(TRAINED, "contrib", "drop"))]
    firing = ~np.isnan(curve[..., 0, 0])
    assert firing.any()
    with torch.inference_mode():
        seen = judged.subject.show(torch.from_numpy(shown), None, 3)
        order = order_of(seen.maps["contrib"].relevance)
        remove = seen.remove("drop")
        last = order[..., -1:] if not tower.n_own else order[..., :0]
        ends = remove(last).diagonal(dim1=1, dim2=2)
    np.testing.assert_allclose(curve[..., 0, 0][firing], seen.values[torch.from_numpy(firing)], atol=1e-4)
    np.testing.assert_allclose(curve[..., 0, -1][firing], ends[torch.from_numpy(firing)], atol=1e-4)
