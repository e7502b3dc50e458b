"""CLIP's image tower, and how towers are loaded: by a Hub id, a folder, or `demo`.

Any CLIP with CLS pooling in transformers' format (OpenAI, LAION, MetaCLIP). The query is the CLS token x_0, which all layers
carry, and the embedding is e = W LN(x_0).

Left out: the text tower (`saecore.towers.text`), position interpolation.

Shapes as in `saecore.towers.tower`.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection, PreTrainedModel, SiglipVisionModel

from saecore import hub
from saecore.images.preprocess import Preprocess, load_preprocess
from saecore.towers import model_files
from saecore.towers.mean_token import mean_token_gradients
from saecore.towers.siglip import SiglipTower
from saecore.towers.soundness import check_images
from saecore.towers.tower import Entry, ImageTower, PathLayer, ReadOut, Trace
from saecore.untrusted import about

Half = TypeVar("Half")

DEMO = hub.DEMO_CLIP


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
        found = []
        for layer in self.vision.encoder.layers:
            at = layer.self_attn
            entry = Entry(layer.layer_norm1, at.q_proj.weight, at.k_proj.weight, at.v_proj.weight, at.scale)
            found.append(PathLayer(entry, at.out_proj.weight, at.out_proj.bias, layer.layer_norm2, layer.mlp))
        return found

    def embed_cls(self, cls: Tensor) -> Tensor:
        """See `ImageTower.embed_cls`. One token, so float32 costs nothing even in a bfloat16 tower."""
        norm = self.vision.post_layernorm
        normed = nn.functional.layer_norm(
            cls.float(), (cls.shape[-1],), norm.weight.float(), norm.bias.float(), norm.eps
        )
        return normed @ self.projection.weight.float().T

    def embed_alone(self, tokens: Tensor) -> Tensor:
        """See `ImageTower.embed_alone`: each token put in CLS's place."""
        return self.embed_cls(tokens)

    def pull_back(self, read_outs: Tensor, cls: Tensor, exact: bool = False) -> ReadOut:
        """See `ImageTower.pull_back`.

        The final LayerNorm's sigma is data, frozen at its value for this image; its mean subtraction is linear and moves
        into the direction, which centres every term of the residual stream exactly. `exact`: the direction is the true
        gradient instead, through sigma too.
        """
        norm = self.vision.post_layernorm
        normed = read_outs.float() @ self.projection.weight.float()
        scaled = normed * norm.weight.float()
        x = cls.float()
        centred = x - x.mean(dim=-1, keepdim=True)
        sigma = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        direction = (scaled - scaled.mean(dim=-1, keepdim=True)) / sigma[:, None]
        constant = normed @ norm.bias.float()
        if exact:
            along = direction @ (centred / sigma)[..., None]
            direction = direction - along * (centred / sigma)[:, None] / x.shape[-1]
            constant = constant + (along * sigma[:, None]).squeeze(-1) - (direction @ x[..., None]).squeeze(-1)
        return ReadOut(direction, constant)

    def own_targets(
        self, trace: Trace, read_outs: Callable[[Tensor], Tensor], layers: int, exact: bool = False
    ) -> Iterator[Tensor]:
        """See `ImageTower.own_targets`: the layer's mean token, through all rows of its attention."""
        return mean_token_gradients(self, trace, read_outs, layers, exact)


Halves = dict[str, tuple[type[PreTrainedModel], Callable[[Any, Any], Half]]]
"""By transformers' type of the whole model: its class for one half, and what takes that and its input's preparation."""


def load_tower(model_id: str, revision: str | None = None) -> ImageTower:
    """The image tower of a Hub id, a local directory, or `demo` (the embedded model), in float32 on the CPU.

    Raises ValueError, in one sentence, for what a user can get wrong: no such model, not a supported one, weights missing.
    """
    halves: Halves[ImageTower] = {
        "clip": (CLIPVisionModelWithProjection, ClipTower),
        "siglip": (SiglipVisionModel, SiglipTower),
    }
    return load_half(halves, load_preprocess, check_images, model_id, revision)


def load_half(
    halves: Halves[Half],
    load_input: Callable[[str], Any],
    check: Callable[[Half, str], None],
    model_id: str,
    revision: str | None,
) -> Half:
    """One tower of a model, with its projection, over what prepares its input, checked; errors as `load_tower` says."""
    with about(f"--clip {model_id}"):
        folder = hub.model_folder(model_id, revision)
        fields = model_files.read_fields(folder)
        kind = fields["model_type"]
        found = [pair for name, pair in halves.items() if kind in (name, pair[0].config_class.model_type)]
        if not found:
            raise ValueError(
                f"{model_files.CONFIG_FILE} describes a {kind!r} model; supported are CLIP with a CLS token (type 'clip') and "
                "SigLIP or SigLIP 2 at a fixed resolution (type 'siglip')"
            )
        half, tower = found[0]
        config = model_files.read_config(half, fields)
        prepares = load_input(str(folder))
        weights = model_files.check_weights(folder, half, config)
        loaded = tower(model_files.load(half, folder, config).eval().requires_grad_(False), prepares)
        check(loaded, weights)
    return loaded
