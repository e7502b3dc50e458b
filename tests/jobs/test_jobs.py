"""The main job end to end, on a real local Ray: the same rows whatever happens, a row for every image, clear mistakes."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from jobs import commands, explain, pipeline
from jobs.summaries import run_summary
from saecore import schema
from saecore.demo import drawing, outlines, scenes, writing
from saecore.methods import METHODS, OF_EMBEDDING
from saecore.numbering import shard_of
from saecore.pipeline import isolation
from saecore.pipeline.clock import Clock
from saecore.pipeline.stages import Decode, Explain
from saecore.runs.files import EXPLAINED, open_dataset
from saecore.runs.record import read_record
from saecore.sae.checkpoints import from_tensors, load_sae
from tests.conftest import N_SCENES, command
from tests.helpers.hostile import png
from tests.helpers.mistakes import mistake
from tests.helpers.photographs import photographs

ROOT = Path(__file__).parent.parent.parent


def rows(run: Path, table: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """A table's rows by (image_id, latent), or by image_id."""
    rows_of_table = open_dataset(str(run), table).to_table().to_pylist()
    by_key = {(row["image_id"], row.get("latent")): row for row in rows_of_table}
    assert len(by_key) == len(rows_of_table), "a row was written twice"
    return by_key


def assert_same_rows(one: Path, other: Path) -> None:
    """Ids and latents are equal, numbers within 1e-4, maps within one step of their 8 bits."""
    for table, close, exact in (
        ("images", ("embedding", "cosine", "fvu"), ("uri", "key", "width", "height", "format", "l0", "sinks", "error")),
        ("activations", ("activation", "pre_activation"), ("rank",)),
        ("maps", ("scale", "pre_activation", "remainder", "sink_share"), ("method", "target")),
    ):
        a, b = rows(one, table), rows(other, table)
        assert a.keys() == b.keys()
        for key in a:
            assert [a[key][name] for name in exact] == [b[key][name] for name in exact]
            for name in close:
                np.testing.assert_allclose(a[key][name], b[key][name], rtol=1e-4, atol=1e-4)
    a, b = rows(one, "maps"), rows(other, "maps")
    steps = np.array(
        [np.abs(np.subtract(*(np.frombuffer(r[key]["map"], np.int8).astype(int) for r in (a, b)))) for key in a]
    )
    assert steps.max() <= 1
    assert (steps > 0).mean() < 1e-3  # a value on the edge between two steps falls to either side


