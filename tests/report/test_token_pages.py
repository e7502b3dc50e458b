"""Pages of an SAE that reads patch tokens, in a real Chromium: where a latent is active stands beside what causes it."""

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jobs import report, run
from saecore.query import results
from saecore.report import display

if os.environ.get("REQUIRE_BROWSER") != "1":
    pytest.importorskip("playwright", reason="no playwright: pip install -e '.[test]'")
from playwright.sync_api import Page

from tests.helpers import browser as chrome
from tests.report.test_browser import chromium, drawn_over  # noqa: F401 - the fixture

GRID = 8


@pytest.fixture(scope="module")
def patches_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("patches") / "run"
    given = ["--images", str(shards), "--clip", "demo", "--sae", "demo-patches", "--pool", "max", "--out", str(out)]
    assert run.main([*given, "--method", "contrib,contrib_grad,activation", "--limit", "24", "--local"]) == 0
    return out


@pytest.fixture
def page(patches_run: Path, chromium: chrome.Browser) -> Iterator[Page]:  # noqa: F811
    context = chromium.new_context(viewport=chrome.DESKTOP)  # type: ignore[arg-type]
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.goto((patches_run / "report" / "images" / "0.html").as_uri())
    yield opened
    assert not wrong
    context.close()


def test_activation_and_cause_stand_side_by_side_patch_by_patch(page: Page, patches_run: Path) -> None:
    tile = page.locator("figure.tile").first
    assert tile.locator(".tag").all_inner_texts() == ["active", "cause"]
    opened = results.open(str(patches_run))
    latent = opened.latents_of(0)["latent"][0].as_py()
    for place, method in enumerate(["activation", "contrib"]):
        maps = opened.maps(0, method)
        values = maps.maps[maps.latents.index(latent)]
        limit = page.evaluate(f"limitOf(0, '{method}')")
        assert limit == pytest.approx(0.5 * np.abs(maps.maps).max(), rel=1e-4)
        url = tile.locator("canvas").nth(place).evaluate("canvas => canvas.toDataURL()")
        drawn = drawn_over(base64.b64decode(url.partition(",")[2]))
        opacity = 255 * display.MOST_OPAQUE * np.clip(np.abs(values) / limit, 0, 1)
        # Not smooth unless it is asked for: a whole patch has its value.
        for inside in (4, 12, 20):
            assert np.abs(drawn[inside::24, inside::24, 3] - opacity).max() <= 1
        assert (drawn[12::24, 12::24, 2][values > limit / 2] < 60).all(), "orange"


def test_readers_choose_the_cause_and_the_activation_stays(page: Page) -> None:
    select = page.get_by_label("Cause by")
    assert select.locator("option").all_inner_texts() == ["contrib", "contrib_grad"]
    tile = page.locator("figure.tile").first
    before = [canvas.evaluate("canvas => canvas.toDataURL()") for canvas in tile.locator("canvas").all()]
    select.select_option("contrib_grad")
    after = [canvas.evaluate("canvas => canvas.toDataURL()") for canvas in tile.locator("canvas").all()]
    assert before[0] == after[0]
    assert before[1] != after[1]
    legends = page.locator(".legend").first.locator("xpath=..").locator(".legend p:first-child").all_inner_texts()
    assert legends == [
        "orange: the latent is active there; activation",
        "orange adds, blue takes away; pre-activation units",
    ]
    assert page.locator(".legend .low").all_inner_texts()[0] == "0"
    tile.locator("button.map").first.click()
    assert page.locator(".readout").inner_text().endswith(" activation at each patch")


def test_pages_say_how_far_the_two_lie_apart(patches_run: Path, tmp_path: Path) -> None:
    opened = results.open(str(patches_run))
    known = opened.latents.to_pylist()
    row = next(row for row in known if row["images"])
    figures = opened.sql(
        """SELECT avg(rank_correlation) AS rank_correlation, avg(peak_distance) AS peak_distance FROM maps
        WHERE latent = ? AND method = 'contrib'""",
        row["latent"],
    ).to_pylist()[0]
    assert row["rank_correlation"] == pytest.approx(figures["rank_correlation"], rel=1e-5)
    assert row["peak_distance"] == pytest.approx(figures["peak_distance"], rel=1e-5)
    widest = opened.sql("SELECT avg(patches) AS n FROM activations WHERE latent = ? AND activation <> 0", row["latent"])
    assert row["patches"] == pytest.approx(widest["n"][0].as_py())
    page = (patches_run / "report" / "latents" / f"{row['latent']}.html").read_text()
    assert "cause and activation" in page
    assert "patches apart" in page
    overview = (patches_run / "report" / "index.html").read_text()
    assert "exact contribution of each patch to the tokens that make the value" in overview
    assert "not held: occlusion, attention" in " ".join(overview.split())


def test_a_run_without_a_cause_shows_the_activation_alone(shards: Path, tmp_path: Path) -> None:
    given = ["--images", str(shards), "--clip", "demo", "--sae", "demo-patches", "--pool", "sum", "--limit", "4"]
    assert run.main([*given, "--method", "activation", "--out", str(tmp_path / "run"), "--local"]) == 0
    assert report.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "pages")]) == 0
    page = (tmp_path / "pages" / "images" / "0.html").read_text()
    assert 'class="tag"' not in page
    assert 'data-method="activation"' not in page
