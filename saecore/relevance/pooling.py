"""From the tokens that an SAE reads to one value of each latent for an image, and to the latents that are kept.

    a_tj, what latent j gives at token t  ->  max_t a_tj, mean_t a_tj, sum_t a_tj, or a_0j, its value at CLS

Projects pool in different ways (saev by max or mean over patches, PatchSAE and ConceptScope by mean over all tokens, ViT-Prisma
by CLS or mean), so a run is told how. Latents compete by magnitude: by the value itself, unless the SAE's output is signed.

All tokens are encoded, some images at a time: the tokens of a batch times the latents of an SAE would be gigabytes.

Shapes: B images, T tokens that the site reads, d width, K latents listed for a token, k kept latents, n targets.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saecore.sae.model import SAE

ENTRIES_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Tokens times latents that are encoded at once: 32 MB and 1 GB. On a CPU, 16 and 128 MB took as long; a GPU was not tried."""


class Pooled(NamedTuple):
    """What an SAE makes of the tokens of B images."""

    latents: Tensor
    """int64 (B, n): the kept latents, strongest first, then those asked for by number."""
    pooled: Tensor
    """float32 (B, n): their values for the image."""
    at_tokens: Tensor
    """float32 (B, n, T): their activations at each token, 0 where they do not fire."""
    l0: Tensor
    """int32 (B,): how many latents fire at one token or more."""
    cosine: Tensor
    """float32 (B,): between tokens and their reconstructions, mean over tokens."""
    fvu: Tensor
    """float32 (B,): of all tokens of the image together."""


def pool_tokens(sae: SAE, streams: Tensor, pool: str, k: int, asked: Tensor) -> Pooled:
    """Streams (B, T, d) of the tokens that the site reads -> the k strongest latents, and the `asked` ones, int64 (m,)."""
    at_once = max(1, ENTRIES_AT_ONCE[streams.device.type] // (streams.shape[1] * sae.config.n_latents))
    blocks = [_pool_block(sae, block, pool, k, asked) for block in streams.split(at_once)]
    return Pooled(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def _pool_block(sae: SAE, streams: Tensor, pool: str, k: int, asked: Tensor) -> Pooled:
    B, T, _ = streams.shape
    flat = streams.flatten(0, 1)
    code = sae.encode_sparse(flat)
    reconstruction = sae.decode_sparse(code.latents, code.activations, flat)
    squared_error = (flat - reconstruction).square().sum(-1).view(B, T)
    deviation = sae.deviation(flat).square().sum(-1).view(B, T)

    listed, activations = code.latents.view(B, -1), code.activations.view(B, -1)
    zeros = activations.new_zeros(B, sae.config.n_latents)
    largest = zeros.scatter_reduce(1, listed, activations.abs(), "amax")
    if pool == "max":
        strength = largest
    elif pool == "cls":
        strength = zeros.scatter(1, code.latents.view(B, T, -1)[:, 0], code.activations.view(B, T, -1)[:, 0].abs())
    else:
        strength = zeros.scatter_add(1, listed, activations).abs()
    # Stable, so that latents of equal strength, such as those that do not fire, do not depend on the batch.
    kept = strength.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    latents = torch.cat([kept, asked.expand(B, -1)], 1)
    columns = latents[:, None].expand(-1, T, -1).flatten(0, 1)
    at_tokens = code.dense(sae.config.n_latents).gather(1, columns).view(B, T, -1).mT.contiguous()
    return Pooled(
        latents,
        pooled_values(at_tokens, pool),
        at_tokens,
        (largest > 0).sum(-1, dtype=torch.int32),
        torch.cosine_similarity(flat, reconstruction).view(B, T).mean(1),
        squared_error.sum(1) / deviation.sum(1),
    )


def pooled_values(at_tokens: Tensor, pool: str) -> Tensor:
    """Activations at tokens (B, n, T) -> one value for each image (B, n)."""
    if pool == "max":
        return at_tokens.gather(-1, at_tokens.abs().argmax(-1, keepdim=True)).squeeze(-1)
    if pool == "cls":
        return at_tokens[..., 0]
    return at_tokens.mean(-1) if pool == "mean" else at_tokens.sum(-1)
