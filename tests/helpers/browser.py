"""A real headless Chromium, and pictures of pages for people to look at.

python -m tests.helpers.browser runs/demo/report            every kind of page, to runs/screenshots, and those that the pages
                                                            show to docs/
python -m tests.helpers.browser runs/patches/report 212     of an SAE that reads tokens, a latent's pictures to docs/patches.jpg
"""

import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

ROOT = Path(__file__).parent.parent.parent
SCREENSHOTS = ROOT / "runs" / "screenshots"

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

ARGUMENTS = [
    "--no-sandbox",  # CI is root in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def installed() -> str | None:
    """Where Chromium or Chrome is: $CHROMIUM, or a program of that name."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next((place for name in names if (place := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Started anew, with a profile of its own."""
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=installed(), args=ARGUMENTS) as browser,
    ):
        yield browser


def settle(page: Page) -> None:
    """Wait until the page's pictures are there, those below the fold too."""
    page.wait_for_load_state("load")
    page.evaluate(
        """async () => {
            const pictures = [...document.images];
            pictures.forEach((picture) => (picture.loading = "eager"));
            await Promise.all(pictures.map((picture) => picture.decode().catch(() => {})));
        }"""
    )


def photograph(page: Page, name: str, most: int = 6000) -> Path:
    """The whole page, or its upper part, as a PNG."""
    settle(page)
    path = SCREENSHOTS / f"{name}.png"
    width = page.viewport_size["width"] if page.viewport_size else 1280
    height = min(page.evaluate("document.documentElement.scrollHeight"), most)
    page.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": height})
    return path


def main(report: Path) -> None:
    """Every kind of page of the demo's report, light and wide, dark and narrow; those that docs/ has as JPEG."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    kinds = {"overview": "index.html", "latents": "latents.html", "latent": "latents/9.html", "image": "images/0.html"}
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    with chromium() as browser:
        for scheme in schemes:
            size = ViewportSize(width=1280 if scheme == "light" else 390, height=900)
            page = browser.new_page(viewport=size, color_scheme=scheme)
            for name, place in kinds.items():
                page.goto((report.resolve() / place).as_uri())
                taken = photograph(page, f"{report.parent.name}-{name}-{scheme}", 1100 if scheme == "light" else 6000)
                if scheme == "light" and name in ("overview", "latent"):
                    Image.open(taken).convert("RGB").save(ROOT / "docs" / f"{name}.jpg", quality=84, optimize=True)


def one_latent(report: Path, latent: str) -> None:
    """The strongest images of a latent with their maps, as docs/ has them."""
    with chromium() as browser:
        page = browser.new_page(viewport=ViewportSize(width=1280, height=900))
        page.goto((report.resolve() / "latents" / f"{latent}.html").as_uri())
        settle(page)
        box = page.locator("section").first.bounding_box()
        assert box is not None
        part = {"x": box["x"], "y": box["y"], "width": box["width"], "height": 600.0}
        taken = page.screenshot(full_page=True, clip=part)  # type: ignore[arg-type]
        Image.open(io.BytesIO(taken)).convert("RGB").save(ROOT / "docs" / "patches.jpg", quality=84, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        one_latent(Path(sys.argv[1]), sys.argv[2])
    else:
        main(Path(sys.argv[1]))
