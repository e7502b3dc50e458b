"""An SAE that reads patch tokens: from images to pages, beside transformers' hidden states and an SAE in NumPy."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CLIPVisionModelWithProjection, SiglipImageProcessor

from jobs import explain, name, query, report, run, verify
from saecore import heatmaps, schema
from saecore.hub import DEMO_CLIP
from saecore.methods import OF_TOKENS
from saecore.query import results
from saecore.runs.files import open_dataset
from saecore.sae.checkpoints import load_sae
from saecore.towers.loading import load_tower
from tests.conftest import N_SCENES, command
from tests.helpers.mistakes import mistake
from tests.helpers.towers import SIGLIP_SHAPES, hidden_state, random_sae, random_siglip

SITE, LAYER, K, GRID = "layer2.residual:patches", 2, 6, 8


def made(folder: Path, site: str) -> Path:
    """An SAE as wide as the demo's stream."""
    sae, tower = random_sae(n_inputs=128, n_latents=64, k=4), load_tower("demo")
    sae.config = dataclasses.replace(sae.config, site=site, model="demo", model_sha256=tower.sha256()[:16])
    sae.save(folder)
    return folder


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("tokens") / "sae", SITE)


def arguments(sae: Path, shards: Path, out: Path, *more: str) -> list[str]:
    given = ["--images", str(shards), "--clip", "demo", "--sae", str(sae), "--out", str(out), "--local"]
    return [*given, "--allow-poor-fit", "--k", str(K), *more]


