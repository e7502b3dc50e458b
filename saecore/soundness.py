"""Whether weights compute anything: a cheap look at their values, and one small forward that must tell two inputs apart.

Files can be whole and their shapes right while the numbers in them are not: NaN, infinities, 1e38 whose products overflow,
zeros. All of that would surface hours later, as maps of NaN or as latents that never fire.

Left out: whether a model is any good (`saecore.quality`), and whether an SAE belongs to a CLIP.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saecore.sae import SAE
    from saecore.text import TextTower
    from saecore.tower import ImageTower

LARGEST = 1e15
"""No trained weight comes near it. Float32 overflows at 3e38, so of two such numbers the product may be taken, and 10^8 of such
products added."""

N_PATCHES = 4
"""Patches that the test forward of an image tower takes of all: its cost is that of reading the weights, a fifth of a second
for L/14 on one thread, and every weight is in it."""

TEXTS = ("red", "a photograph of a large dog")
"""Of two lengths, so that a tokenizer that cannot pad is found out."""


def check_values(tensor: Tensor, what: str, unknown: bool = False) -> None:
    """ValueError if a tensor holds NaN (unless that is allowed, as `unknown`), an infinity, or numbers that overflow."""
    if unknown and bool(torch.isnan(tensor).all()):
        return
    least, most = (float(end) for end in tensor.aminmax())  # either is NaN where any number is
    if not max(abs(least), abs(most)) < float("inf"):
        raise ValueError(f"{what} holds values that are not finite")
    if max(abs(least), abs(most)) > LARGEST:
        raise ValueError(
            f"{what} holds values from {least:.3g} to {most:.3g}, whose products overflow; expected at most {LARGEST:g}"
        )


def check_sae(sae: "SAE", where: str) -> None:
    """ValueError if an SAE cannot compute: values that are not finite or overflow, a scale that is not positive, only zeros."""
    for name, tensor in sae.state_dict().items():
        # A batchtopk threshold that was never calibrated is NaN.
        unknown = name == "threshold" and sae.config.architecture == "batchtopk"
        check_values(tensor, f"SAE tensor {name!r} in {where}", unknown)
    if not sae.scale >= 1 / LARGEST:  # reconstructions are divided by it
        raise ValueError(
            f"SAE tensor 'scale' in {where} is {float(sae.scale):g}, expected a positive number, at least {1 / LARGEST:g}"
        )
    for name, tensor, meaning in (
        ("encoder", sae.encoder, "every image would have the same latents"),
        ("decoder", sae.atoms, "every image would have the same reconstruction"),
    ):
        if not tensor.any():
            raise ValueError(f"SAE tensor {name!r} in {where} holds zeros only: {meaning}")
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        # What the encoder sees of an ordinary embedding, whatever is normalised before.
        v = torch.randn(1, sae.config.n_inputs, generator=generator)
        p = torch.addmm(sae.latent_bias, v - sae.pre_bias, sae.encoder)
        reconstruction = (sae.output(p) @ sae.atoms + sae.pre_bias) / sae.scale + sae.mean
    if not (p.isfinite().all() and reconstruction.isfinite().all()):
        raise ValueError(
            f"the SAE in {where} makes numbers that are not finite of an ordinary embedding: they overflow"
        )


def check_images(tower: "ImageTower", where: str) -> None:
    """ValueError if the weights of an image tower, read from the file `where`, are not finite or overflow, or if it makes the
    same of a black and a random picture.
    """
    _check_weights(tower, where)
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (1, *tower.preprocess.size, 3), dtype=torch.uint8, generator=generator)
        tokens = tower.first_tokens(torch.cat([torch.zeros_like(noise), noise]))
        embeddings = tower.embed_tokens(tokens[:, : tower.n_own + N_PATCHES])
    _check_two(embeddings, "a black and a random picture", where)


def check_texts(tower: "TextTower", where: str) -> None:
    """The same for a text tower, of two texts; and ValueError if its tokenizer does not fit it."""
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
