"""CLIP's image tower as far as a layer: its embedding is the residual stream of CLS that leaves it.

    e = x_0 after layer l          (layer l of transformers' `encoder.layers`, which is `hidden_states[l + 1]`)

So an SAE that reads CLS there runs, and is explained, as one that reads the final embedding: each method's algebra is the same,
over fewer layers. Nothing lies between the query's last stream and the embedding, so no norm is frozen on that way, and a
read-out is pulled back as it is. Of the last of these layers only CLS is computed, of the layers above it nothing.

Left out: what an MLP adds (a site `mlp`); patch tokens (`saecore.towers.tokens`); SigLIP, which has no token of its own in any
layer.

Shapes as in `saecore.towers.tower`; here E = D.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from saecore.towers.clip import ClipTower
from saecore.towers.tower import ImageTower, ReadOut


class StoppedTower(ClipTower):
    """A CLIP tower of the layers 0 to `layer`. It shares the modules of the whole tower, in whatever precision they are."""

    def __init__(self, whole: ClipTower, layer: int) -> None:
        ImageTower.__init__(self, until(whole.vision, layer), whole.preprocess)
        self.n_outputs = whole.vision.config.hidden_size
        self.whole = whole
        self.start = layer + 1
        """The layer of the whole tower that comes next."""

    def run_in(self, dtype: torch.dtype) -> None:
        """See `ImageTower.run_in`: the whole tower, so that its embedding can be had too."""
        self.whole.run_in(dtype)

    def embed_query(self, final: Tensor) -> Tensor:
        """See `ImageTower.embed_query`: the stream is the embedding."""
        return final.float()

    def embed_each(self, tokens: Tensor) -> Tensor:
        """See `ImageTower.embed_each`: each token's own stream."""
        return tokens.float()

    def pull_back(self, read_outs: Tensor, final: Tensor, exact: bool = False) -> ReadOut:
        """See `ImageTower.pull_back`: nothing lies between the two."""
        return ReadOut(read_outs.float(), torch.zeros_like(read_outs[..., 0]))

    def sha256(self) -> str:
        """Hash of the whole tower: it names the model, and an SAE's site names the layer."""
        return self.whole.sha256()


def stopped_at(tower: ImageTower, layer: int) -> StoppedTower:
    """The tower as far as a layer, counted from 0; ValueError if it has no such layer, or no CLS token."""
    if not isinstance(tower, ClipTower):
        raise ValueError("its image tower has no CLS token")
    check_layer(tower, layer)
    return StoppedTower(tower, layer)


def check_layer(tower: ImageTower, layer: int) -> None:
    """ValueError if a tower has no such layer."""
    if layer >= tower.n_layers:
        raise ValueError(f"its image tower has the layers 0 to {tower.n_layers - 1}, and no layer {layer}")


def until(vision: Any, layer: int) -> nn.Module:
    """What a tower's layers ask of transformers' module, with the layers 0 to `layer` only."""
    stopped: Any = nn.Module()
    encoder: Any = nn.Module()
    config = copy.deepcopy(vision.config)
    config.num_hidden_layers = layer + 1
    encoder.layers = vision.encoder.layers[: layer + 1]
    stopped.embeddings, stopped.encoder = vision.embeddings, encoder
    if hasattr(vision, "pre_layrnorm"):  # SigLIP has none
        stopped.pre_layrnorm = vision.pre_layrnorm
    stopped.config = config
    return cast(nn.Module, stopped)
