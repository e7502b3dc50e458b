"""What the search of pages finds, and in which order; that its script finds the same is tested in a browser."""

from pathlib import Path
from typing import Any

import pytest

from saecore.query import results, search
from saecore.query.finding import find_images, find_targets
from tests.helpers import planted


def named(*called: tuple[str | None, list[str], bool, float]) -> list[dict[str, Any]]:
    return [
        {"latent": number, "name": name, "words": [name, *others] if name else None, "valid": valid, "score": score}
        for number, (name, others, valid, score) in enumerate(called)
    ]


ROWS = named(
    ("checkered", ["red"], True, 3.0),
    ("red", ["star"], False, 5.0),
    ("red star", [], True, 1.0),
    ("redwood", [], True, 9.0),
    ("purple", ["star"], True, 2.0),
    (None, [], False, 0.0),
    ("Red", ["chequered"], True, 2.0),
)


@pytest.mark.parametrize(
    ("query", "latents"),
    [
        ("red", [6, 2, 1, 0, 3]),  # valid names first, then by score; then another word, then a beginning
        ("RED  star", [2, 1]),
        ("purple star", [4]),
        ("star purple", [4]),
        ("checkere", [0]),
        ("ecker", [0]),  # within a word, where nothing else is found
        ("purple red", []),
        ("", []),
    ],
)
def test_latents(query: str, latents: list[int]) -> None:
    assert search.latents(query, ROWS) == latents


def test_texts_and_concepts() -> None:
    assert find_targets(["text: a red square", "concept: red", "text: checkered"], "red") == [0, 1]
    assert find_targets(["text: a red square", "concept: red"], "red text") == [0]


KEYS = ["checkered.jpg", "IMG_0042.jpg", "redder_1.jpg", "art/red-star.png", "a red one.jpg", "100%_[1].jpg"]


@pytest.mark.parametrize(
    ("query", "keys"),
    [
        ("red", [3, 4, 2, 0]),
        ("0042", [1]),
        ("img 0042", [1]),
        ("IMG_0042.JPG", [1]),
        ("jpg red", [4, 2, 0]),
        ("%", [5]),
        ("[1]", [5]),
        ("1", [1, 2, 5]),  # the image of that number, then the word
        (str(planted.IDS["d.jpg"]), [4]),
        ("", []),
        ("red nowhere", []),
        ("9" * 30, []),
    ],
)
def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str, keys: list[int]) -> None:
    names = iter(KEYS)
    monkeypatch.setattr(planted, "IMAGES", [[(next(names), *rest) for _, *rest in chunk] for chunk in planted.IMAGES])
    run = results.open(planted.write(tmp_path / "run"))
    assert [key for _, key in find_images(run, query, 60)] == [KEYS[place] for place in keys]
    assert len(find_images(run, query, 1)) <= 1
