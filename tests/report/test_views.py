"""What pages say of the planted run, whose every number was worked out by hand, with and without an index."""

import math
from pathlib import Path

import numpy as np
import pytest

from jobs import index
from saecore.query import results
from saecore.query.histograms import Bins
from saecore.report.overview import histogram
from saecore.report.views import Views
from tests.helpers import planted
from tests.helpers.planted import IDS


@pytest.fixture(scope="module", params=[False, True], ids=["no index", "indexed"])
def views(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Views:
    uri = planted.write(tmp_path_factory.mktemp("planted") / "run")
    if request.param:
        assert index.main(["--run", uri]) == 0
    return Views(results.open(uri))


def test_latents(views: Views) -> None:
    assert [row["latent"] for row in views.latents] == [0, 1, 2, 3, 4, 5]
    assert [row["images"] for row in views.latents] == [4, 2, 1, 2, 0, 0]
    assert views.latents[0]["rate"] == 4 / 5
    assert [views.latents[0][name] for name in ("mean", "median", "max")] == [2.75, 3.0, 4.0]
    assert views.latents[0]["name"] is None
    assert views.by_rate == [0, 1, 3, 2]


def test_one_latent(views: Views) -> None:
    """Latent 0 fires for a, c, b, e with 4, 4, 2, 1. Its map is 0.5, -0.5, and 0.5 by contrib, 1 by chefer."""
    view = views.latent(0, strongest=2, spread=8)
    assert [section.title for section in view.sections] == ["Strongest images", "Across the rest of its range"]
    tiles = [[(tile.image["key"], tile.activation, tile.place) for tile in section.tiles] for section in view.sections]
    assert tiles == [
        [("a.jpg", 4.0, "1 of 4"), ("c.jpg", 4.0, "2 of 4")],
        [("b.jpg", 2.0, "3 of 4"), ("e.jpg", 1.0, "4 of 4")],
    ]
    for tile in (tile for section in view.sections for tile in section.tiles):
        assert list(tile.maps) == ["contrib", "chefer"]
        contrib, chefer = tile.maps.values()
        assert contrib.values == bytes([1, 255, 1])
        assert contrib[1:] == (
            0.5,
            (0.5, 1, 1),
            None,
            0.5,
            0.25,
            0.0,
        )  # step, strongest, against, sum, remainder, sinks
        assert chefer[2:5] == ((1.0, 1, 3), None, 1.0)
        assert tile.image["sinks"] == [2]
    assert [section.limits for section in view.sections] == [{"contrib": 0.5, "chefer": 1.0}] * 2
    assert sum(view.activations.counts) == 4
    assert (view.activations.counts[0], view.activations.counts[-1]) == (1, 2)
    assert (view.activations.edges[0], view.activations.edges[-1]) == (1.0, 4.0)
    assert [row["latent"] for row in view.co_firing] == [1, 2, 3]
    assert [row["share"] for row in view.co_firing] == [0.5, 0.25, 0.25]
    assert [row["lift"] for row in view.co_firing] == pytest.approx([1.25, 1.25, 0.625])


@pytest.mark.parametrize(
    ("latent", "strongest", "shown"), [(0, 3, [3, 1]), (0, 4, [4]), (0, 9, [4]), (2, 1, [1]), (4, 2, [])]
)
def test_images_of_a_latent(views: Views, latent: int, strongest: int, shown: list[int]) -> None:
    sections = views.latent(latent, strongest, spread=2).sections
    assert [len(section.tiles) for section in sections] == shown


def test_a_text(views: Views) -> None:
    view = views.target("text: x", strongest=2, spread=2)
    assert (view.target, sum(view.values.counts)) == ("text: x", 5)
    assert (view.values.edges[0], view.values.edges[-1]) == pytest.approx((0.1, 0.5))
    assert [section.title for section in view.sections] == ["Strongest images", "Across the rest of its range"]
    tiles = [tile for section in view.sections for tile in section.tiles]
    assert [(tile.image["key"], tile.place, tile.latent, tile.activation) for tile in tiles] == [
        ("e.jpg", "1 of 5", None, None),
        ("d.jpg", "2 of 5", None, None),
        ("c.jpg", "3 of 5", None, None),
        ("a.jpg", "5 of 5", None, None),
    ]
    assert [tile.pre_activation for tile in tiles] == pytest.approx([0.5, 0.4, 0.3, 0.1])
    assert {tuple(tile.maps) for tile in tiles} == {("contrib", "chefer")}
    assert {section.limits["contrib"] for section in view.sections} == {4.5}
    whole = views.target("text: x", strongest=9, spread=2).sections
    assert [len(section.tiles) for section in whole] == [5]


def test_images(views: Views) -> None:
    b, bad = views.images(np.array([IDS["b.jpg"], IDS["bad.jpg"]]))
    assert [section.title for section in b.sections] == ["Latents", "Texts"]
    latents, texts = b.sections
    assert [(tile.target, tile.activation, tile.place) for tile in latents.tiles] == [
        ("latent 1", 5.0, "1 of 2 kept"),
        ("latent 0", 2.0, "2 of 2 kept"),
    ]
    assert [(tile.target, tile.latent, tile.activation, tile.pre_activation) for tile in texts.tiles] == [
        ("text: x", None, None, pytest.approx(0.2))
    ]
    # Their scales are their own: a text's maps are cosines.
    assert (latents.limits["contrib"], texts.limits["contrib"]) == (1.0, 4.5)
    assert b.image["cosine"] == pytest.approx(0.6)
    assert (bad.image["error"], bad.image["error_detail"], bad.sections) == ("truncated", "at byte 7", [])
    assert [view.image["key"] for view in views.images(np.array([IDS["e.jpg"], 77, IDS["a.jpg"]]))] == [
        "e.jpg",
        "a.jpg",
    ]


def test_order_of_images(views: Views) -> None:
    assert views.run.tables.numbering.image_ids(range(6)).tolist() == list(IDS.values())


def test_overview(views: Views) -> None:
    view = views.overview
    assert (view.rates.edges[0], view.rates.edges[-1]) == (-1, 0)
    width = 1 / len(view.rates.counts)
    places = [int((1 + math.log10(rate)) / width) for rate in (0.8, 0.4, 0.4, 0.2)]
    assert view.rates.counts == np.bincount(places, minlength=24).tolist()
    assert view.figures["l0"] == {"mean": 2.0, "low": 2.0, "median": 2.0, "high": 2.0}
    # Cosines of a, b, c, d, e are 0.5 and a tenth of their place in the shard: 0.5, 0.6, 0.5, 0.6, 0.7.
    assert view.figures["cosine"] == pytest.approx({"mean": 0.58, "low": 0.5, "median": 0.6, "high": 0.68})
    assert list(view.histograms) == ["cosine"]  # of the others all images have the same
    assert (view.histograms["cosine"].counts[0], view.histograms["cosine"].counts[-1]) == (2, 1)
    assert sum(view.histograms["cosine"].counts) == 5
    assert [(row["key"], row["error"]) for row in view.refused] == [("bad.jpg", "truncated")]


def test_whole_numbers_have_bins_of_whole_width(views: Views) -> None:
    bins = histogram(views.run, "width", 10.0, 50.0)
    assert len(bins.edges) == len(bins.counts) + 1 == 25
    assert Bins(bins.edges[:2], bins.counts[:1]) == Bins([10.0, pytest.approx(10 + 40 / 24)], [1])  # type: ignore[list-item]
    assert histogram(views.run, "l0", 2, 60).edges == list(range(2, 63, 3))


def test_a_run_without_maps(tmp_path: Path) -> None:
    views = Views(results.open(planted.write(tmp_path / "run", methods=())))
    assert [len(section.tiles) for section in views.latent(0, 2, 2).sections] == [2, 2]
    [view] = views.images(np.array([IDS["a.jpg"]]))
    assert [tile.maps for tile in view.sections[0].tiles] == [{}, {}]
