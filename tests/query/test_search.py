"""Which names answer a query, in which order."""

import pytest

from saecore.query.search import matching

CALLED = [
    ("checkered", ["red"]),  # 0
    ("red star", ["crimson", "heart"]),  # 1
    ("purple", ["star", "ice-cream"]),  # 2
    ("starfish", ["Reddish sea"]),  # 3
    (None, []),  # 4
    ("Straße", ["100%"]),  # 5
]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (
            "red",
            [(0, 1), (1, 0), (3, 3)],
        ),  # a whole word of a name, of other words, the beginning of one; no "checkered"
        ("RED", [(0, 1), (1, 0), (3, 3)]),
        ("star", [(0, 1), (1, 2), (2, 3)]),
        ("purple star", [(1, 2)]),  # both occur, and the worse rank counts
        ("  star\tpurple ", [(1, 2)]),
        ("red star", [(0, 1), (3, 3)]),
        ("star red heart", [(1, 1)]),
        ("heckere", [(4, 0)]),  # inside a word, since nothing else has it
        ("im", [(4, 1)]),
        ("cream", [(1, 2)]),
        ("ice-cream", [(1, 2)]),
        ("ice-", [(3, 2)]),
        ("strasse", [(0, 5)]),
        ("100%", [(1, 5)]),
        ("%", [(4, 5)]),
        ("red green", []),
        ("", []),
        (" ", []),
    ],
)
def test_what_a_query_finds(query: str, found: list[tuple[int, int]]) -> None:
    assert matching(query, CALLED) == found
