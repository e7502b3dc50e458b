"""benchmarks steps, job and peers: what is compared does the same work, and the figures are what they say."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from benchmarks import busy, decoders, job, ordinary, peers, steps
from benchmarks.__main__ import main
from benchmarks.material import Models, Size, pictures, write_models
from saecore.images.decode import open_rgb
from saecore.pipeline.config import ExplainConfig
from saecore.pipeline.models import load_models
from saecore.pipeline.stages import Explain
from tests.helpers.mistakes import mistake

BURN = "import time\nwhile time.process_time() < {}: pass\n"


# ---- What they work on.


def test_pictures_differ_and_are_always_the_same() -> None:
    for size in (Size(500, 375), Size(620, 501)):
        made = [*pictures(size, 4)]
        assert len(set(made)) == 4
        assert made[2:] == [*pictures(size, 2, first=2)]
        assert {open_rgb(data).image.size for data in made} == {size}
        assert min(np.asarray(open_rgb(data).image).std() for data in made) > 20  # photographs, not a plain colour


def test_models_load_and_are_those_of_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's tower has the weights that `benchmarks.maps` would time, in our loader and in transformers'."""
    from benchmarks import maps

    small = maps.Shape(32, 16, 16, 2, 2, 8, 2, {})
    monkeypatch.setitem(maps.SHAPES, "B/32", small)
    models = write_models(tmp_path, "B/32", 40, 4)
    tower, sae = load_models(models.clip, models.sae)
    model, _ = maps.random_models(small, 40, 4, "cpu")
    pixels = torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
    expected = model(tower.normalise(pixels)).image_embeds
    assert (tower.embed(pixels) - expected).abs().max() < 1e-5
    settings = ordinary.Settings("", models.folder(), models.sae, 4, 2, 1, 1)
    process, theirs, _ = ordinary.load(settings, "CLIPImageProcessorPil")
    pictures_ = [Image.fromarray(one) for one in pixels.numpy()]
    assert (theirs(pixel_values=process(pictures_)).image_embeds - expected).abs().max() < 1e-5
    assert (sae.config.n_latents, sae.config.k) == (40, 4)


def test_all_decoders_see_the_same_pixels() -> None:
    """Those of plain Pillow: to the last bit, or within one level of grey where resizing is fast."""
    from saecore.images.preprocess import load_preprocess

    preprocess = load_preprocess("demo")
    for data in (*pictures(Size(200, 150), 2), *pictures(Size(90, 133), 2)):
        expected = decoders.by_pillow(data, preprocess).astype(int)
        for name, way in decoders.ways(preprocess).items():
            pixels = getattr(way(data), "pixels", expected)
            assert np.abs(pixels - expected).max() <= (name == decoders.FAST), name
    assert decoders.name_of_default() in decoders.ways(preprocess)


# ---- Steps.


def test_a_model_that_remembers_makes_the_same_tables() -> None:
    data = [*pictures(Size(80, 60), 3)]
    stage = Explain(ExplainConfig(clip="demo", sae="demo", k=12, batch_size=3))
    raw = {"image_id": [0, 1, 2], "uri": ["a"] * 3, "key": ["a", "b", "c"], "data": data}
    none = pa.nulls(3, pa.string())
    table = pa.table(raw | {"error": none, "error_detail": none})
    decoded = decoders.step_of_default(stage.infer.tower.preprocess)(table)
    assert steps.remembering(stage, decoded)(decoded).equals(stage(decoded))
    arrived = steps.transfer(decoded).numpy().tobytes()
    assert arrived == b"".join(decoded["pixels"].to_pylist())


