"""Whether the weights of an SAE compute anything: a cheap look at their values, and one forward of an ordinary embedding.

A file can be whole and its shapes right while the numbers in it are not: NaN, infinities, 1e38 whose products overflow, zeros.
All of that would surface hours later, as maps of NaN or as latents that never fire.

Left out: whether an SAE is any good (`saecore.evaluation.quality`), and whether it belongs to a CLIP (`saecore.spellings`).
"""

from typing import TYPE_CHECKING

import torch

from saecore.untrusted import LARGEST, check_values

if TYPE_CHECKING:
    from saecore.sae.model import SAE


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
        # The encoder's input for an ordinary embedding, with every normaliser.
        v = torch.randn(1, sae.config.n_inputs, generator=generator)
        p = torch.addmm(sae.latent_bias, v - sae.pre_bias, sae.encoder)
        reconstruction = (sae.output(p) @ sae.atoms + sae.pre_bias) / sae.scale + sae.mean
    if not (p.isfinite().all() and reconstruction.isfinite().all()):
        raise ValueError(
            f"the SAE in {where} computes numbers that are not finite for an ordinary embedding: they overflow"
        )
