"""CLIP's image tower: the query is the CLS token x_0, which all layers carry, and the embedding is e = W LN(x_0).

Any CLIP with CLS pooling in transformers' format (OpenAI, LAION, MetaCLIP).

Left out: the text tower (`saecore.towers.text`), loading (`saecore.towers.loading`), position interpolation.

Shapes as in `saecore.towers.tower`.
"""

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from saecore.images.preprocess import Preprocess
from saecore.towers.tower import ImageTower, PathLayer, ReadOut, encoder_path


class ClipTower(ImageTower):
    """The image side of a CLIP model."""

    n_own = 1
    looks_from = 0

    def __init__(self, model: CLIPVisionModelWithProjection, preprocess: Preprocess) -> None:
        super().__init__(model.vision_model, preprocess)
        self.projection = model.visual_projection
        self.n_outputs = model.config.projection_dim

    def run_in(self, dtype: torch.dtype) -> None:
        """See `ImageTower.run_in`."""
        for part in (self.vision.embeddings, self.vision.pre_layrnorm, self.vision.encoder):
            part.to(dtype)

    def first_tokens(self, pixels: Tensor) -> Tensor:
        """See `ImageTower.first_tokens`: CLS, then the patches."""
        first: Tensor = self.vision.pre_layrnorm(self.vision.embeddings(self.normalise(pixels)))
        return first

    def path(self) -> list[PathLayer]:
        """See `ImageTower.path`: every layer."""
        return encoder_path(self.vision)

    def embed_query(self, final: Tensor) -> Tensor:
        """See `ImageTower.embed_query`. One token, so float32 costs nothing even in a bfloat16 tower."""
        norm = self.vision.post_layernorm
        normed = nn.functional.layer_norm(
            final.float(), (final.shape[-1],), norm.weight.float(), norm.bias.float(), norm.eps
        )
        return normed @ self.projection.weight.float().T

    def embed_each(self, tokens: Tensor) -> Tensor:
        """See `ImageTower.embed_each`: each token is put in the place of CLS."""
        return self.embed_query(tokens)

    def pull_back(self, read_outs: Tensor, final: Tensor, exact: bool = False) -> ReadOut:
        """See `ImageTower.pull_back`.

        The final LayerNorm's sigma is data, frozen at its value for this image; its mean subtraction is linear and moves
        into the direction, which centres every term of the residual stream exactly. `exact`: the direction is the true
        gradient instead, through sigma too.
        """
        norm = self.vision.post_layernorm
        normed = read_outs.float() @ self.projection.weight.float()
        scaled = normed * norm.weight.float()
        x = final.float()
        centred = x - x.mean(dim=-1, keepdim=True)
        sigma = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        direction = (scaled - scaled.mean(dim=-1, keepdim=True)) / sigma[:, None]
        constant = normed @ norm.bias.float()
        if exact:
            along = direction @ (centred / sigma)[..., None]
            direction = direction - along * (centred / sigma)[:, None] / x.shape[-1]
            constant = constant + (along * sigma[:, None]).squeeze(-1) - (direction @ x[..., None]).squeeze(-1)
        return ReadOut(direction, constant)
