"""Latents by what they are called: which names answer a query, and in which order. The search of pages follows the same rule.

The query is split at whitespace, and upper and lower case are the same. Each word of it has a rank in what a latent is called:

    0   it is a whole word of the latent's name                 "star" in "red star"
    1   it is a whole word of another of the latent's words
    2   a word of the name begins with it                       "star" in "starfish"
    3   a word of the others begins with it
    4   it occurs inside a word of either                       "red" in "checkered"

All words of the query must occur, so that several narrow the search; the latent's rank is the worst of theirs. Rank 4 counts
only where no latent of the run has a better one.
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
    """(rank, place in `called`) of all that the query finds, the best rank first, then in their order; nothing for no words."""
    wanted = query.casefold().split()
    ranks = ((_rank(wanted, one), place) for place, one in enumerate(called))
    found = sorted((rank, place) for rank, place in ranks if rank is not None)
    best = found[0][0] if found else INSIDE
    return [(rank, place) for rank, place in found if rank < INSIDE or best == INSIDE]


def latents(query: str, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The places of rows of `latents.parquet`, in the order of their latents, that the query finds by `name` and `words`.

    Of equal rank the valid names come first, then the highest scores, then the lowest numbers.
    """
    found = matching(query, ((row["name"], (row.get("words") or [])[1:]) for row in rows))
    return [place for *_, place in sorted((rank, *_certainty(rows[place]), place) for rank, place in found)]


def _certainty(row: Mapping[str, Any]) -> tuple[bool, float]:
    return not row.get("valid"), -(row.get("score") or 0.0)


def _rank(wanted: Sequence[str], called: Called) -> int | None:
    """Of one latent; None where a word does not occur."""
    ranks = [_rank_of_word(word, *called) for word in wanted]
    known = [rank for rank in ranks if rank is not None]
    return max(known) if known and len(known) == len(ranks) else None


def _rank_of_word(word: str, name: str | None, others: Sequence[str]) -> int | None:
    if not any(word in text.casefold() for text in (name or "", *others)):
        return None  # most of them: parting all names of 24,576 latents into words would take half a second
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
    """Its words in lower case, as whitespace parts them, and as all but letters and digits does: "ice-cream", "ice"."""
    folded = text.casefold()
    return frozenset([*folded.split(), *re.findall(r"\w+", folded)])
