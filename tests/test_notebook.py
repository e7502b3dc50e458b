"""One picture explained in Python has the values of a run, unrounded. It is shown, or refused in one sentence."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import explain
from saecore.notebook import Models, explain_image, load
from saecore.query import results
from tests.helpers.photographs import photographs

TEXT = "text:a red square"


@pytest.fixture(scope="module")
def models() -> Models:
    return load("demo", "demo")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of several shapes, one of them with an alpha channel."""
    folder = tmp_path_factory.mktemp("pictures")
    real = {name: Image.fromarray(pixels) for name, pixels in photographs().items()}
    for name, size in {"coffee": (200, 140), "rocket": (90, 160), "astronaut": (64, 64)}.items():
        real[name].resize(size).save(folder / f"{name}.jpg", quality=90)
    real["chelsea"].resize((120, 100)).convert("RGBA").save(folder / "chelsea.png")
    return folder


def test_values_are_those_of_a_run(models: Models, pictures: Path, tmp_path: Path) -> None:
    """Latents are equal to float32 rounding, maps to half an 8-bit step; sums and remainders make pre-activations."""
    arguments = ["--images", str(pictures), "--clip", "demo", "--sae", "demo", "--k", "5", "--targets", "kept", TEXT]
    assert explain.main([*arguments, "--local", "--out", str(tmp_path / "run")]) == 0
    run = results.open(str(tmp_path / "run"))
    for path in sorted(pictures.iterdir()):
        explained = explain_image(path, models, k=5, targets=("kept", TEXT))
        row = run.latents_of(path.name)
        assert explained.latents["latent"].to_pylist() == row["latent"].to_pylist()
        np.testing.assert_allclose(explained.latents["activation"], row["activation"], rtol=1e-4)
        maps = run.maps(path.name)
        assert explained.targets == [f"latent {latent}" for latent in maps.latents[:-1]] + ["text: a red square"]
        step = np.abs(maps.maps).max((1, 2), keepdims=True) / 127
        assert (np.abs(explained.maps - maps.maps) <= 0.51 * step).all()
        np.testing.assert_allclose(explained.remainders, maps.remainders, atol=1e-4)
        np.testing.assert_allclose(
            explained.maps.sum((1, 2)) + explained.remainders, explained.pre_activations, atol=1e-4
        )


def test_a_path_bytes_and_a_picture_are_one(models: Models, pictures: Path) -> None:
    path = pictures / "chelsea.png"
    ways = [explain_image(way, models, k=3) for way in (path, str(path), path.read_bytes(), Image.open(path))]
    assert all((explained.maps == ways[0].maps).all() for explained in ways)


def test_a_latent_kept_and_asked_for_has_one_map(models: Models, pictures: Path) -> None:
    kept = explain_image(pictures / "coffee.jpg", models, k=3).latents["latent"].to_pylist()
    other = next(latent for latent in range(80) if latent not in kept)
    explained = explain_image(pictures / "coffee.jpg", models, k=3, targets=("kept", f"latents:{kept[1]},{other}"))
    assert explained.targets == [f"latent {latent}" for latent in (*kept, other)]
    assert len(explained.maps) == len(explained.remainders) == len(explained.pre_activations) == 4


def test_overlays_show_a_map_on_the_crop_and_notebooks_show_all(models: Models, pictures: Path) -> None:
    explained = explain_image(pictures / "coffee.jpg", models, k=3, names={}, method="occlusion")
    first, second = (np.asarray(explained.overlay(target, side=120)) for target in explained.targets[:2])
    assert first.shape == second.shape
    assert (first != second).any()
    number = int(explained.targets[0].split()[1])
    assert (np.asarray(explained.overlay(number, side=120)) == first).all()
    assert explained.crop.size == (140, 140)  # the middle of 200 x 140, as CLIP saw it
    shown = explained._repr_html_()
    assert shown.count("<img") == 3
    assert shown.count("<tr>") == 4
    with pytest.raises(ValueError, match=r"^latent 999 has no map here; there are maps of latent"):
        explained.overlay(999)


def test_what_cannot_be_is_one_sentence(models: Models, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"no picture")
    empty = io.BytesIO()
    Image.new("RGB", (20, 20)).save(empty, "PNG")
    with pytest.raises(ValueError, match=r"x\.jpg cannot be decoded: not-an-image"):
        explain_image(tmp_path / "x.jpg", models)
    with pytest.raises(ValueError, match=r"none\.jpg cannot be read: No such file"):
        explain_image(tmp_path / "none.jpg", models)
    for wrong, sentence in (
        ({"method": "contrib,dense"}, "give one method"),
        ({"method": "lrp"}, "method lrp: must be"),
        ({"k": 0}, "k 0: must be at least 1"),
        ({"targets": ("latents:80",)}, "latents:80: this SAE has 80 latents"),
    ):
        with pytest.raises(ValueError, match=sentence):
            explain_image(empty.getvalue(), models, **wrong)


def test_an_sae_of_patch_tokens(local_run: Path, tmp_path: Path) -> None:
    """The same latents, activations and maps as a run has, but for their 8 bits."""
    images = json.loads((local_run / "run.json").read_text())["config"]["images"]
    given = [
        "--images",
        *images,
        "--clip",
        "demo",
        "--sae",
        "demo-patches",
        "--pool",
        "max",
        "--k",
        "5",
        "--limit",
        "3",
    ]
    assert explain.main([*given, "--out", str(tmp_path / "run"), "--local"]) == 0
    run, models = results.open(str(tmp_path / "run")), load("demo", "demo-patches")
    for method in ("contrib", "activation"):
        found = explain_image(run.picture(0), models, k=5, method=method, pool="max")
        expected, maps = run.latents_of(0), run.maps(0, method)
        assert found.latents["latent"].to_pylist() == expected["latent"].to_pylist()
        np.testing.assert_allclose(found.latents["activation"], expected["activation"], rtol=1e-4)
        assert found.targets == [f"latent {latent}" for latent in maps.latents]
        for ours, theirs in zip(found.maps, maps.maps, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=np.abs(ours).max() / 200)
        assert found.overlay().size[0] > 200
    np.testing.assert_allclose(found.pre_activations, found.maps.max((1, 2)), rtol=1e-4)
    with pytest.raises(ValueError, match="pool: the SAE reads patches tokens"):
        explain_image(run.picture(0), models)
    with pytest.raises(ValueError, match="has no meaning for an SAE that reads the tokens"):
        explain_image(run.picture(0), models, method="chefer", pool="max")