@pytest.fixture(scope="module")
def by_max(sae: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole way, by every method, for kept latents and one more."""
    out = tmp_path_factory.mktemp("tokens") / "run"
    more = ["--pool", "max", "--method", ",".join(OF_TOKENS), "--targets", "kept", "latents:3"]
    assert run.main(arguments(sae, shards, out, *more)) == 0
    return out


def rows(run: Path, table: str) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = open_dataset(str(run), table).to_table().to_pylist()
    return listed


def test_tables_equal_a_numpy_sae_on_hidden_states(by_max: Path, sae: Path) -> None:
    """Kept latents, pooled activations, patches, and the activation maps of six images."""
    tables = results.open(str(by_max)).tables
    model = CLIPVisionModelWithProjection.from_pretrained(DEMO_CLIP).eval()
    tower, own = load_tower("demo"), load_sae(str(sae))
    images = [row for row in rows(by_max, "images") if row["error"] is None]
    assert len(images) == N_SCENES
    kept, maps = rows(by_max, "activations"), rows(by_max, "maps")
    for raw in tables.originals([row["image_id"] for row in images[:6]]):
        for row in raw.to_pylist():
            hidden = hidden_state(model, tower, row["data"], LAYER)[1:]
            x = (hidden.astype(float) - own.mean.numpy()) * float(own.scale) - own.pre_bias.numpy()
            p = x @ own.encoder.double().numpy() + own.latent_bias.numpy()
            a = np.maximum(p, 0) * (p >= np.sort(p, 1)[:, -own.config.k][:, None])
            ours = sorted((r for r in kept if r["image_id"] == row["image_id"]), key=lambda r: r["rank"])
            strongest = np.argsort(-a.max(0), kind="stable")[:K]
            assert [r["latent"] for r in ours] == strongest.tolist()
            np.testing.assert_allclose([r["activation"] for r in ours], a.max(0)[strongest], rtol=1e-4)
            np.testing.assert_allclose([r["pre_activation"] for r in ours], a.max(0)[strongest], rtol=1e-4)
            assert [r["patch"] for r in ours] == a[:, strongest].argmax(0).tolist()
            assert [r["patches"] for r in ours] == (a[:, strongest] > 0).sum(0).tolist()
            shown = {r["latent"]: r for r in maps if r["image_id"] == row["image_id"] and r["method"] == "activation"}
            assert shown.keys() == {*strongest.tolist(), 3}
            for latent, one in shown.items():
                values = heatmaps.decode(one["map"], one["scale"], (GRID**2,))
                np.testing.assert_allclose(values, a[:, latent], atol=a[:, latent].max() / 250 + 1e-6)


def test_the_embedding_is_the_whole_tower_s(by_max: Path, local_run: Path) -> None:
    ours, theirs = (sorted(rows(run, "images"), key=lambda row: row["image_id"]) for run in (by_max, local_run))
    np.testing.assert_allclose(
        [row["embedding"] for row in ours], [row["embedding"] for row in theirs], rtol=1e-4, atol=1e-4
    )


def test_maps_add_up_and_tell_how_far_they_lie_from_the_activation(by_max: Path) -> None:
    record = results.open(str(by_max)).record
    assert (record.site, record.pool, record.reads_tokens) == (SITE, "max", True)
    assert record.parts["site"] == f"{SITE} pooled by max"
    assert record.worst_completeness_error is not None
    assert 0 < record.worst_completeness_error < 2e-5
    maps = rows(by_max, "maps")
    assert {row["method"] for row in maps} == set(OF_TOKENS)
    values = {
        (r["image_id"], r["latent"], r["method"]): heatmaps.decode(r["map"], r["scale"], (GRID**2,)) for r in maps
    }
    compared = 0
    for row in maps[::7]:
        if row["method"] in ("activation", "attention"):
            assert row["rank_correlation"] is row["peak_distance"] is None
            continue
        own, active = (values[row["image_id"], row["latent"], method] for method in (row["method"], "activation"))
        if not active.any():
            assert row["rank_correlation"] is None
            continue
        compared += 1
        # SciPy's figure is that of tests/relevance/test_agreement.py: the ranks of small values are lost in 8 bits.
        assert -1 <= row["rank_correlation"] <= 1
        # Rounding can make two values equal, of which either may have been the largest.
        peaks = (np.stack(np.divmod(np.flatnonzero(one == one.max()), GRID), 1) for one in (own, active))
        apart = [np.hypot(*(here - there)) for here, there in itertools.product(*peaks)]
        assert np.isclose(row["peak_distance"], apart, atol=1e-5).any()
    assert compared > 100


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_other_pools_keep_other_latents(pool: str, by_max: Path, sae: Path, shards: Path, tmp_path: Path) -> None:
    more = ["--pool", pool, "--limit", "40"]
    assert explain.main(arguments(sae, shards, tmp_path / "run", *more)) == 0
    kept = rows(tmp_path / "run", "activations")
    maps = {(r["image_id"], r["latent"], r["method"]): r for r in rows(tmp_path / "run", "maps")}
    assert {method for _, _, method in maps} == {"contrib", "activation"}
    for row in kept[::11]:
        active = maps[row["image_id"], row["latent"], "activation"]
        values = heatmaps.decode(active["map"], active["scale"], (GRID**2,))
        expected = values.sum() if pool == "sum" else values.mean()
        assert row["activation"] == pytest.approx(expected, rel=0.05)
        assert row["activation"] == pytest.approx(row["pre_activation"], rel=1e-4)
    first = {(r["image_id"], r["latent"]) for r in kept}
    assert first != {(r["image_id"], r["latent"]) for r in rows(by_max, "activations") if r["image_id"] < 40}


def test_rows_do_not_depend_on_the_batch(by_max: Path, sae: Path, shards: Path, tmp_path: Path) -> None:
    more = ["--pool", "max", "--targets", "kept", "latents:3", "--limit", "14", "--batch-size", "1"]
    assert explain.main(arguments(sae, shards, tmp_path / "run", *more)) == 0
    alone, together = (
        {
            (r["image_id"], r["latent"]): heatmaps.decode(r["map"], r["scale"], (GRID**2,))
            for r in rows(run, "maps")
            if r["method"] == "contrib" and r["image_id"] < 14
        }
        for run in (tmp_path / "run", by_max)
    )
    assert alone.keys() == together.keys()
    for key, values in alone.items():
        np.testing.assert_allclose(values, together[key], atol=np.abs(values).max() / 100)


def test_cls_pooled_maps_say_nothing_of_a_patch(shards: Path, tmp_path: Path) -> None:
    sae = made(tmp_path / "sae", "layer3.residual:all")
    assert explain.main(arguments(sae, shards, tmp_path / "run", "--pool", "cls", "--limit", "20")) == 0
    kept = rows(tmp_path / "run", "activations")
    assert {row["patch"] for row in kept} == {None}
    assert any(row["patches"] for row in kept)
    assert sum(row["activation"] > 0 for row in kept) == 4 * 20


def test_siglip_has_patches(shards: Path, tmp_path: Path) -> None:
    """With random weights, and an SAE of its width."""
    model, _ = random_siglip(**SIGLIP_SHAPES[0])
    model.save_pretrained(tmp_path / "siglip")
    size = {"height": 32, "width": 32}
    SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path / "siglip")
    own = random_sae(n_inputs=32, n_latents=48, k=3)
    own.config = dataclasses.replace(own.config, site="layer1.residual:patches", model=str(tmp_path / "siglip"))
    own.save(tmp_path / "sae")
    given = ["--images", str(shards), "--clip", str(tmp_path / "siglip"), "--sae", str(tmp_path / "sae"), "--any-clip"]
    more = [
        "--method",
        ",".join(OF_TOKENS),
        "--pool",
        "mean",
        "--k",
        "6",
        "--limit",
        "12",
        "--allow-poor-fit",
        "--local",
    ]
    assert explain.main([*given, *more, "--out", str(tmp_path / "run")]) == 0
    record = results.open(str(tmp_path / "run")).record
    assert record.grid == (4, 4)
    assert record.worst_completeness_error is not None
    assert record.worst_completeness_error < 2e-5
    maps = rows(tmp_path / "run", "maps")
    assert len(maps) == 12 * 6 * len(OF_TOKENS)
    tower, raw = load_tower(str(tmp_path / "siglip")), results.open(str(tmp_path / "run")).tables.originals([0])
    x = hidden_state(model, tower, next(raw)["data"][0].as_py(), 1).astype(float)
    u = (x - own.mean.numpy()) * float(own.scale) - own.pre_bias.numpy()
    p = u @ own.encoder.double().numpy() + own.latent_bias.numpy()
    a = (np.maximum(p, 0) * (p >= np.sort(p, 1)[:, -3][:, None])).mean(0)
    kept = sorted((r for r in rows(tmp_path / "run", "activations") if r["image_id"] == 0), key=lambda r: r["rank"])
    np.testing.assert_allclose([r["activation"] for r in kept], np.sort(a)[::-1][:6], rtol=1e-4)


def test_index_queries_and_pages_take_them(by_max: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = results.open(str(by_max))
    assert opened.tables.schemas["activations"].names == schema.TOKEN_ACTIVATIONS.names
    assert opened.tables.reader is not None
    latent = opened.latents_of(0)["latent"][0].as_py()
    best = opened.top_images(latent, 3, maps=True)
    assert best.num_rows == 3
    fires = opened.sql(
        "SELECT max(activation) AS best, max(patches) AS widest FROM activations WHERE latent = ?", latent
    )
    assert fires["best"][0].as_py() == pytest.approx(best["activation"][0].as_py())
    assert 1 <= fires["widest"][0].as_py() <= GRID**2
    assert verify.main([str(by_max)]) == 0
    capsys.readouterr()
    assert query.main(["image", str(by_max), "0"]) == 0
    assert " patch  patches  " in capsys.readouterr().out.splitlines()[0]
    assert report.main(["--run", str(by_max), "--out", str(tmp_path / "pages")]) == 0
    page = (tmp_path / "pages" / "index.html").read_text()
    assert SITE in page
    assert "pooled by max" in page
    named = [row for row in opened.latents.to_pylist() if row["name"]]
    assert named
    assert all(row["by_data"] for row in named)
    said = mistake(name.main, ["--run", str(by_max), "--by", "decoder"], capsys)
    assert "inside the tower, where names are by data only" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "--pool: the SAE reads patches tokens, and one value of each image must be made of them"),
        (["--pool", "cls"], "--pool 'cls': the SAE reads patches tokens"),
        (
            ["--pool", "max", "--method", "chefer"],
            "--method chefer: has no meaning for an SAE that reads the tokens of a layer",
        ),
        (["--pool", "max", "--norm", "exact"], "--norm exact: where the SAE reads tokens"),
        (["--pool", "max", "--layers", "4"], "--layers 4: as far as the SAE's site, this model has 3"),
        (["--pool", "max", "--k", "65"], "--k 65: this SAE lets 64 latents fire"),
        (
            ["--pool", "max", "--targets", "text:red"],
            "--targets 'red': the SAE reads layer2.residual:patches, inside the tower",
        ),
    ],
)
def test_what_has_no_sense_there_is_refused(
    more: list[str], said: str, sae: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--images", str(shards), "--clip", "demo", "--sae", str(sae), "--out", str(tmp_path / "run"), "--local"]
    assert said in mistake(explain.main, [*given, *more], capsys)
    assert not (tmp_path / "run").exists()


def test_a_pool_where_nothing_is_pooled(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(explain.main, command(shards, tmp_path / "run", "--local", "--pool", "max"), capsys)
    assert "--pool max: the SAE reads one vector for each image, so there is nothing to pool" in said
    said = mistake(explain.main, command(shards, tmp_path / "run", "--local", "--method", "activation"), capsys)
    assert "--method activation: has no meaning for an SAE that reads one vector for each image" in said


def test_a_run_with_another_pool_is_another_run(
    by_max: Path, sae: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain.main(arguments(sae, shards, tmp_path / "run", "--pool", "max", "--limit", "8")) == 0
    capsys.readouterr()
    said = mistake(explain.main, arguments(sae, shards, tmp_path / "run", "--pool", "sum", "--limit", "8"), capsys)
    assert "pooled by" in said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["pool"] == "max"
