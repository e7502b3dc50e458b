"""The explorer as a program sees it: pages of any latent and image, a search in the whole run, no way in from other sites."""

import io
import json
import urllib.error
import urllib.parse
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs import report
from saecore.report.explorer import listen
from tests.helpers import album
from tests.helpers.mistakes import mistake


def get(url: str, host: str = "") -> tuple[int, Message, bytes]:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def found(explorer: str, text: str) -> Any:
    status, _, content = get(f"{explorer}/search.json?q={urllib.parse.quote(text)}")
    assert status == 200
    return json.loads(content)


@pytest.mark.parametrize(
    "page",
    [
        "",
        "index.html",
        "latents.html",
        "latents/53.html",
        "targets/0.html",
        "images.html?from=20",
        "images/22.html",
        "search.html",
    ],
)
def test_pages(explorer: str, page: str) -> None:
    status, headers, content = get(f"{explorer}/{page}")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert b"<h1" in content
    assert b"data-live" in content


def test_any_latent_and_any_image_has_a_page(explorer: str) -> None:
    for latent in range(0, 80, 7):
        assert get(f"{explorer}/latents/{latent}.html")[0] == 200
    for image in range(0, album.N_IMAGES, 4):
        assert get(f"{explorer}/images/{image}.html")[0] == 200


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("latents/80.html", "this run has no latent 80: they are 0 to 79"),
        ("targets/1.html", "this run has no target 1: it has 1 texts and concepts"),
        (f"images/{album.N_IMAGES}.html", f"this run has no image {album.N_IMAGES}"),
        ("images/4294967296.html", "this run has no image 4294967296"),
        (f"images/{10**40}.html", "this run has no image"),
        *((f"{kind}s/{'9' * 6000}.html", f"this run has no {kind} 999") for kind in ("latent", "target", "image")),
        ("latents/abc.html", "this run has no latent abc"),
        ("latents/%00.html", "this run has no latent"),
        ("images/%D9%A3.html", "this run has no image"),  # the digit 3 of another script
        (f"images/{2**63}.html", "this run has no image"),
        ("targets/-1.html", "this run has no target -1"),
        (f"images.html?from={'9' * 6000}", "from=999"),
        (f"latents.html?from={'9' * 6000}", "from=999"),
        ("latents.html?from=-1", "from=-1"),
        ("latents.html?from=", "from=: the list has"),
        ("latents.html?from=%00", "from="),
        ("images.html?from=x", "from=x"),
        (f"images.html?from={album.N_IMAGES}", "the list has 25 entries"),
        ("static/../../pages.py", "Not Found"),
        ("static/%2e%2e/%2e%2e/pages.py", "Not Found"),
        ("nowhere", "Not Found"),
    ],
)
def test_what_there_is_not(explorer: str, page: str, words: str) -> None:
    status, _, content = get(f"{explorer}/{page}")
    assert status == 404
    assert words in content.decode()
    assert b"Traceback" not in content
    assert len(content) < 10_000


@pytest.mark.parametrize(
    "asked", ["9" * 6000, "a" * 20_000, "\0", "a\0b", "'", '"', "\\", "_", "%", "1\n2", "\N{GRINNING FACE}"]
)
def test_whatever_is_searched_for_is_an_answer(explorer: str, asked: str) -> None:
    assert found(explorer, asked).keys() == {"latents", "images", "targets"}


@pytest.mark.parametrize("query", ["", "?q", "?q=%ff", "?q=%ED%A0%80", "?q=a&q=b", "?x=1"])
def test_a_search_that_is_none_is_an_answer(explorer: str, query: str) -> None:
    status, _, content = get(f"{explorer}/search.json{query}")
    assert status == 200
    assert json.loads(content).keys() == {"latents", "images", "targets"}


def test_pictures(explorer: str) -> None:
    status, headers, content = get(f"{explorer}/pictures/0.webp")
    assert (status, headers["Content-Type"]) == (200, "image/webp")
    assert Image.open(io.BytesIO(content)).size == (192, 192)
    for none in (album.N_IMAGES - 1, 77, 10**40, "9" * 6000, "x"):  # refused, and never there
        status, headers, content = get(f"{explorer}/pictures/{none}.webp")
        assert (status, headers["Content-Type"]) == (200, "image/svg+xml")
        assert b"picture not found" in content


def test_search(explorer: str) -> None:
    assert [row[0] for row in found(explorer, "53")["latents"]] == [album.OFTEN]
    assert found(explorer, "word 61")["latents"][0][:6] == [61, "word 61", ["runner-up 61"], 1, False, 0.5]
    assert [row[0] for row in found(explorer, "6 word")["latents"]][:2] == [6, 60]  # whole words, then what begins so
    assert [row[0] for row in found(explorer, "Runner-Up 61")["latents"]] == [61]
    assert len(found(explorer, "word")["latents"]) == 60
    assert found(explorer, "RED</b>")["targets"] == [[0, f"text: {album.TEXT}"]]
    assert found(explorer, "<script>")["images"] == [[album.N_SCENES, album.HOSTILE]]
    assert [row[1] for row in found(explorer, "00001")["images"]] == [
        f"{index:06d}.jpg"
        for index in (*range(10, 20), 1)  # those that begin so first
    ]
    for nothing in (
        "no such thing",
        "053",
        "' OR 1 = 1 --",
        "9" * 50,
        "9" * 6000,
        "a" * 20_000,
        "\0",
        "a\0b",
        "%",
    ):
        assert found(explorer, nothing) == {"latents": [], "images": [], "targets": []}


def test_other_sites_do_not_read_along(explorer: str) -> None:
    """A name that points here, in a visitor's browser, is another site's."""
    assert get(f"{explorer}/index.html", "evil.example")[0] == 400
    assert get(f"{explorer}/index.html", "localhost:8000")[0] == 200


def test_a_port_that_is_taken(album_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        said = mistake(report.main, ["--run", str(album_run), "--serve", "--port", port], capsys)
    assert said.startswith(f"--host, --port 127.0.0.1:{port}: Address already in use")
