"""Maps against the demo's truth: whose object is where, who wins, and by how much at least."""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import truth
from benchmarks.__main__ import main
from saecore.demo import drawing, scenes
from saecore.evaluation import localisation
from saecore.evaluation.localisation import mean_over_images
from saecore.methods import Options
from saecore.pipeline.models import load_models
from saecore.relevance.explain import explain_latents
from tests.helpers.mistakes import mistake

pytestmark = pytest.mark.slow

N_SCENES = 192
METHODS = ("contrib", "contrib_grad", "chefer", "legrad", "gradeclip", "dense", "attention")


@pytest.fixture(scope="module")
def measured() -> truth.Measured:
    """All methods that need one forward."""
    return truth.measure(*load_models("demo", "demo"), N_SCENES, truth.rows(METHODS))


def test_every_colour_has_one_latent_that_follows_it(measured: truth.Measured) -> None:
    assert sorted(measured.followers.values()) == sorted(scenes.COLOURS)


def test_cases_are_where_the_object_is(measured: truth.Measured) -> None:
    """Each word of a scene is a case, if any patch shows it; each latent too, if it fires."""
    drawn = [scenes.scene_at(scenes.SEED_EVALUATION, truth.FIRST_MEASURED + index) for index in range(N_SCENES)]
    assert measured.mixed.tolist() == [len(scene.things) > 1 for scene in drawn]
    assert (measured.words.covered.max(-1) >= 0.5).all()
    for index, scene in enumerate(drawn[:40]):
        masks = drawing.visible(scene, 64)
        shares = masks.reshape(-1, 8, 8, 8, 8).mean(axis=(2, 4)).reshape(-1, 64)
        of_words = measured.words.covered[measured.words.image == index]
        assert len(of_words) == 2 * (shares.max(-1) >= 0.5).sum()  # colour and shape, none of which a scene has twice
        for cover in of_words:
            assert np.abs(shares - cover).max(-1).min() < 0.1, "drawn at another size"
        assert (measured.latents.image == index).sum() <= len(of_words) // 2
    fires = len(measured.latents.image) / (len(measured.words.image) / 2)
    assert 0.8 < fires <= 1


def difference(cases: truth.Cases, score: Any, one: str, other: str) -> localisation.Mean:
    ours, theirs = (score(cases.maps[name], cases.covered) for name in (one, other))
    return mean_over_images(ours - theirs, cases.image)


@pytest.mark.parametrize("kind", ["all", "mixed"])
def test_the_default_beats_what_does_not_know_the_target(measured: truth.Measured, kind: str) -> None:
    cases = measured.tables()[f"latents, {kind} scenes"]
    assert len(cases.image) > 200
    for score, margin in (
        (localisation.pointing, 0.35),
        (localisation.mass, 0.25),
        (localisation.average_precision, 0.3),
    ):
        for other in ("attention", "centre", "edges", "random"):
            assert difference(cases, score, "contrib", other).low > margin, (score, other)
    assert localisation.pointing(cases.maps["contrib"], cases.covered).mean() > 0.97
    assert localisation.average_precision(cases.maps["contrib"], cases.covered).mean() > 0.95


def test_a_table_marks_the_best_and_what_cannot_be_told_from_it(measured: truth.Measured) -> None:
    """Planted: the mask itself, the same with a little noise, and noise."""
    cases = measured.words
    noise, little = (localisation.noise(len(cases.image), (8, 8), seed) for seed in (1, 2))
    planted = cases._replace(maps={"mask": cases.covered, "occlusion": cases.covered + 1e-9 * little, "noise": noise})
    table = truth.table(planted)
    assert [name for name, cell in table["pointing"].items() if cell.best] == ["mask", "occlusion"]
    assert list(table["average precision"]["mask"].mean) == [1, 1, 1]
    assert table["agrees with occlusion"].keys() == {"mask", "noise"}
    assert abs(table["agrees with occlusion"]["noise"].mean.value) < 0.05
    text = truth.markdown(planted).splitlines()
    assert text[0] == "| | pointing | mass | average precision | agrees with occlusion |"
    assert text[2].startswith("| mask | **1.000 ± 0.000** | **0.")
    assert text[3].endswith("|  |")


def test_variants_have_rows_of_their_own(measured: truth.Measured) -> None:
    """What bears a published name is scored as published; frozen variants say so, and differ."""
    titles = [row.title for row in truth.rows(METHODS)]
    assert titles[4:10] == [
        "chefer",
        "chefer, frozen norm",
        "legrad",
        "legrad of the embedding",
        "legrad, frozen norm",
        "legrad of the embedding, frozen norm",
    ]
    assert list(measured.latents.maps) == [*titles, "centre", "edges", "random"]
    maps = measured.latents.maps
    for name in ("chefer", "legrad", "gradeclip"):
        assert np.abs(maps[name] - maps[f"{name}, frozen norm"]).max() > 0.05 * maps[name].max(), name
    assert [row.title for row in truth.rows(["contrib", "chefer"], Options(norm="frozen"))] == ["contrib", "chefer"]
    tower, sae = load_models("demo", "demo")
    seen = truth.sample(1, truth.FIRST_MEASURED)
    latents = torch.tensor([list(measured.followers)])
    with torch.inference_mode():
        pixels = torch.from_numpy(seen.pixels)
        frozen = explain_latents(tower, sae, pixels, latents, ("chefer",), Options(norm="frozen"))["chefer"].relevance[
            0
        ]
    for map_ in maps["chefer, frozen norm"][measured.latents.image == 0]:
        assert (frozen - torch.from_numpy(map_)).abs().amax(-1).min() < 1e-5


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["truth", "--scenes", "64", "--method", "contrib,attention", "--layers", "1"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "| contrib | " in said.out
    assert "| contrib, exact norm | " in said.out
    assert "words, mixed scenes: " in said.out
    for wrong in (["--scenes", "5"], ["--method", "tea-leaves"], ["--layers", "9", "--method", "chefer"]):
        mistake(main, ["truth", *wrong], capsys)
