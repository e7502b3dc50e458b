"""The straightforward ways to make maps of k latents, for comparison: autograd through transformers' own CLIP.

As in published code, each way differentiates pre-activations z by every layer's whole attention A, and reads `chefer`'s map off
the last layer: mean_h max(A dz/dA, 0), the CLS row. Attention is "eager", since fused attention has no A to differentiate by.

    once       one forward, k backward passes through its graph
    repeated   each image k times in the batch, one forward, one backward pass
    each       a forward and a backward pass for every latent, the parameters' gradients included: the one-latent scripts
    rolled     the same, and the map is rolled out through all layers: the seed of this project (`saecore.relevance.rollout`)

Images of a batch share the passes. In the published code they do not.

Shapes: B images, k latents, P patches, H heads, N = 1 + P tokens.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saecore.methods import DEFAULT_OPTIONS
from saecore.sae.model import SAE

DISCARD = DEFAULT_OPTIONS.discard


def with_plain_attention(model: Any) -> Any:
    """transformers' CLIPVisionModelWithProjection over the same weights, with attention written out and a graph recorded."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    plain = copy.deepcopy(model, shared)
    plain.set_attn_implementation("eager")
    # Otherwise no graph is recorded. Only `each` computes the gradients of parameters.
    return plain.requires_grad_()


def once(model: Any, sae: SAE, images: Tensor, latents: Tensor) -> Tensor:
    """Images as the model takes them (B, 3, height, width), latents (B, k) -> maps (B, k, P)."""
    z, attention = _forward(model, sae, images, latents)
    maps = []
    for column in range(z.shape[1]):
        gradients = torch.autograd.grad(z[:, column].sum(), attention, retain_graph=True)
        maps.append(_chefer(attention[-1], gradients[-1]))
    return torch.stack(maps, 1)


def repeated(model: Any, sae: SAE, images: Tensor, latents: Tensor) -> Tensor:
    """Takes and returns what `once` does."""
    z, attention = _forward(model, sae, images.repeat_interleave(latents.shape[1], 0), latents.reshape(-1, 1))
    gradients = torch.autograd.grad(z.sum(), attention)
    return _chefer(attention[-1], gradients[-1]).unflatten(0, latents.shape)


def each(model: Any, sae: SAE, images: Tensor, latents: Tensor) -> Tensor:
    """Takes and returns what `once` does."""
    return _one_by_one(model, sae, images, latents, lambda attention, gradients: _chefer(attention[-1], gradients[-1]))


def rolled(model: Any, sae: SAE, images: Tensor, latents: Tensor) -> Tensor:
    """Takes and returns what `once` does; the map is another."""
    return _one_by_one(model, sae, images, latents, _roll)


def _one_by_one(model: Any, sae: SAE, images: Tensor, latents: Tensor, mapped: Callable[..., Tensor]) -> Tensor:
    """A forward and a backward pass for every latent, whose map is made of all layers' attention and of its gradients."""
    maps = []
    for column in latents.T:
        z, attention = _forward(model, sae, images, column[:, None])
        for weights in attention:
            weights.retain_grad()
        z.sum().backward()
        maps.append(mapped([weights.detach() for weights in attention], [weights.grad for weights in attention]))
        model.zero_grad()
    return torch.stack(maps, 1)


def forward_alone(model: Any, sae: SAE, images: Tensor, latents: Tensor) -> Tensor:
    """The forward of `once`, with its graph -> pre-activations (B, k)."""
    return _forward(model, sae, images, latents)[0]


def _forward(model: Any, sae: SAE, images: Tensor, latents: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Pre-activations (B, k), and every layer's attention (B, H, N, N), in autograd's graph."""
    outputs = model(pixel_values=images, output_attentions=True)
    return sae.pre_activations(outputs.image_embeds).gather(1, latents), outputs.attentions


def _chefer(attention: Tensor, gradient: Tensor) -> Tensor:
    return (attention * gradient).detach().clamp(min=0).mean(1)[:, 0, 1:]


def _roll(attention: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Products of the layers' matrices, as published: of each layer the head means of A and dz/dA are multiplied, the smallest
    `DISCARD` and what is negative are dropped, the identity is added, and rows are normalised."""
    n = attention[0].shape[-1]
    product = torch.eye(n).expand(len(attention[0]), n, n)
    for weights, gradient in zip(attention, gradients, strict=True):
        mixed = (weights.mean(1) * gradient.mean(1)).flatten(1)
        dropped = mixed.topk(int(DISCARD * mixed.shape[1]), dim=1, largest=False).indices
        mixed = mixed.scatter(1, dropped, 0).clamp(min=0).unflatten(1, (n, n)) + torch.eye(n)
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    return product[:, 0, 1:]