@pytest.mark.slow
def test_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Each costs something, the whole costs more than its dearest step, and larger JPEGs take longer."""
    threads = torch.get_num_threads()
    asked = ["steps", "--shapes", "demo", "--sizes", "64x64", "640x480", "--megapixels", "0.02", "--rounds", "2"]
    assert main([*asked, "--json"]) == 0
    assert torch.get_num_threads() == threads
    told = json.loads(capsys.readouterr().out)
    small, large = (told["decoding"][size] for size in ("64 x 64", "640 x 480"))
    (model,) = told["models"].values()
    assert all(step["cpu_seconds"] > 0 for name, step in {**large, **model}.items() if name != "resize")
    assert large["decode"]["cpu_seconds"] > 3 * small["decode"]["cpu_seconds"]
    assert model["together"]["cpu_seconds"] > model["tower"]["cpu_seconds"]


# ---- A command, seen from outside.


def test_cpu_time_is_that_of_a_command_and_of_what_it_starts(tmp_path: Path) -> None:
    """It takes 0.3 s itself, and a process that it starts takes 0.6 s. /proc counts hundredths."""
    inner = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN.format(0.6)!r}])\n{BURN.format(0.3)}"
    watched = busy.watch([sys.executable, "-c", inner], tmp_path / "said", ["process_time() < 0.6", "no such thing"])
    own, others = watched.used(watched.began, watched.ended)
    # The inner process may burn for one look after the last time that it was seen.
    assert 0.9 - busy.EVERY - 0.1 < own < 1.3
    assert own + others < 2.5 * busy.cores() * watched.seconds
    assert watched.code == 0
    assert watched.began < watched.seen.pop("process_time() < 0.6") < watched.ended
    assert watched.seen == {}


def planted(samples: list[tuple[float, float, float]], seen: dict[str, float]) -> busy.Watched:
    return busy.Watched(0, samples[0][0], samples[-1][0], [busy.Sample(*one) for one in samples], seen)


def test_a_run_judged_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, a minute: the first of 4 chunks comes after 20 s, the last after 50 s, and others take a quarter of a core."""
    monkeypatch.setattr(busy, "cores", lambda: 2)
    samples = [(1000.0 + t, 1.5 * t, 1.75 * t) for t in range(61)]
    times = [
        f"1970-01-01T00:{minute:02d}:{second:02d}+00:00" for minute, second in ((17, 0), (17, 10), (17, 20), (17, 30))
    ]
    own = {"read": 0.5, "decode": 1.0, "explain": 2.0, "write": 0.5}
    events = [{"time": time, "images": 100, "seconds": own} for time in times]
    session = {"start": 9.0, "images": 41.0, "close": 2.0}
    run = job.judged(planted(samples, {job.RAY_BEGINS: 1006.0}), events, session, 1054.0, job.Need(0.05, 0.1))
    assert run["steady"] == pytest.approx(
        {"images_per_second": 10, "efficiency": 0.75, "efficiency_of_rest": 0.75 / 0.875, "own": 0.75, "others": 0.125}
    )
    assert run["whole"]["efficiency"] == pytest.approx(400 * 0.15 / 120)
    assert run["start"] == pytest.approx({"starting": 2, "models": 4, "Ray": 5, "actors": 5, "first chunk": 4})
    assert sum(run["start"].values()) == pytest.approx(run["start_seconds"]) == 20
    assert run["end_seconds"] == 10
    speeds, starts = job.told([{"way": "Ray", "round": 0, **run}])
    assert speeds[1][:4] == ("Ray", "10.0", "0.75", "0.86")
    assert starts[1][-2:] == ("20.0", "10.0")


