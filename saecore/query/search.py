"""Latents by their names: which names fit a query, and in which order. The search of pages follows the same rule.

The query is split at whitespace; upper and lower case are the same. Each word of the query has a rank for each latent:

    0   it is a whole word of the latent's name                 "star" in "red star"
    1   it is a whole word of another of the latent's words
    2   a word of the name begins with it                       "star" in "starfish"
    3   another of the latent's words begins with it
    4   it occurs inside a word of the name, or of another      "red" in "checkered"

All words of the query must occur, so that more words find fewer latents; the latent's rank is the worst rank of a word. Latents
of rank 4 count only if no latent of the run has a better rank.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

INSIDE = 4
"""The last rank."""

Called = tuple[str | None, Sequence[str]]
"""A latent's name, and its other words."""


def matching(query: str, called: Iterable[Called]) -> list[tuple[int, int]]:
    """(rank, place in `called`) of all that the query finds, the best rank first, then by place. No words find nothing."""
    wanted = query.casefold().split()
    ranks = ((_rank(wanted, one), place) for place, one in enumerate(called))
    matches = sorted((rank, place) for rank, place in ranks if rank is not None)
    best = matches[0][0] if matches else INSIDE
    return [(rank, place) for rank, place in matches if rank < INSIDE or best == INSIDE]


def latents(query: str, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The places of the rows of `latents.parquet` that the query finds by `name` and `words`. Rows come in order of latents.

    Among equal ranks valid names come first, then high scores, then low numbers.
    """
    matches = matching(query, ((row["name"], (row.get("words") or [])[1:]) for row in rows))
    return [place for *_, place in sorted((rank, *_certainty(rows[place]), place) for rank, place in matches)]


def _certainty(row: Mapping[str, Any]) -> tuple[bool, float]:
    return not row.get("valid"), -(row.get("score") or 0.0)


def _rank(wanted: Sequence[str], called: Called) -> int | None:
    """The rank of one latent; None if a word of the query does not occur."""
    ranks = [_rank_of_word(word, *called) for word in wanted]
    known = [rank for rank in ranks if rank is not None]
    return max(known) if known and len(known) == len(ranks) else None


def _rank_of_word(word: str, name: str | None, others: Sequence[str]) -> int | None:
    if not any(word in text.casefold() for text in (name or "", *others)):
        return None  # true of most latents; splitting all names of 24,576 latents into words would take half a second
    own = words_of(name or "")
    more = frozenset().union(*map(words_of, others))
    occurs = (
        word in own,
        word in more,
        any(one.startswith(word) for one in own),
        any(one.startswith(word) for one in more),
    )
    return next((rank for rank, true in enumerate(occurs) if true), INSIDE)


@functools.lru_cache(65_536)
def words_of(text: str) -> frozenset[str]:
    """The words of a text in lower case, split at whitespace, and split at all but letters and digits: "ice-cream", "ice"."""
    folded = text.casefold()
    return frozenset([*folded.split(), *re.findall(r"\w+", folded)])
