"""Runs with next to nothing in them, through every job that reads a run: one image, equal ones, black ones, refused ones."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import explain, index, name, query, report
from saecore.demo import drawing, scenes
from saecore.query import results
from saecore.report.pages import Site
from saecore.report.views import Views
from tests.helpers.reading import Page, check_links

pytestmark = pytest.mark.slow


def photograph() -> bytes:
    return drawing.jpeg(scenes.scene_at(7, 3), 192)


def plain(side: int, colour: tuple[int, int, int]) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(sink, "PNG")
    return sink.getvalue()


FOLDERS: dict[str, Callable[[], list[bytes]]] = {
    "one image": lambda: [photograph()],
    "one refused image": lambda: [b"no image"],
    "two equal images": lambda: [photograph()] * 2,
    "17 equal images": lambda: [photograph()] * 17,
    "black images": lambda: [plain(64, (0, 0, 0))] * 3,
    "one of two refused": lambda: [photograph(), b"no image"],
    "images of one pixel": lambda: [plain(1, (number * 80, 10, 200)) for number in range(3)],
}


@pytest.fixture(scope="module", params=FOLDERS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In batches of 16, so that of 17 equal images one has a forward of its own, which rounds differently."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "images").mkdir()
    for number, data in enumerate(FOLDERS[request.param]()):
        (folder / "images" / f"{number:02}.jpg").write_bytes(data)
    given = ["--images", str(folder / "images"), "--clip", "demo", "--sae", "demo", "--out", str(folder / "run")]
    how = [
        "--batch-size",
        "16",
        "--keep-embeddings",
        "--local",
        "--targets",
        "kept",
        "text:a red square",
        "concept:red",
    ]
    assert explain.main([*given, *how]) == 0
    return folder / "run"


def test_every_job_reads_it(run: Path) -> None:
    """Pages with and without index and names, and every question."""
    images = len(list((run.parent / "images").iterdir()))
    before = run.parent / "before"
    assert report.main(["--run", str(run), "--out", str(before)]) == 0
    assert index.main(["--run", str(run)]) == 0
    assert name.main(["--run", str(run)]) == 0
    assert report.main(["--run", str(run)]) == 0
    for out in (before, run / "report"):
        check_links(out)
        assert len(list((out / "images").iterdir())) == images
    latents = [int(path.stem) for path in (run / "report" / "latents").iterdir()]
    for latent in (*latents[:1], 79):
        for question in ("top", "cofiring", "histogram"):
            assert query.main([question, str(run), str(latent)]) == 0
    for question, *about in (["image", "00.jpg"], ["maps", "00.jpg"], ["find", "red"], ["latents"]):
        assert query.main([question, str(run), *about]) == 0
    site = Site(Views(results.open(str(run))), live=True)
    assert all(site.latent(latent) for latent in range(80))
    assert all(site.image(view) for view in site.views.images(site.run.tables.numbering.image_ids(range(images))))
    assert all(
        [site.overview(), site.latent_list(site.views.by_rate, {}), site.image_list([]), site.search_results("red", 60)]
    )
    if (run / "preview.png").exists():
        assert np.asarray(Image.open(run / "preview.png")).std() > 0
    if images == 1:
        for path in (run / "report" / "latents").iterdir():
            page = Page(path)
            assert len(page.elements["rect"]) == 1
            assert any(": 1 image, at " in svg.get("aria-label", "") for svg in page.elements["svg"])