@pytest.mark.slow
def test_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: the parts of the start add up, and what is needed is less than what is taken."""
    asked = ["job", "--shapes", "demo", "--images", "96", "--size", "80x60", "--chunk-size", "16", "--ways", "local"]
    assert main([*asked, "--rounds", "1", "--json"]) == 0
    (shape,) = json.loads(capsys.readouterr().out)["shapes"]
    (run,) = shape["runs"]
    assert (run["images"], run["steady_images"], run["chunks"]) == (
        96,
        80,
        8,
    )  # a shard has 24 images, so a chunk of 16 and one of 8
    assert sum(run["start"].values()) == pytest.approx(run["start_seconds"])
    assert all(seconds >= 0 for seconds in run["start"].values())
    assert 0 < run["whole"]["efficiency"] < run["whole"]["own"] <= 1.05


# ---- Peers.


def test_the_ordinary_script_finds_what_we_find(tmp_path: Path) -> None:
    """Its embeddings are those of our tower for the same files, so what is compared is the same work."""
    for number, data in enumerate(pictures(Size(90, 70), 3)):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    demo = Models("demo", "demo", 12)
    settings = ordinary.Settings(str(tmp_path), demo.folder(), "demo", 12, 2, 1, 2)
    process, model, _ = ordinary.load(settings, "CLIPImageProcessorPil")
    theirs = torch.cat([model(pixel_values=process(batch)).image_embeds for batch in ordinary.batches(settings, 2)])
    tower, _ = load_models("demo", "demo")
    seen = [decoders.by_pillow(path.read_bytes(), tower.preprocess) for path in sorted(tmp_path.iterdir())]
    assert (theirs - tower.embed(torch.from_numpy(np.stack(seen)))).abs().max() < 1e-4
    made = ordinary.WAYS["embed"](settings)
    assert made["images"] == 3
    assert made["seconds"] > 0
    assert ordinary.WAYS["rolled"](settings)["map"] > 0


def test_rows_of_peers_by_hand() -> None:
    """Ratios are to the ordinary script of the same round, and maps are added to what that took."""
    rounds = []
    for slow in (1.0, 2.0, 1.0):
        first = peers.Measured("the ordinary script", 4 / slow, 5 / slow, 0.3)
        scaled = peers.scaled(".. and each latent", 1.0 * slow, first)
        rounds += [first, scaled, peers.Measured("ours, local", 6 / slow, 10 / slow, 0.2)]
    rows = {row["way"]: row for row in peers.rows_of(rounds)}
    assert rows["ours, local"] == pytest.approx(
        {"way": "ours, local", "whole": 6, "whole_times": 1.5, "steady": 10, "steady_times": 2, "cpu_seconds": 0.2}
    )
    assert rows[".. and each latent"]["whole"] == pytest.approx(1 / 1.25)
    assert rows[".. and each latent"]["steady_times"] == pytest.approx(1 / 1.2 / 5)
    table = peers.told([*rows.values()])
    assert table[3] == ("ours, local", "6", "1.5", "10", "2", "200.0")
    assert table[2][-1] == ""


def test_what_is_not_installed_is_one_sentence(tmp_path: Path) -> None:
    settings = ordinary.Settings(str(tmp_path), "", "", 1, 1, 1, 1)
    said = peers.script("Daft", "daft", settings, sys.executable, tmp_path / "said", None)
    if ordinary.lacks("daft"):
        assert said == f"Daft was not measured: daft is not installed in {sys.executable}"
    broken = peers.script("nobody", "nothing", settings, sys.executable, tmp_path / "said", None)
    assert isinstance(broken, str)
    assert broken == f"nobody did not run in {sys.executable}: KeyError: 'nothing'"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["steps", "--sizes", "500"], "500: must be a width and a height in pixels, as 500x375"),
        (["steps", "--sizes", "8x8"], "8x8: each edge must be from 16 to 10000 pixels"),
        (["steps", "--shapes", "B/33"], "B/33 is no shape of a tower: must be of B/32, B/16, L/14, demo"),
        (["steps", "--rounds", "0"], "--rounds 0: must be at least 1"),
        (["job", "--images", "600"], "--images (600,): one number for each of --shapes, which are 2"),
        (["job", "--images", "100", "6000"], "--images 100: at least three chunks of --chunk-size 64"),
        (["job", "--ways", "dask"], "--ways dask: must be of local, Ray"),
        (["peers", "--k", "40", "--latents", "30"], "--k 40: the SAE has --latents 30"),
        (["peers", "--images", "100"], "--images 100: must be at least 192"),
        (["peers", "--peer-python", "/no/python"], "--peer-python /no/python: there is no such file"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(main, arguments, capsys).startswith(said)


def test_photographs_that_are_not_installed_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    assert "scikit-image and scikit-learn" in mistake(main, ["steps"], capsys)


def test_fast_pixels_are_compared_with_exact_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pixels", "--images", "4", "--sizes", "96x80", "64x64", "--json"]) == 0
    large, small = json.loads(capsys.readouterr().out)["rows"]
    assert (large["model"], large["side"], small["model"], small["side"]) == ("B/32", 224, "demo", 64)
    assert 0 < small["by_one"] < 0.05  # none in those of 64 x 64, which the demo's CLIP takes as they are
    assert small["at_most"] <= 2
    assert "--images 1: must be at least 2" in mistake(
        main, ["pixels", "--images", "1", "--sizes", "96x80", "64x64"], capsys
    )
