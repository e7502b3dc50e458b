"""What latents.parquet says, against the planted run by hand and NumPy over whole tables."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from benchmarks import synthetic
from jobs import index
from saecore.query import results, statistics
from saecore.query.statistics import Limits
from saecore.runs.files import of_chunks, open_dataset, read_manifest
from saecore.schema import LATENTS
from tests.helpers import planted
from tests.helpers.planted import IDS


def test_the_planted_run(tmp_path: Path) -> None:
    uri = planted.write(tmp_path / "run")
    assert index.main(["--run", uri]) == 0
    found = results.open(uri).latents
    assert found.cast(LATENTS).column_names == found.column_names
    zero, one, _, three, four, five = found.to_pylist()
    assert zero["images"] == 4
    assert zero["rate"] == 4 / 5  # one of six was refused
    assert (zero["mean"], zero["max"], zero["median"]) == (11 / 4, 4.0, 3.0)
    assert (zero["q05"], zero["q25"], zero["q75"]) == (pytest.approx(1.15), 1.75, 4.0)
    assert zero["top_images"] == [IDS[key] for key in ("a.jpg", "c.jpg", "b.jpg", "e.jpg")]
    assert zero["top_activations"] == [4.0, 4.0, 2.0, 1.0]
    assert (zero["co_latents"], zero["co_share"]) == ([1, 2, 3], [0.5, 0.25, 0.25])
    assert zero["co_lift"] == pytest.approx([1.25, 1.25, 0.625])
    assert [row["dead"] for row in found.to_pylist()] == [False, False, False, False, True, True]
    assert (one["images"], three["top_images"]) == (2, [IDS["d.jpg"], IDS["e.jpg"]])
    # Maps of latent l by the first method are l + 1, -1 and 1: they cover (l + 2)^2 / (3 ((l + 1)^2 + 1)) of three patches.
    assert zero["maps"] == 4
    assert zero["extent"] == pytest.approx(4 / (3 * 2))
    assert three["extent"] == pytest.approx(25 / (3 * 17))
    assert (four["maps"], four["images"], four["mean"], four["top_images"]) == (1, 0, None, None)  # kept, never fires
    assert (five["maps"], five["extent"], five["co_latents"]) == (0, None, None)


def test_against_numpy(tmp_path: Path) -> None:
    """In many small ranges and groups, as a large run is counted."""
    run = synthetic.write_run(str(tmp_path / "run"), 300, latents=40, k=6, grid=(2, 3), chunk_size=32)
    assert index.main(["--run", run.uri]) == 0
    found = statistics.write(results.open(run.uri), Limits(rows=100, images=64, pairs=40 * 7)).to_pylist()
    rows = open_dataset(run.uri, "activations").to_table()
    latent, activation = rows["latent"].to_numpy(), rows["activation"].to_numpy()
    image_ids, image = np.unique(rows["image_id"].to_numpy(), return_inverse=True)
    fires = np.zeros((300, 40))
    fires[image, latent] = 1
    pairs, alone = fires.T @ fires, fires.sum(0)
    maps = open_dataset(run.uri, "maps").to_table()
    values = np.frombuffer(b"".join(maps["map"].to_pylist()), np.int8).reshape(-1, 6).clip(0).astype(float)
    extent = values.sum(1) ** 2 / (6 * (values**2).sum(1))
    for row in found:
        own = row["latent"]
        mine = activation[latent == own]
        assert row["images"] == len(mine)
        assert row["dead"] == (len(mine) == 0)
        if not len(mine):
            continue
        for name, share in statistics.QUANTILES.items():
            assert row[name] == pytest.approx(np.quantile(mine, share), rel=1e-6)
        assert row["mean"] == pytest.approx(mine.mean(dtype=float), rel=1e-6)
        assert row["extent"] == pytest.approx(extent[maps["latent"].to_numpy() == own].mean(), rel=1e-3)
        strongest = np.lexsort((image_ids[image[latent == own]], -mine))[: statistics.LISTED_IMAGES]
        assert row["top_images"] == image_ids[image[latent == own]][strongest].tolist()
        jaccard = pairs[own] / (alone[own] + alone - pairs[own])
        jaccard[[own, *np.flatnonzero(pairs[own] == 0)]] = -1
        others = np.lexsort((np.arange(40), -jaccard))[: min(statistics.LISTED_LATENTS, (jaccard > -1).sum())]
        assert row["co_latents"] == others.tolist()
        np.testing.assert_allclose(row["co_lift"], pairs[own, others] * 300 / (alone[own] * alone[others]), rtol=1e-5)


def test_lifts_of_large_counts_do_not_overflow(tmp_path: Path) -> None:
    """Two of three latents fire for each of 100,000 images: 33,000 pairs times 100,000 are more than 32 bits hold."""
    run = synthetic.write_run(str(tmp_path / "run"), 100_000, latents=3, k=2, grid=(1, 1), chunk_size=50_000)
    assert index.main(["--run", run.uri]) == 0
    for row in results.open(run.uri).latents.to_pylist():
        assert row["co_lift"] == pytest.approx([0.75, 0.75], abs=0.03)


def test_co_firing_of_a_large_run_is_counted_on_chunks_spread_over_it(tmp_path: Path) -> None:
    run = synthetic.write_run(str(tmp_path / "run"), 640, latents=40, k=6, grid=(2, 3), chunk_size=32)
    assert index.main(["--run", run.uri]) == 0
    found = statistics.write(results.open(run.uri), Limits(co_firing_images=160)).to_pylist()[0]
    assert found["images"] > 160
    some = of_chunks(read_manifest(run.uri), np.array([0, 4, 9, 14, 19]))
    rows = open_dataset(run.uri, "activations", some).to_table()
    own = rows["image_id"].filter(pc.equal(rows["latent"], 0))
    other = rows["image_id"].filter(pc.equal(rows["latent"], found["co_latents"][0]))
    assert found["co_share"][0] == pytest.approx(len(set(own.to_pylist()) & set(other.to_pylist())) / len(own))
