"""MSAE's own interface over our SAE, for scripts that were written for its class `SAE` (github.com/WolodjaZ/MSAE).

    sae = MSAE(load_sae("hf://..."))                          # MSAE: SAE("....pth")
    latents, full_latents = sae.encode(x, topk=32)            # x: CLIP embeddings as they are
    x_again = sae.decode(latents)
    reconstruction, standardised, full_latents = sae(x)       # of the full latents

With p the pre-activations (`saecore.sae.model`), in MSAE's code and here:

    variant                                  latents                           full_latents
    ReLU, JumpReLU                           those that fire                   the same
    TopKReLU, BatchTopKReLU                  max(p, 0) of those selected       max(p, 0)
    TopK, BatchTopK                          p of those selected               p
    TopKabs, TopKabsReLU                     |p| of those selected             |p|
    BatchTopKabs, BatchTopKabsReLU           p, or max(p, 0), where selected   |p|: the sign is lost

All of them are capped where there is a soft cap. One difference is meant: which latents of a BatchTopK SAE fire does not depend
on the other images of the batch, since a calibrated threshold decides. SAEs of other formats may be used in the same way.

The project itself uses `SAE.encode_sparse` and `SAE.decode_sparse`. Dense latents of an image are n numbers, most of them 0.

Left out: MSAE's counters of how often latents fire, its lists of nested levels, and what its training needs.

Shapes: B images, d embedding width, n latents.
"""

import torch
from torch import Tensor, nn

from saecore.sae.model import SAE


class MSAE(nn.Module):
    """An SAE with the methods of MSAE's `SAE`."""

    def __init__(self, sae: SAE) -> None:
        super().__init__()
        self.sae = sae

    def encode(self, x: Tensor, topk: int = -1) -> tuple[Tensor, Tensor]:
        """CLIP embeddings (B, d) -> (latents, full_latents), both (B, n); see the head of this file.

        A `topk` between 0 and n keeps only the `topk` largest full latents of each image. It does not change `latents`.
        """
        latents = self.sae.encode_sparse(x).dense(self.sae.config.n_latents)
        if self.sae.config.architecture in ("topk", "batchtopk"):
            p = self.sae.pre_activations(x)
            full = self.sae.output(p.abs() if self.sae.config.by_magnitude else p)
        else:
            full = latents.clone()
        if 0 < topk < self.sae.config.n_latents:
            largest = full.topk(topk, dim=-1)
            full = torch.zeros_like(full).scatter(-1, largest.indices, largest.values)
        return latents, full

    def decode(self, latents: Tensor, x: Tensor | None = None) -> Tensor:
        """Dense latents (B, n) -> CLIP's space (B, d). An SAE that normalises each sample needs the embeddings `x` too."""
        return self.sae.to_embedding(latents @ self.sae.atoms + self.sae.pre_bias, x)

    def forward(self, x: Tensor, topk: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        """CLIP embeddings (B, d) -> (reconstruction, the same in standardised space, full_latents).

        The reconstruction is that of the full latents. For that of the latents that fire, use `SAE.reconstruct`.
        """
        full = self.encode(x, topk)[1]
        reconstruction = self.decode(full, x)
        standardised = (reconstruction / self.sae.length(x) - self.sae.mean) * self.sae.scale
        return reconstruction, standardised, full
