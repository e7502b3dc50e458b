"""What a map would be if nothing had been learned: SAEs and towers whose weights are drawn anew.

    with_other_rows    each encoder row points in a random direction, and is as long as the trained one
    untrained          all weights of a tower as transformers draws them before training
    cascaded           the same from the top down to a layer; the layers below stay as trained

A map that hardly changes does not show what the weights say (Adebayo et al. 2018, arXiv:1810.03292, which calls the second and
the third "model parameter randomisation"). The first is the same question for one latent: its map by a row that means nothing.
Since rows keep their lengths, its pre-activations have the trained units, so that it serves as an untrained SAE too.

Nothing here changes what it is given. Draws are made on the CPU from the seed only; the global random state stays as it was.

Shapes: d embedding width, n latents.
"""

import copy
from typing import TypeVar

import torch
from torch import nn
from transformers import CLIPVisionModelWithProjection, SiglipVisionModel

from saecore.sae.model import SAE
from saecore.towers.clip import ClipTower
from saecore.towers.siglip import SiglipTower
from saecore.towers.stopped import StoppedTower
from saecore.towers.tokens import TokenTower
from saecore.towers.tower import ImageTower

Tower = TypeVar("Tower", bound=ImageTower)


@torch.no_grad()
def with_other_rows(sae: SAE, seed: int = 0) -> SAE:
    """The SAE with encoder rows in uniformly random directions, each as long as the trained row; all else is the same.

    A tied decoder is the encoder, so it changes too.
    """
    other = copy.deepcopy(sae)
    d, n = other.encoder.shape
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows *= sae.encoder.T.cpu().double().norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True)
    other.encoder.copy_(rows.T)  # in place, which keeps how it lies in memory
    return other


def untrained(tower: Tower, seed: int = 0) -> Tower:
    """A tower of the same configuration, precision and device, whose weights transformers draws.

    Of a tower that stops at a layer, the whole tower is drawn.
    """
    other, drawn = copy.deepcopy(tower), _drawn(_whole(tower), seed)
    _take(_whole(other), drawn)
    return other


def cascaded(tower: Tower, layers: int, seed: int = 0) -> Tower:
    """The tower with its last `layers` layers, and all that follows them, drawn anew; what comes before stays as trained.

    With 0 layers it is an equal tower. With all, the embedding of patches and positions stays; `untrained` draws that too. More
    layers by the same seed add to those of fewer. What follows the last layer is the final LayerNorm and the projection or the
    pooling; in a tower that stops at a layer, it is the layers above in `whole` too. ValueError if there are fewer layers.
    """
    if not 0 <= layers <= tower.n_layers:
        raise ValueError(f"layers {layers}: this tower has {tower.n_layers} layers to draw anew")
    other = copy.deepcopy(tower)
    if layers:
        kept = tower.n_layers - layers
        pairs = zip(*(_from_layer(_whole(one), kept) for one in (other, _drawn(_whole(tower), seed))), strict=True)
        for part, drawn in pairs:
            _take(part, drawn)
    return other


def _whole(tower: ImageTower) -> ImageTower:
    """The tower that ends in the model's embedding. What a stopped tower runs are modules of it."""
    return tower.whole if isinstance(tower, StoppedTower | TokenTower) else tower


def _drawn(whole: ImageTower, seed: int) -> ImageTower:
    """A tower as transformers makes it from the configuration."""
    config = copy.deepcopy(whole.vision.config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would change the state of GPUs too
        if isinstance(whole, ClipTower):
            return ClipTower(CLIPVisionModelWithProjection(config), whole.preprocess)
        return SiglipTower(SiglipVisionModel(config), whole.preprocess)


def _from_layer(whole: ImageTower, first: int) -> list[nn.Module]:
    """The layers from number `first` on, and what follows them."""
    head = whole.projection if isinstance(whole, ClipTower) else whole.vision.head
    return [*whole.vision.encoder.layers[first:], whole.vision.post_layernorm, head]


@torch.no_grad()
def _take(part: nn.Module, drawn: nn.Module) -> None:
    """Copies parameters in place, so that modules that several towers share stay shared, in their precision."""
    for mine, new in zip(part.parameters(), drawn.parameters(), strict=True):
        mine.copy_(new)
