"""Pages in a real Chromium, from disk and from the explorer: no errors, maps as in `saecore.report.display`.

Pictures of all pages are left in runs/screenshots, for a person to look at.
"""

import base64
import io
import json
import os
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs import report
from saecore.report import display
from tests.helpers import album

if os.environ.get("REQUIRE_BROWSER") != "1":
    pytest.importorskip("playwright", reason="no playwright: pip install -e '.[test]'")
from playwright.sync_api import Browser, Page, Request

from tests.helpers import browser as chrome

PAGES = {
    "overview": "index.html",
    "latents": "latents.html",
    "images": "images.html",
    "search": "search.html?q=word 6",
    "latent": f"latents/{album.OFTEN}.html",
    "target": "targets/0.html",
    "image": "images/4.html",
    "hostile": f"images/{album.N_SCENES}.html",
    "wide": f"images/{album.N_SCENES + 1}.html",
    "refused": f"images/{album.N_SCENES + 2}.html",
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if chrome.installed() is None:
        assert os.environ.get("REQUIRE_BROWSER") != "1", "REQUIRE_BROWSER=1, and there is no Chromium"
        pytest.skip("no Chromium: apt-get install chromium, or name one in CHROMIUM")
    with chrome.chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def written(album_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a report on disk."""
    out = tmp_path_factory.mktemp("browser") / "report"
    assert report.main(["--run", str(album_run), "--out", str(out)]) == 0
    return out.as_uri()


@pytest.fixture(params=["written", "explorer"])
def address(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


class Watched:
    """A page, and all that must not happen on it."""

    def __init__(self, browser: Browser, address: str, **options: Any) -> None:
        self.address = address
        self.wrong: list[str] = []
        self.context = browser.new_context(viewport=chrome.DESKTOP, **options)  # type: ignore[arg-type]
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.wrong.append(f"a script ran: {dialog.message}"))
        self.page.on("request", self._is_ours)
        self.page.on("requestfailed", self._failed)
        self.page.on(
            "response", lambda got: self.wrong.append(f"{got.status}: {got.url}") if got.status >= 400 else None
        )

    def _is_ours(self, request: Request) -> None:
        if not request.url.startswith((f"{self.address}/", "data:")):
            self.wrong.append(f"elsewhere: {request.url}")

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the next page was opened before the icon had come
            self.wrong.append(f"{request.failure}: {request.url}")

    def open(self, name: str) -> Page:
        self.page.goto(f"{self.address}/{name}")
        return self.page


@pytest.fixture
def watched(chromium: Browser, address: str) -> Iterator[Watched]:
    found = Watched(chromium, address)
    yield found
    found.context.close()
    assert found.wrong == []


@pytest.mark.parametrize(
    ("address", "scheme", "size"),
    [("written", "light", "DESKTOP"), ("explorer", "dark", "PHONE")],
    indirect=["address"],
)
def test_every_page_opens_quietly(chromium: Browser, address: str, scheme: Any, size: str) -> None:
    found = Watched(chromium, address, color_scheme=scheme)
    found.page.set_viewport_size(getattr(chrome, size))
    kind = "disk" if address.startswith("file:") else "explorer"
    for name, path in PAGES.items():
        page = found.open(path)
        chrome.photograph(page, f"{kind}-{name}-{size.lower()}-{scheme}")
        widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1], f"{path} is wider than the window"
        broken = page.evaluate("[...document.images].filter((one) => !one.naturalWidth).map((one) => one.src)")
        assert broken == []
    found.context.close()
    assert found.wrong == []


def test_names_that_are_scripts_are_text(watched: Watched) -> None:
    page = watched.open(PAGES["hostile"])
    assert page.get_by_role("heading", level=1).inner_text() == album.HOSTILE
    assert page.get_by_text(f"text: {album.TEXT}").count() == 1
    page = watched.open(PAGES["latent"])
    assert page.get_by_role("heading", level=1).inner_text().startswith(f"Latent {album.OFTEN} {album.HOSTILE_NAME}")
    page.locator("button.map").first.click()
    assert page.get_by_role("dialog").count() == 1
    page = watched.open("search.html?q=<")
    for words in (album.HOSTILE, f"latent {album.OFTEN}, {album.HOSTILE_NAME} (not certain)"):
        page.get_by_role("link", name=words, exact=True).wait_for(timeout=3000)


def test_search(watched: Watched) -> None:
    page = watched.open(PAGES["latent"])
    page.keyboard.press("/")
    page.keyboard.type("word 6")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=word*6")
    first = page.locator("#results a").first
    first.wait_for(timeout=3000)
    assert first.inner_text() == "latent 6, word 6"
    page.keyboard.type("3")  # the box has the focus: results follow what is typed
    page.get_by_text("1 latent, 0 images for “word 63”").wait_for(timeout=3000)
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.wait_for_url("**/latents/63.html")
    page = watched.open("search.html?q=00000")
    page.get_by_role("link", name="000007.jpg").click()
    page.wait_for_url("**/images/7.html")
    page = watched.open("search.html?q=7 word")
    first.wait_for(timeout=3000)
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == "latent 7, word 7 ? (not certain)"
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "search"
    page = watched.open("search.html?q=nothing of the kind")
    page.get_by_text("0 latents, 0 images").wait_for(timeout=3000)


def test_results_have_pictures_and_file_names(watched: Watched) -> None:
    page = watched.open("search.html?q=0000")
    page.locator("#results li").first.wait_for(timeout=3000)
    assert page.locator("#results li").count() == album.N_SCENES
    assert page.locator("#results a").first.inner_text() == "000000.jpg"
    assert page.locator("#results").inner_text().count("image 0") == 0  # nobody knows an image by its number
    page = watched.open("search.html?q=broken")  # refused: it has no picture
    page.locator("#results img").first.wait_for(timeout=3000)
    chrome.settle(page)
    assert page.evaluate("[...document.querySelectorAll('#results img')].every((one) => one.naturalWidth > 0)")
    page = watched.open("search.html?q=word")
    page.locator("#results img").first.wait_for(timeout=3000)
    chrome.photograph(page, f"search-{'disk' if watched.address.startswith('file:') else 'explorer'}")
    assert page.get_by_text("names with ? did not pass").is_visible()
    assert page.locator("#results .unsure").count() > 0
    page = watched.open("search.html?q=word 62")
    page.locator("#results img").first.wait_for(timeout=3000)
    assert not page.get_by_text("names with ? did not pass").is_visible()


@pytest.mark.parametrize(
    "text", ["6 word", "runner-up 1", "RED", "red square", "ext: ", "00001", "jpg 7", "low high", "1", "%"]
)
def test_the_script_finds_what_the_explorer_finds(chromium: Browser, written: str, explorer: str, text: str) -> None:
    """Of the latents that the report holds. The list in it is what it looks through, so both go by the same rule."""
    found = Watched(chromium, written)
    page = found.open("search.html")
    ours: dict[str, Any] = page.evaluate("(text) => find(text)", text)
    held = page.evaluate("window.searchIndex.latents.map((one) => one[0])")
    with urllib.request.urlopen(f"{explorer}/search.json?q={urllib.parse.quote(text)}", timeout=20) as answer:
        theirs: dict[str, Any] = json.loads(answer.read())
    assert len(theirs["latents"]) < 60
    for kind in ("latents", "images", "targets"):
        kept = [one[0] for one in theirs[kind] if kind != "latents" or one[0] in held]
        assert [one[0] for one in ours[kind]] == kept
    found.context.close()
    assert found.wrong == []


def test_keys(watched: Watched) -> None:
    page = watched.open(PAGES["latent"])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("Enter")
    following = page.locator("a[rel=next]").get_attribute("href")
    page.keyboard.press("ArrowRight")
    page.wait_for_url(f"**/latents/{following}")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url(f"**/latents/{album.OFTEN}.html")
    page.keyboard.press("m")
    assert page.evaluate("choice.shown") is False
    page.locator("select[name=sign]").focus()
    page.keyboard.press("ArrowRight")  # the list's key, there
    assert page.url.endswith(f"/latents/{album.OFTEN}.html")
    page = watched.open(PAGES["image"])
    page.locator("button.map").first.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowUp")
    for _ in range(8):
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowRight")
    value = page.evaluate("decode(page.maps[0].by.contrib)[7]")
    words = page.locator(".readout").inner_text().replace("\N{MINUS SIGN}", "-")
    assert words.startswith("row 1, column 8: ")
    assert words.endswith(" pre-activation units")
    assert float(words.split()[4]) == pytest.approx(value, rel=0.1)
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.map") == "0"


def stored(page: Page, number: int, method: str) -> np.ndarray:
    """A map of the page, as Python reads it."""
    values = page.evaluate(f"[...decode(page.maps[{number}].by.{method})]")
    return np.array(values, np.float32).reshape(8, 8)


def test_a_map_opens_at_its_strongest_patch(watched: Watched) -> None:
    """That of the largest value, also where another patch weighs more against the target: the words beside it name both."""
    page = watched.open(PAGES["image"])
    maps = [stored(page, number, "contrib") for number in range(page.locator("button.map").count())]
    outweighed = next(number for number, one in enumerate(maps) if 0 < one.max() < -one.min())
    button = page.locator("button.map").nth(outweighed)
    places = [divmod(int(place), 8) for place in (maps[outweighed].argmax(), maps[outweighed].argmin())]
    most_for, against = (f"at row {row + 1}, column {column + 1}" for row, column in places)
    said = button.locator("canvas").get_attribute("aria-label") or ""
    assert said.endswith(f": strongest {most_for}; strongest against {against}")
    button.click()
    assert page.locator(".readout").inner_text().startswith(f"{most_for.removeprefix('at ')}: +")


def pixels(page: Page, number: int) -> np.ndarray:
    """uint8 (height, width, 4): colours and opacity of what is drawn over a picture."""
    canvas = f"document.querySelector('[data-map=\"{number}\"] canvas')"
    return drawn_over(base64.b64decode(page.evaluate(f"{canvas}.toDataURL()").partition(",")[2]))


def drawn_over(png: bytes) -> np.ndarray:
    """The same of a canvas that was saved as PNG."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def test_maps_are_drawn_as_in_python(watched: Watched) -> None:
    page = watched.open(PAGES["image"])
    limit = page.evaluate("limitOf(0, choice.method)")
    for number in (0, 1):
        relevance = stored(page, number, "contrib")
        spread = display.interpolate(relevance, 192, 192)
        small = page.evaluate(f"[...interpolate(decode(page.maps[{number}].by.contrib), 40, 56)]")
        np.testing.assert_allclose(
            np.array(small).reshape(40, 56), display.interpolate(relevance, 40, 56), atol=1e-5 * np.abs(relevance).max()
        )
        drawn = pixels(page, number)
        opacity = display.MOST_OPAQUE * np.clip(np.abs(spread) / limit, 0, 1)
        assert np.abs(drawn[..., 3] - 255 * opacity).max() <= 1
        full = drawn[..., 3] > 60  # where opacity is low, the canvas rounds colours
        assert full.any()
        colour = np.where(spread[full][:, None] > 0, display.POSITIVE, display.NEGATIVE)
        assert np.abs(drawn[full][:, :3] - colour).max() <= 3
    page.get_by_label("smooth").uncheck()
    np.testing.assert_allclose(
        pixels(page, 5)[12::24, 12::24, 3],
        255 * display.MOST_OPAQUE * np.clip(np.abs(stored(page, 5, "contrib")) / limit, 0, 1),
        atol=1,
    )


def test_sinks_are_hatched_and_leave_no_trace(watched: Watched) -> None:
    page = watched.open(PAGES["image"])
    sinks = np.zeros((8, 8), bool)
    sinks[[1, 1, 6], [2, 3, 7]] = True
    page.evaluate(f"page.maps[0].sinks = {np.flatnonzero(sinks).tolist()}; choice.mask = true; drawPage()")
    relevance = stored(page, 0, "contrib")
    kept = np.array(page.evaluate("[...without(decode(page.maps[0].by.contrib), page.maps[0].sinks)]")).reshape(8, 8)
    np.testing.assert_array_equal(kept[~sinks], relevance[~sinks])
    for row, column in np.argwhere(sinks):
        distance = np.where(sinks, np.inf, np.hypot(*(np.indices((8, 8)) - np.array([row, column])[:, None, None])))
        assert kept[row, column] in relevance[distance == distance.min()]
    drawn = pixels(page, 0).reshape(8, 24, 8, 24, 4).swapaxes(1, 2)
    lines = (drawn[..., 3] == 255).mean((2, 3))
    assert (lines[sinks] > 0.1).all()
    assert (lines[~sinks] == 0).all()


def test_controls(watched: Watched) -> None:
    page = watched.open(PAGES["image"])
    label, words = page.locator("button.map canvas").first, page.locator(".words").first
    assert page.locator("select[name=method]").input_value() == "contrib"  # the run's first
    assert "remainder" in words.inner_text()
    high = page.locator(".legend .high").first
    half = page.evaluate("page.sections[0].limits.contrib") / 2
    assert float(high.inner_text().removeprefix("≥ +")) == pytest.approx(half, rel=0.01)
    page.locator("input[name=scale]").fill("100")
    assert float(high.inner_text().removeprefix("+")) == pytest.approx(2 * half, rel=0.01)
    page.locator("select[name=sign]").select_option("-1")
    relevance = display.interpolate(stored(page, 0, "contrib"), 192, 192)
    np.testing.assert_array_equal(pixels(page, 0)[relevance > 0][:, 3], 0)
    page.locator("select[name=method]").select_option("chefer")
    assert "remainder" not in words.inner_text()
    assert "no units" in page.locator(".legend").first.inner_text()
    values = stored(page, 0, "chefer")
    row, column = divmod(int(values.argmax()), 8)
    assert (label.get_attribute("aria-label") or "").endswith(f"strongest at row {row + 1}, column {column + 1}")
    page = watched.open(PAGES["latent"])  # what was chosen holds on other pages
    assert page.locator("select[name=method]").input_value() == "chefer"
    assert page.locator("input[name=scale]").input_value() == "100"


def test_theme_and_contrast(watched: Watched) -> None:
    """WCAG AA: text at least 4.5 to its ground, the marks of charts and the ring of focus at least 3."""
    page = watched.open(PAGES["overview"])
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    contrasts(page)
    page.get_by_role("button", name="Dark").click()
    contrasts(page)
    page = watched.open(PAGES["latents"])
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.get_by_role("button", name="Light").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def contrasts(page: Page) -> None:
    least = {"ink": 4.5, "quiet": 4.5, "link": 4.5, "adds": 4.5, "bar": 3, "focus": 3}
    script = """(name) => {
        const probe = document.body.appendChild(document.createElement("i"));
        probe.style.color = `var(--${name})`;
        const found = getComputedStyle(probe).color;
        probe.remove();
        return found.match(/[0-9.]+/g).slice(0, 3).map(Number);
    }"""
    light = {name: luminance(page.evaluate(script, name)) for name in (*least, "ground", "surface")}
    for name, needed in least.items():
        for ground in ("ground", "surface"):
            pair = sorted([light[name], light[ground]])
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= needed, f"{name} on {ground}"


def luminance(colour: list[float]) -> float:
    """Relative, of sRGB, as WCAG 2 defines it."""
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in (c / 255 for c in colour)
    ]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_tables_sort(watched: Watched) -> None:
    page = watched.open(PAGES["latents"])
    page.get_by_role("button", name="Latent", exact=True).click()
    numbers = [int(text) for text in page.locator("tbody th").all_inner_texts()]
    assert numbers == sorted(numbers)
    page.get_by_role("button", name="Strongest", exact=True).click()
    values = page.locator("tbody td.number:nth-of-type(6)").all_inner_texts()
    assert [float(value) for value in values] == sorted(map(float, values), reverse=True)
    assert page.locator("[aria-sort=descending]").inner_text().startswith("Strongest")


def test_without_scripts(chromium: Browser, address: str) -> None:
    found = Watched(chromium, address, java_script_enabled=False)
    page = found.open(PAGES["image"])
    assert page.get_by_text("Maps are drawn by a script.").is_visible()
    assert "strongest" in page.locator(".words").first.inner_text()
    assert not page.locator("#controls").is_visible()
    assert page.get_by_role("img", name="map of latent").count() == 12
    found.context.close()
    assert found.wrong == []
