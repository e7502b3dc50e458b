"""Check that the weights of a tower compute something: a cheap look at their values, and one small forward of two inputs.

Files can be whole and their shapes right while the numbers in them are wrong: NaN, infinities, 1e38 whose products overflow,
zeros. Such numbers would be noticed only hours later, as maps of NaN.

Left out: whether a model is any good (`saecore.evaluation.quality`), and whether an SAE belongs to a CLIP.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saecore.untrusted import check_values

if TYPE_CHECKING:
    from saecore.towers.text import TextTower
    from saecore.towers.tower import ImageTower

N_PATCHES = 4
"""Patches in the test forward of an image tower: few, so that it costs what reading the weights costs, a fifth of a second for
L/14 on one thread. Every weight takes part."""

TEXTS = ("red", "a photograph of a large dog")
"""Two lengths, so that a tokenizer that cannot pad is noticed."""


def check_images(tower: "ImageTower", where: str) -> None:
    """ValueError if the weights of an image tower, read from the file `where`, are not finite or overflow, or if its embeddings
    of a black and a random picture are the same.
    """
    _check_weights(tower, where)
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (1, *tower.preprocess.size, 3), dtype=torch.uint8, generator=generator)
        tokens = tower.first_tokens(torch.cat([torch.zeros_like(noise), noise]))
        embeddings = tower.embed_tokens(tokens[:, : tower.n_own + N_PATCHES])
    _check_two(embeddings, "a black and a random picture", where)


def check_texts(tower: "TextTower", where: str) -> None:
    """The same for a text tower, with two texts, and ValueError if its tokenizer does not fit it."""
    _check_weights(tower, where)
    n_words = tower.model.config.vocab_size
    try:
        ids = tower.tokens(TEXTS, padding=True, truncation=True, max_length=tower.n_tokens)["input_ids"]
    except Exception as error:  # the tokenizers' library raises Exception itself
        raise ValueError(f"its tokenizer cannot be used ({type(error).__name__}: {error})") from error
    largest = max(max(text) for text in ids)
    if largest >= n_words:
        raise ValueError(f"its tokenizer makes the token {largest}, and its text tower knows {n_words}")
    with torch.inference_mode():
        embeddings = tower(TEXTS)
    _check_two(embeddings, f"the texts {TEXTS[0]!r} and {TEXTS[1]!r}", where)


def _check_weights(tower: torch.nn.Module, where: str) -> None:
    for name, tensor in tower.named_parameters():
        check_values(tensor, f"the weight {name} in {where}")


def _check_two(embeddings: Tensor, what: str, where: str) -> None:
    if not embeddings.isfinite().all():
        raise ValueError(f"its embeddings of {what} are not finite: {where} or what prepares its input is damaged")
    apart = (embeddings[0] - embeddings[1]).abs().max()
    if apart <= 1e-6 * embeddings.abs().max():  # rounding may differ between rows of a batch
        raise ValueError(f"its embeddings of {what} are the same: weights in {where} are zeros or damaged")