def test_tables_are_as_the_design_says(local_run: Path) -> None:
    for table, expected in (
        ("images", schema.IMAGES),
        ("activations", schema.ACTIVATIONS),
        ("maps", schema.maps_schema(64)),
    ):
        assert open_dataset(str(local_run), table).schema.remove_metadata() == expected
    images, k = rows(local_run, "images"), 12
    assert len(images) == N_SCENES
    assert {row["error"] for row in images.values()} == {None}
    assert {shard_of(key[0]) for key in images} == {0, 1, 2}
    assert len(rows(local_run, "activations")) == len(rows(local_run, "maps")) == N_SCENES * k
    record = json.loads((local_run / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["worst_completeness_error"] < 1e-5
    assert (local_run / "preview.png").stat().st_size > 10_000


def test_the_demo_explains_all_its_scenes(demo_run: Path) -> None:
    images = rows(demo_run, "images")
    assert len(images) == 512
    assert {row["error"] for row in images.values()} == {None}
    for table in ("activations", "maps"):
        assert set(Counter(image_id for image_id, _ in rows(demo_run, table)).values()) == {12}


def test_maps_point_at_the_object_that_their_latent_follows(demo_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Planted truth. Latents that follow one colour or shape are chosen on half of the scenes, by activation alone; on the
    other half the maximum of their map has to lie on an object of that colour or shape, whose true mask the scene knows."""
    keys = {key[0]: row["key"] for key, row in rows(demo_run, "images").items()}
    truth = {image: scenes.scene_at(scenes.SEED_DEMO, int(Path(key).stem)) for image, key in keys.items()}
    order = sorted(truth)
    chosen, judged = order[::2], set(order[1::2])
    fired: dict[int, dict[int, float]] = {}
    for (image, latent), row in rows(demo_run, "activations").items():
        if row["activation"] > 0:
            fired.setdefault(latent, {})[image] = row["activation"]
    followed = {}
    for latent, activations in fired.items():
        scores = np.array([activations.get(image, 0.0) for image in chosen])
        for word in (*scenes.COLOURS, *outlines.SHAPES):
            shown = np.array([any(word in (t.colour, t.shape) for t in truth[image].things) for image in chosen])
            if (scores[shown] > 0).sum() >= 5 and roc_auc_score(shown, scores) > 0.9:
                followed[latent] = word
    hits, centre_hits, by_kind = [], [], Counter[tuple[str, bool]]()
    for (image, latent), row in rows(demo_run, "maps").items():
        if latent not in followed or image not in judged or image not in fired[latent]:
            continue
        word, scene = followed[latent], truth[image]
        wanted = [word in (thing.colour, thing.shape) for thing in scene.things]
        if not any(wanted):
            continue
        mask = np.asarray(drawing.visible(scene, 64)[wanted].any(axis=0))
        best = int(np.frombuffer(row["map"], np.int8).argmax())
        hit = on_mask(mask, 8 * (best // 8) + 4, 8 * (best % 8) + 4)
        hits.append(hit)
        centre_hits.append(on_mask(mask, 32, 32))
        by_kind["colour" if word in scenes.COLOURS else "shape", hit] += 1
    with capsys.disabled():
        print(
            f"\n{len(followed)} latents follow a colour or a shape; the map's maximum lies on the object in "
            f"{np.mean(hits):.1%} of {len(hits)} cases ({dict(by_kind)}), a centre-Gaussian's in {np.mean(centre_hits):.1%}"
        )
    assert len(followed) >= 8
    assert len(hits) >= 200
    assert np.mean(hits) >= 0.80


def on_mask(mask: np.ndarray, y: int, x: int) -> bool:
    """Whether the mask fills at least half of the patch of 8 x 8 pixels around (y, x)."""
    return bool(mask[y - 4 : y + 4, x - 4 : x + 4].mean() >= 0.5)


@pytest.mark.parametrize(("batch_size", "replicas"), [(1, 1), (7, 2), (64, 2)])
def test_rows_do_not_depend_on_batches_or_replicas(
    batch_size: int, replicas: int, ray_session: None, shards: Path, local_run: Path, tmp_path: Path
) -> None:
    more = ("--batch-size", str(batch_size), "--replicas", str(replicas))
    assert explain.main(command(shards, tmp_path / "run", "--ray", *more)) == 0
    assert_same_rows(tmp_path / "run", local_run)
    prints = [json.loads((run / "run.json").read_text())["fingerprint"] for run in (tmp_path / "run", local_run)]
    assert prints[0] == prints[1]
    log = tmp_path / "run" / "run.log"
    assert not re.search(r" E |ERROR|Traceback", log.read_text() if log.exists() else "")


def test_an_msae_file_explains_as_the_sae_it_was_made_of(shards: Path, local_run: Path, tmp_path: Path) -> None:
    """The embedded SAE in MSAE's published form: name, tensors, pickled NumPy scalar."""
    sae = load_sae("demo")
    model = OrderedDict((name, t.clone()) for name, t in sae.state_dict().items() if name not in ("mean", "scale"))
    model["latents_activation_frequency"] = torch.zeros(sae.config.n_latents, dtype=torch.int64)
    scaling = {"mean_center": sae.mean.clone(), "scaling_factor": float(sae.scale), "target_norm": np.float64(128**0.5)}
    name = (
        f"{sae.config.n_latents}_128_TopKReLU_{sae.config.k}_UW_False_False_0.0_scenes_demo_train_image_40000_128.pth"
    )
    torch.save({"model": model, **scaling}, tmp_path / name)
    assert explain.main([*command(shards, tmp_path / "out", "--local"), "--sae", str(tmp_path / name)]) == 0
    assert_same_rows(local_run, tmp_path / "out")


@pytest.mark.parametrize("normalise", ["none", "layer_norm", "constant_norm"])
def test_maps_of_an_sae_with_thresholds_and_a_normaliser_are_exact(
    shards: Path, tmp_path: Path, normalise: str
) -> None:
    """How many latents fire differs from image to image; those kept beyond them have maps too."""
    demo = load_sae("demo")
    config = dataclasses.replace(demo.config, architecture="jumprelu", k=0, normalise=normalise)
    sae = from_tensors(config, {**demo.state_dict(), "threshold": torch.full((config.n_latents,), 1.0)}, "test")
    sae.save(tmp_path / "sae")
    out = tmp_path / "out"
    assert explain.main([*command(shards, out, "--local"), "--sae", str(tmp_path / "sae"), "--k", "20"]) == 0
    images, kept = rows(out, "images"), rows(out, "activations").values()
    l0 = {row["l0"] for row in images.values()}
    assert len(l0) > 3
    assert min(l0) < 20
    fires = Counter(row["image_id"] for row in kept if row["activation"] > 0)
    assert all(fires[image_id] == min(row["l0"], 20) for (image_id, _), row in images.items())
    assert len(kept) == 20 * N_SCENES
    assert json.loads((out / "run.json").read_text())["worst_completeness_error"] < 1e-4


@pytest.mark.slow
def test_all_methods_and_targets_in_one_run(shards: Path, local_run: Path, tmp_path: Path) -> None:
    """The same kept latents and `contrib` maps as by default; a remainder only where maps add up; every target by every
    method, a latent that is kept and asked for once."""
    out = tmp_path / "out"
    targets = ["kept", "latents:3,60", "text:a red square", "concept:red"]
    more = ["--local", "--limit", "16", "--method", ",".join(OF_EMBEDDING), "--subsets", "96", "--targets", *targets]
    assert explain.main([*command(shards, out), *more]) == 0
    kept, before, others = (
        rows(run, table) for run, table in ((out, "activations"), (local_run, "activations"), (local_run, "maps"))
    )
    assert kept.keys() <= before.keys()
    maps = open_dataset(str(out), "maps").to_table().to_pylist()
    by_method: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {name: {} for name in OF_EMBEDDING}
    for row in maps:
        by_method[row["method"]][row["image_id"], row["latent"], row["target"]] = row
    assert sum(len(of_one) for of_one in by_method.values()) == len(maps)
    images = {image_id for image_id, _ in kept}
    expected: set[tuple[Any, ...]] = {(image_id, latent, None) for image_id, latent in kept} | {
        (i, latent, None) for i in images for latent in (3, 60)
    }
    expected |= {(i, None, target) for i in images for target in ("text: a red square", "concept: red")}
    for name, of_one in by_method.items():
        assert of_one.keys() == expected
        assert np.isnan([row["remainder"] for row in of_one.values()]).all() == (not METHODS[name].decomposes)
        for key, row in of_one.items():
            assert row["pre_activation"] == by_method["contrib"][key]["pre_activation"]
            if METHODS[name].decomposes:
                total = np.frombuffer(row["map"], np.int8).sum(dtype=int) * row["scale"] + row["remainder"]
                assert abs(total - row["pre_activation"]) <= 32 * row["scale"]  # 64 patches, each off by half a step
            if name in ("chefer", "legrad", "gradeclip", "rollout", "attention"):
                assert min(np.frombuffer(row["map"], np.int8)) >= 0
    for key in kept:
        row = by_method["contrib"][key[0], key[1], None]
        assert row["pre_activation"] == pytest.approx(kept[key]["pre_activation"], rel=1e-4, abs=1e-4)
        assert row["scale"] == pytest.approx(others[key]["scale"], rel=1e-4)
    assert all(
        -1 <= row["pre_activation"] <= 1 for key, row in by_method["contrib"].items() if key[2] == "text: a red square"
    )
    assert json.loads((out / "run.json").read_text())["worst_completeness_error"] < 1e-4


def test_maps_of_a_text_alone_point_at_it(shards: Path, tmp_path: Path) -> None:
    """No latents at all: the word itself, as a direction, found where its true mask is."""
    out = tmp_path / "out"
    assert (
        explain.main(
            [*command(shards, out, "--local"), "--targets", "no-kept", *(f"text:{word}" for word in scenes.COLOURS)]
        )
        == 0
    )
    keys = {key[0]: row["key"] for key, row in rows(out, "images").items()}
    hits = []
    for row in open_dataset(str(out), "maps").to_table().to_pylist():
        scene = scenes.scene_at(scenes.SEED_DEMO, int(Path(keys[row["image_id"]]).stem))
        assert row["latent"] is None
        wanted = [row["target"] == f"text: {thing.colour}" for thing in scene.things]
        if any(wanted):
            best = int(np.frombuffer(row["map"], np.int8).argmax())
            mask = np.asarray(drawing.visible(scene, 64)[wanted].any(axis=0))
            hits.append(on_mask(mask, 8 * (best // 8) + 4, 8 * (best % 8) + 4))
    assert len(hits) > N_SCENES
    assert np.mean(hits) > 0.9


def test_the_same_command_again_does_nothing(shards: Path, local_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in local_run.rglob("*")}
    assert explain.main(command(shards, local_run, "--local")) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in local_run.rglob("*")} == before


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, from /proc: Ray's live in sessions of their own."""
    parents = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    descendants, layer = [], [pid]
    while layer:
        layer = [child for child, parent in parents.items() if parent in layer]
        descendants += layer
    return descendants


@pytest.mark.ray
def test_killed_in_the_middle_and_run_again(tmp_path: Path) -> None:
    """SIGKILL of the driver and of every Ray process, then the same command: the rest is done, and nothing else."""
    folder, out = tmp_path / "scenes", tmp_path / "run"
    writing.write_shards(folder, 192, 4)
    arguments = command(folder, out, "--batch-size", "4", "--ray")
    with (tmp_path / "output").open("w") as output:
        job = subprocess.Popen(
            [sys.executable, "-m", "jobs.explain", *arguments], cwd=ROOT, stdout=output, stderr=output
        )
        deadline = time.monotonic() + 120
        while len(list((out / "commits").glob("*.json"))) < 3:
            assert job.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        family = [job.pid, *descendants(job.pid)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.wait()
    done = {path.name: path.stat().st_mtime_ns for path in (out / "commits").glob("*.json")}
    assert 3 <= len(done) < 24
    assert json.loads((out / "run.json").read_text())["status"] == "running"

    arguments.remove("--ray")
    assert explain.main([*arguments, "--local"]) == 0
    assert {name: (out / "commits" / name).stat().st_mtime_ns for name in done} == done
    assert explain.main([*command(folder, tmp_path / "unbroken", "--batch-size", "4"), "--local"]) == 0
    assert_same_rows(out, tmp_path / "unbroken")


DEADLY = "000030.jpg"


class DeadlyDecode(Decode):
    """A decoder that takes its process down on one image, as a fault in native code would."""

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["error"] is None and row["key"] == DEADLY:
            os._exit(1)
        return super()._row(row)


class DeadlyExplain(Explain):
    """A stage that does so."""

    def __call__(self, decoded: pa.Table) -> pa.Table:
        if DEADLY in decoded.filter(decoded["pixels"].is_valid())["key"].to_pylist():
            os._exit(1)
        return super().__call__(decoded)


@pytest.mark.parametrize("step", ["decode", "explain"])
def test_an_image_that_kills_its_worker_becomes_a_row(
    step: str, ray_session: None, shards: Path, local_run: Path, tmp_path: Path
) -> None:
    arguments = command(shards, tmp_path / "run", "--limit", "32", "--ray")
    arguments[arguments.index("--chunk-size") + 1] = (
        "2"  # four deaths and not six: a replica takes seconds to come back
    )
    job = explain.prepare(commands.parse(explain.Arguments, arguments, "jobs.explain"), arguments)
    assert job is not None
    if step == "decode":
        job = job._replace(decode=DeadlyDecode(job.decode.preprocess))
    else:
        job = job._replace(stage=functools.partial(DeadlyExplain, *job.stage.args))
    for _ in pipeline.on_ray(job, job.run.pending()):
        pass
    job.run.finish(0, 0.0)
    images = rows(tmp_path / "run", "images")
    refused = {row["key"]: row["error"] for row in images.values() if row["error"] is not None}
    assert refused == {DEADLY: isolation.REASON}
    fine = {key[0] for key, row in images.items() if row["error"] is None}
    assert len(fine) == 31
    assert rows(tmp_path / "run", "maps").keys() == {key for key in rows(local_run, "maps") if key[0] in fine}


class RaisingDecode(Decode):
    """A decoder that raises for one image what nobody thought of."""

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["error"] is None and row["key"] == DEADLY and len(row["data"]) > 500:
            raise AssertionError("nobody thought of it")
        return super()._row(row)


class RaisingExplain(Explain):
    """A stage that does so."""

    def __call__(self, decoded: pa.Table) -> pa.Table:
        if any(row["key"] == DEADLY and row["pixels"] and any(row["pixels"]) for row in decoded.to_pylist()):
            raise AssertionError("nobody thought of it")
        return super().__call__(decoded)


class BrokenExplain(Explain):
    """A stage with a bug."""

    def __call__(self, decoded: pa.Table) -> pa.Table:
        raise AssertionError("a bug")


@pytest.mark.parametrize("flow", [pipeline.in_process, pipeline.on_ray], ids=["local", "ray"])
def test_an_image_for_which_a_step_raises_becomes_a_row_and_a_bug_does_not(
    flow: Callable[[pipeline.Job, pa.Table], Iterator[dict[str, Any]]],
    ray_session: None,
    shards: Path,
    local_run: Path,
    tmp_path: Path,
) -> None:
    for step in ("decode", "explain", "bug"):
        arguments = command(shards, tmp_path / step, "--limit", "32", "--ray")
        job = explain.prepare(commands.parse(explain.Arguments, arguments, "jobs.explain"), arguments)
        assert job is not None
        if step == "bug":
            job = job._replace(stage=functools.partial(BrokenExplain, *job.stage.args))
            with pytest.raises(Exception, match="a bug"):
                list(flow(job, job.run.pending()))
            assert job.run.commits() == []
            continue
        if step == "decode":
            job = job._replace(decode=RaisingDecode(job.decode.preprocess))
        else:
            job = job._replace(stage=functools.partial(RaisingExplain, *job.stage.args))
        list(flow(job, job.run.pending()))
        job.run.finish(0, 0.0)
        images = rows(tmp_path / step, "images")
        refused = {
            row["key"]: (row["error"], row["error_detail"]) for row in images.values() if row["error"] is not None
        }
        assert refused.keys() == {DEADLY}
        assert refused[DEADLY][0] == isolation.RAISED
        assert refused[DEADLY][1].startswith("AssertionError: nobody thought of it (")
        fine = {key[0] for key, row in images.items() if row["error"] is None}
        assert rows(tmp_path / step, "maps").keys() == {key for key in rows(local_run, "maps") if key[0] in fine}


@pytest.mark.parametrize("more", [["--local"], ["--ray"]], ids=["local", "ray"])
def test_a_palette_png_without_its_palette_is_one_row(more: list[str], ray_session: None, tmp_path: Path) -> None:
    """Alone and among others: 71 bytes that ended whole jobs."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "palette.png").write_bytes(png(20, 20, 8, 3, bytes(20)))
    for n_others in (0, 39):
        for index in range(n_others):
            Image.new("RGB", (20, 20), (index, 0, 0)).save(folder / f"{index}.png")
        out = tmp_path / f"run-{n_others}"
        assert explain.main(command(folder, out, *more)) == 0
        images = rows(out, "images").values()
        assert len(images) == n_others + 1
        assert {row["key"]: row["error"] for row in images if row["error"]} == {"palette.png": "corrupt"}


def real_photographs(folder: Path) -> list[str]:
    """JPEG and PNG files of them; returns their names."""
    for index, (name, pixels) in enumerate(sorted(photographs().items())):
        Image.fromarray(pixels).save(folder / f"{name}.{'png' if index % 2 else 'jpg'}")
    return [path.name for path in folder.iterdir()]


def scratched(png: bytes) -> bytes:
    """A hundred bytes in the middle replaced: nothing is missing, and it cannot be decoded."""
    middle = len(png) // 2
    return png[:middle] + b"\xff" * 100 + png[middle + 100 :]


def tiff_of_floats() -> bytes:
    sink = io.BytesIO()
    Image.new("F", (8, 8)).save(sink, "TIFF")
    return sink.getvalue()


def test_photographs_with_a_broken_file_of_each_kind(ray_session: None, tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    good = real_photographs(folder)
    whole = (folder / "astronaut.jpg").read_bytes()
    broken = {
        "empty.jpg": (b"", "empty"),
        "page.jpg": (b"<!DOCTYPE html><title>404</title>" * 30, "not-an-image"),
        "cut.jpg": (whole[: len(whole) // 2], "truncated"),
        "scratched.png": (scratched((folder / "coffee.png").read_bytes()), "corrupt"),
        "float.tiff": (tiff_of_floats(), "unsupported"),
    }
    for name, (content, _) in broken.items():
        (folder / name).write_bytes(content)
    Image.new("L", (20_000, 20_000)).save(folder / "bomb.png")
    gif = folder / "wrong-extension.png"
    Image.new("P", (30, 40)).save(gif, "GIF")
    assert explain.main(command(folder, tmp_path / "run", "--k", "4", "--ray")) == 0
    images = {row["key"]: row for row in rows(tmp_path / "run", "images").values()}
    assert {name: row["error"] for name, row in images.items() if row["error"]} == {
        "bomb.png": "too-large",
        **{name: reason for name, (_, reason) in broken.items()},
    }
    assert images.keys() == {*good, *broken, "bomb.png", gif.name}
    assert images[gif.name]["format"] == "GIF"
    assert (images["china.jpg"]["width"], images["china.jpg"]["height"]) == (640, 427)
    assert len(rows(tmp_path / "run", "maps")) == 4 * (len(good) + 1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--images", "/no/such/folder", "--clip", "demo", "--sae", "demo"], "/no/such/folder"),
        (["--images", "{shards}", "--clip", "/no/clip", "--sae", "demo"], "--clip /no/clip"),
        (["--images", "{shards}", "--clip", "demo", "--sae", "/no/sae"], "--sae /no/sae"),
        (["--images", "{shards}", "--clip", "demo", "--sae", "demo", "--k", "17"], "--k 17"),
        (["--images", "{shards}", "--clip", "demo", "--sae", "demo", "--batch-size", "-1"], "--batch-size -1"),
        (["--images", "{shards}", "--clip", "demo", "--sae", "demo", "--gpus-per-replica", "1"], "GPU"),
        (["--images", "{shards}", "--clip", "demo", "--sae", "demo", "--method", "tea-leaves"], "tea-leaves"),
        (["--images", "{shards}", "--clip", "demo", "--sae", "demo", "--targets", "words:red"], "words:red"),
        (["--images", "{shards}", "--clip", "demo", "--sae", "demo", "--targets", "latents:80"], "latents:80"),
        (["--images", "{shards}", "--clip", "demo", "--sae", "demo", "--layers", "6"], "--layers 6"),
        (["--images", "{shards}", "--clip", "demo", "--sae", "demo", "--norm", "loose"], "--norm 'loose'"),
        (["--images", "{shards}", "--clip", "demo"], "--sae"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    complaint: str,
    ray_session: None,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [argument.format(shards=shards) for argument in arguments]
    assert complaint in mistake(explain.main, [*given, "--out", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


def test_help_says_what_is_needed_and_titles_the_options_of_methods(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        explain.main(["--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Needs --images, --clip and --sae, or --demo in place of these three; and --out." in said
    assert "methods' options" in said
    listed = said.partition("--method STR")[2].partition(", joined by commas")[0]
    words = re.findall(r"\b(\w+)(?: \([a-z ]+\))?(?:,|$)", listed.partition("one or several of")[2])
    assert tuple(words) == OF_EMBEDDING
    assert "options options" not in said


def test_an_argument_that_does_not_exist_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        explain.main(["--imagse", "x"])
    assert ended.value.code == 2


def test_another_configuration_into_the_same_run_is_refused(
    shards: Path, local_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "k was 12, now 4" in mistake(explain.main, command(shards, local_run, "--local", "--k", "4"), capsys)


@pytest.mark.parametrize(
    ("content", "complaint"), [("", "is damaged: Expecting value"), ("[]", "is not what a run writes")]
)
def test_a_damaged_record_is_told_by_the_name_of_its_file(
    content: str, complaint: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)
    said = mistake(explain.main, command(shards, tmp_path / "run", "--local"), capsys)
    assert said.startswith(f"--out {tmp_path}/run/run.json {complaint}")


def test_a_complete_run_says_what_has_changed_in_its_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gone and changed shards take nothing from it: exit code 0, no work. New ones are no part of it: refused."""
    folder, out = tmp_path / "scenes", tmp_path / "run"
    writing.write_shards(folder, 16, 2)
    first, second = sorted(folder.iterdir())
    arguments = command(folder, out, "--local")
    assert explain.main(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "run.log"}

    def again(code: int) -> str:
        capsys.readouterr()
        assert explain.main(arguments) == code
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "run.log"} == before
        said = capsys.readouterr()
        return said.out + said.err

    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    said = again(0)
    assert f"changed since the run was made: 1 changed in size or time ({second})" in said
    assert "is complete: nothing to do" in said
    second.unlink()
    said = again(0)
    assert f"changed since the run was made: 1 no longer listed ({second})" in said
    assert "is complete: nothing to do" in said
    writing.write_shards(tmp_path / "more", 8, 1)
    new = next((tmp_path / "more").iterdir()).rename(folder / "new.tar")
    said = again(2)
    assert f"error: --out {out} is complete, and there are inputs that it does not have: " in said
    assert f"1 no longer listed ({second}), 1 new ({new}); --grow takes them in, and another --out begins" in said
    assert said.count("\n") == 1
    for path in folder.iterdir():
        path.unlink()
    assert f"2 no longer listed ({first}, {second})" in again(0)
    folder.rmdir()
    assert "2 no longer listed" in again(0)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "status": "running"}))  # stopped just before the end
    assert explain.main(arguments) == 0
    assert json.loads((out / "run.json").read_text())["status"] == "complete"
    assert "no such file" in mistake(explain.main, command(tmp_path / "nowhere", out, "--local"), capsys)


def test_chunks_that_are_not_done_need_their_inputs_as_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "scenes", tmp_path / "run"
    writing.write_shards(folder, 32, 2)
    first, second = sorted(folder.iterdir())
    arguments = command(folder, out, "--local")
    assert explain.main(arguments) == 0
    (out / "commits" / "chunk-00000003.json").unlink()
    whole, written = second.read_bytes(), second.stat().st_mtime_ns
    second.write_bytes(whole[:-4096])
    (folder / "new.tar").write_bytes(first.read_bytes())
    for more in ([], ["--grow"]):
        said = mistake(explain.main, [*arguments, *more], capsys)
        assert said.startswith(
            f"--out {out} is not complete, and its inputs have changed since it began: 1 changed in "
        )
        assert f"size or time ({second}); the same command resumes once they are as they were" in said
    assert "holds a run made otherwise" in mistake(explain.main, [*arguments, "--k", "4"], capsys)
    second.write_bytes(whole)
    os.utime(second, ns=(written, written))
    said = mistake(explain.main, arguments, capsys)
    assert said.startswith(f"--out {out} is not complete, and there are inputs that it does not have: 1 new (")
    (folder / "new.tar").unlink()
    first.unlink()  # its chunks are done
    assert explain.main(arguments) == 0
    assert f"inputs have changed since the run was made: 1 no longer listed ({first})" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--local"], ["--ray"]], ids=["local", "ray"])
def test_a_shard_that_is_lost_after_the_plan_is_told_at_the_end(
    more: list[str], ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "scenes", tmp_path / "run"
    writing.write_shards(folder, 48, 3)
    one, two, three = sorted(folder.iterdir())
    three.write_bytes(three.read_bytes().rstrip(b"\0"))  # damaged before: its end is not known
    arguments = command(folder, out, *more)
    job = explain.prepare(commands.parse(explain.Arguments, arguments, "jobs.explain"), arguments)
    assert job is not None
    whole = two.read_bytes()
    one.unlink()
    two.write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert pipeline.complete(job, commands.parse(explain.Arguments, arguments, "jobs.explain"), Clock())
    record = job.run.record()
    said = run_summary(str(out), record)
    errors = Counter(row["error"] for row in rows(out, "images").values())
    lost = errors["damaged-shard"] - 1
    assert 16 < lost < 32
    document = json.loads((out / "run.json").read_text())
    assert document["lost"] == {"shards": 2, "first": [str(one), str(two)], "images": lost}
    assert document["damaged"] == {"shards": 1, "first": [str(three)]}
    assert (
        f"warning       {lost} images of 2 shards ({one}, {two}) could not be read: damaged or gone after the run was"
        in said
    )
    assert f"warning       1 shard ({three}) ended in damage when the run was planned" in said
    assert explain.main(arguments) == 0
    said = capsys.readouterr().out
    assert f"1 no longer listed ({one}), 1 changed in size or time ({two})" in said
    assert "is complete: nothing to do" in said


def test_a_run_without_losses_warns_of_nothing(local_run: Path) -> None:
    assert not {"lost", "damaged"} & json.loads((local_run / "run.json").read_text()).keys()
    assert "warning" not in run_summary(str(local_run), read_record(str(local_run)))


def test_dry_run_says_what_and_writes_nothing(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main(command(shards, tmp_path / "run", "--local", "--dry-run", "--limit", "20")) == 0
    assert "would explain 20 images of 2 shards in 3 chunks" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_duckdb_reads_what_was_written(local_run: Path) -> None:
    """Without this package: the stored map, decoded by hand, and its remainder add up to the pre-activation."""
    table = duckdb.sql(
        f"""SELECT map, scale, remainder, kept.pre_activation FROM '{local_run}/maps/*.parquet'
            JOIN '{local_run}/activations/*.parquet' AS kept USING (image_id, latent)"""
    ).to_arrow_table()
    maps = (
        np.frombuffer(b"".join(table["map"].to_pylist()), np.int8).reshape(-1, 64) * table["scale"].to_numpy()[:, None]
    )
    total = maps.sum(1) + table["remainder"].to_numpy()
    rounding = table["scale"].to_numpy() * 0.5 * 64**0.5 * 3  # 64 errors of at most half a step, as a random walk
    assert (np.abs(total - table["pre_activation"].to_numpy()) < rounding + 1e-4).all()


def test_arrow_tables_of_a_run_are_plain(local_run: Path) -> None:
    for table in EXPLAINED:
        assert not any(isinstance(field.type, pa.ExtensionType) for field in open_dataset(str(local_run), table).schema)
