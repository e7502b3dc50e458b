"""Names of latents: the words of a vocabulary that stand nearest to each, whether a name is valid, and latents by word.

    scores (`saecore.naming.scores`) -> the nearest words of each latent -> schema.NAMES

The margin of a word is by how much its score exceeds that of the runner-up. All numbers are kept; which names are called valid
is an option (`Valid`).

Left out: names put together from several words; synonyms, between which there is no margin.

Shapes: n latents, w nearest words.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import duckdb
import pyarrow as pa
import torch
from torch import Tensor

from saecore import schema


class Valid(NamedTuple):
    """When a name is called valid: all three must hold."""

    score: float = 0.0
    """Least score."""
    margin: float = 0.0
    """Least margin to the runner-up."""
    ratio: float = 0.0
    """Least ratio of the score to that of the runner-up, if the latter is positive."""


VALID_BY_DATA = Valid(score=1.0, margin=0.2)
"""In standard deviations. Chosen on 4,000 scenes outside the demo. Of the demo's 73 latents 40 pass, and all these names are
true."""

VALID_BY_DIRECTION = Valid(margin=0.2)
"""In cosines. Of the demo's 73 latents 24 pass, and all these names are true. Another CLIP may need another margin."""


def thresholds(by_data: bool, score: float | None, margin: float | None, ratio: float | None) -> Valid:
    """Those that are given, and the default ones for names by data, or by direction, in place of None."""
    own = VALID_BY_DATA if by_data else VALID_BY_DIRECTION
    given = {"score": score, "margin": margin, "ratio": ratio}
    return own._replace(**{field: value for field, value in given.items() if value is not None})


class Nearest(NamedTuple):
    """The w words nearest to each latent, nearest first."""

    words: Tensor
    """int64 (n, w): their numbers in the vocabulary."""
    scores: Tensor
    """float32 (n, w): -inf for a latent that cannot be named."""


# ---- From scores to names.


def nearest(scores: Iterable[Tensor], n: int) -> Nearest:
    """The n words with the highest scores of each latent, or all words if there are fewer; equal ones in their own order.

    scores: blocks (words, n) in the order of the vocabulary, as `saecore.naming.scores` gives them.
    """
    words = values = torch.empty(0)
    start = 0
    for block in scores:
        best = block.topk(min(n, len(block)), dim=0)
        numbers, order = best.indices.sort(dim=0)
        candidates = best.values.gather(0, order)
        if start:
            numbers, candidates = torch.cat([words, numbers + start]), torch.cat([values, candidates])
        values, order = candidates.sort(dim=0, descending=True, stable=True)
        words, values = numbers.gather(0, order)[:n], values[:n]
        start += len(block)
    return Nearest(words.T.cpu(), values.T.cpu())


def names_table(
    words: Sequence[str], direction: Nearest | None, data: Nearest | None, by_data: bool, valid: Valid
) -> pa.Table:
    """schema.NAMES. With `by_data`, a latent that data cannot name has its name by direction, which is never called valid.

    words: the vocabulary. direction, data: at least two nearest words for each latent, and the same number in both; one of
    the two may be None.
    """
    known = direction or data
    assert known is not None
    nothing = Nearest(known.words, torch.full_like(known.scores, -torch.inf))
    direction, data = direction or nothing, data or nothing
    is_by_data = (data.scores[:, 0] > -torch.inf) & by_data
    best = Nearest(*(torch.where(is_by_data[:, None], *both) for both in zip(data, direction, strict=True)))
    is_valid = _passes(best, valid) & (is_by_data == by_data)
    unnamed = (best.scores[:, 0] == -torch.inf).numpy()
    vocabulary, (n, w) = pa.array(words, pa.string()), best.words.shape
    starts = pa.array(range(0, n * w + 1, w), pa.int32())
    every = vocabulary.take(pa.array(best.words.flatten().numpy()))
    columns = {
        "latent": pa.array(range(n), pa.int32()),
        **_named("", best, vocabulary),
        "runner_up": vocabulary.take(pa.array(best.words[:, 1].numpy(), mask=unnamed)),
        "runner_up_score": pa.array(best.scores[:, 1].numpy(), mask=unnamed),
        "valid": pa.array(is_valid.numpy()),
        "by_data": pa.array(is_by_data.numpy()),
        "words": pa.ListArray.from_arrays(starts, every, mask=pa.array(unnamed)),
        "scores": pa.ListArray.from_arrays(starts, pa.array(best.scores.flatten().numpy()), mask=pa.array(unnamed)),
        **_named("direction_", direction, vocabulary),
        **_named("data_", data, vocabulary),
    }
    return pa.table([columns[name] for name in schema.NAMES.names], schema=schema.NAMES)


def _named(prefix: str, nearest_words: Nearest, vocabulary: pa.Array) -> dict[str, pa.Array]:
    unnamed = (nearest_words.scores[:, 0] == -torch.inf).numpy()
    return {
        f"{prefix}name": vocabulary.take(pa.array(nearest_words.words[:, 0].numpy(), mask=unnamed)),
        f"{prefix}score": pa.array(nearest_words.scores[:, 0].numpy(), mask=unnamed),
        f"{prefix}margin": pa.array((nearest_words.scores[:, 0] - nearest_words.scores[:, 1]).numpy(), mask=unnamed),
    }


def _passes(nearest_words: Nearest, least: Valid) -> Tensor:
    score, runner_up = nearest_words.scores[:, 0], nearest_words.scores[:, 1]
    apart = (runner_up <= 0) | (score >= least.ratio * runner_up)
    return (score > -torch.inf) & (score >= least.score) & (score - runner_up >= least.margin) & apart


# ---- From words to latents.


LATENTS_OF = """SELECT latent, place - 1 AS place, score, valid FROM (
    SELECT latent, valid, unnest(words) AS word, unnest(scores) AS score, generate_subscripts(words, 1) AS place FROM names)
WHERE lower(word) = lower(?) ORDER BY place, score DESC, latent"""


def latents_of(names: pa.Table, word: str) -> pa.Table:
    """The latents (schema.NAMES) that have this word, in upper or lower case, among their words: latent, place, score, valid.

    Place 0 is the name. The order is by place, then by falling score. For a text that is not in the vocabulary see
    `saecore.relevance.targets.concept_weights`.
    """
    with duckdb.connect() as database:
        return database.register("names", names).sql(LATENTS_OF, params=[word]).to_arrow_table()
