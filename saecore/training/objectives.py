"""What an SAE is trained to do: the loss of one batch, for every architecture.

With u the standardised embeddings and u_i the reconstruction at nested level i of m (m = 1 without nesting):

    loss = sum_i w_i L(u_i, u) / sum_i w_i + sparsity S(a) + aux |e - e'|^2 / |e|^2

    L   mse     mean over entries of (u_i - u)^2
        nmse    mean over images of |u_i - u|^2 / |u|^2                  (u has mean 0 over the data)
        cosine  mean over images of (1 - cos(u_i, u))^2
    S   l1      mean over images of |a|_1 / |u|_2
        l0      (mean number that fires / k - 1)^2, by `saecore.training.kernels.step`: jumprelu only (arXiv:2407.14435, 5.3)
        tanh    mean over images of sum_j tanh(a_j), divided by k
    e'  reconstruction of e = u - u_m by the strongest dead latents; e is a constant here (arXiv:2406.04093, appendix A.2)

Nested levels cost one decode, not m. Level i is level i - 1 plus the terms of rank k_(i-1)..k_i (for prefixes, plus the latents
n_(i-1)..n_i), and all these increments are bags of one sparse product.

Left out: gated SAEs, transcoders, end-to-end losses through CLIP.

Shapes: B images, d inputs, n latents, m nested levels, E entries (image, latent) that fire.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from saecore.sae.config import SAEConfig
from saecore.sae.model import SAE
from saecore.training.kernels import decode_entries, jump_relu, picked, step
from saecore.training.recipe import Recipe

SPARSE_SHARE = 1 / 16
"""If more than this share of all latents fires, dense products are faster: bags cost several times as much per entry."""


class Outcome(NamedTuple):
    """Results of one batch."""

    loss: Tensor
    """Scalar, with its graph."""
    error: Tensor
    """(B, d): u minus its reconstruction, without a graph."""
    fired: Tensor
    """bool (n,): latents that fired for any image."""


def objective(sae: SAE, recipe: Recipe, x: Tensor, dead: Tensor) -> Outcome:
    """Loss of a batch of CLIP embeddings (B, d); `dead` is bool (n,)."""
    u, seen = sae.standardise(x), sae.inputs(x)
    v = seen.values
    # (v - b) E + c, with the bias folded into c: the gradient of b is then that of a vector, not of a (B, d) matrix.
    with torch.set_grad_enabled(_is_dense(sae.config)):
        p = torch.addmm(sae.latent_bias - sae.pre_bias @ sae.encoder, v, sae.encoder)
    strength = p.abs() if sae.config.by_magnitude else p
    if sae.config.architecture in ("relu", "jumprelu"):
        fired, decoded, penalty = _open(sae, recipe, p, strength, u)
    elif _is_dense(sae.config):
        fired, decoded, penalty = _layered(sae, recipe, p, strength, u)
    else:
        fired, decoded, penalty = _sparse(sae, recipe, p, strength, v, u)
    levels = (decoded + sae.pre_bias) * seen.spread[:, None] + seen.shift[:, None]
    weights = torch.arange(levels.shape[1], 0, -1.0, device=x.device)
    if recipe.weighting == "uniform":
        weights = torch.ones_like(weights)
    loss = (weights * reconstruction_loss(recipe.loss, levels, u)).sum() / weights.sum() + penalty
    error = (u - levels[:, -1]).detach()
    if recipe.dead == "aux" and dead.any():
        loss = loss + recipe.aux * _auxiliary(sae, p.detach(), v, error / seen.spread, dead)
    return Outcome(loss, error, fired)


def reconstruction_loss(name: str, levels: Tensor, u: Tensor) -> Tensor:
    """L of every level: reconstructions (B, m, d) of u (B, d) -> (m,)."""
    u = u[:, None]
    if name == "mse":
        return (levels - u).square().mean((0, 2))
    if name == "nmse":
        return ((levels - u).square().sum(-1) / u.square().sum(-1)).mean(0)
    return (1 - F.cosine_similarity(levels, u, dim=-1)).square().mean(0)


def _is_dense(config: SAEConfig) -> bool:
    """Whether so many latents fire that dense products are faster than sparse ones."""
    if config.architecture in ("relu", "jumprelu"):
        return True
    return config.nesting == "levels" and config.nested[-1] > config.n_latents * SPARSE_SHARE


def _open(sae: SAE, recipe: Recipe, p: Tensor, strength: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of relu and jumprelu: fired (n,), decoded (B, 1, d), weighted penalty."""
    penalty, weight = recipe.penalised()
    if sae.threshold is None:
        a = sae.output(p)
        cost = _penalty(penalty, a, u, recipe.k)
    else:
        a = jump_relu(strength, sae.threshold, recipe.bandwidth)
        if sae.config.by_magnitude:
            a = a * {"relu": p > 0, "signed": p.sign(), "absolute": torch.ones_like(p)}[sae.config.output]
        # Not `sae.output`: |a| has no slope at 0, and thresholds would get no gradient from latents that stay just below them.
        if cap := sae.config.soft_cap:
            a = cap * torch.tanh(a / cap)
        if penalty == "l0":
            cost = (step(strength, sae.threshold, recipe.bandwidth).sum(-1).mean() / recipe.k - 1).square()
        else:
            cost = _penalty(penalty, a, u, recipe.k)
    return (a != 0).any(0), (a @ sae.atoms)[:, None], weight * cost


def _layered(sae: SAE, recipe: Recipe, p: Tensor, strength: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `_sparse` for nested levels of k that reach far into the dictionary: the first levels as bags, the others as
    dense products.

    With 6,144 latents, levels 64, 128, .. 6144 and B = 1,024 this is 3 times as fast as bags only.
    """
    levels, n = sae.config.nested, p.shape[1]
    reach = n
    if sae.config.output == "relu":  # no image has more positive pre-activations, so all further levels are the same
        reach = int((strength > 0).sum(-1).amax())
    few = [k for k in levels if k <= max(n * SPARSE_SHARE, levels[0])]
    cuts = [k for k in levels[len(few) :] if k < min(reach, n)]
    top = strength.detach().topk(max([*few, *cuts]), dim=-1)
    listed = top.indices[:, : few[-1]]
    rows = torch.arange(len(p), device=p.device)[:, None]
    bags = (rows * len(few) + _group(torch.arange(few[-1], device=p.device), tuple(few))).flatten()
    values = sae.output(p.gather(1, listed)).flatten()
    increments = [
        decode_entries(values, listed.flatten(), sae.atoms, bags, len(p) * len(few)).view(len(p), len(few), -1)
    ]
    a, above = sae.output(p), top.values[:, few[-1] - 1, None]
    for k in [*cuts, n][: len(levels) - len(few)]:
        below = top.values[:, k - 1, None] if k < n else strength.new_full((1,), -math.inf)
        increments.append((a * ((strength < above) & (strength >= below)) @ sae.atoms)[:, None])
        above = below
    decoded = torch.cat(increments, dim=1)
    decoded = torch.cat([decoded, decoded.new_zeros(len(p), len(levels) - decoded.shape[1], decoded.shape[2])], dim=1)
    used = a * (strength >= above)
    penalty, weight = recipe.penalised()
    cost = weight * _penalty(penalty, used, u, recipe.k) if weight else p.new_zeros(())
    return (used != 0).any(0), decoded.cumsum(1), cost


def _penalty(name: str, a: Tensor, u: Tensor, k: int) -> Tensor:
    if name == "l1":
        return (a.abs().sum(-1) / torch.linalg.vector_norm(u, dim=-1)).mean()
    if name == "tanh":
        return torch.tanh(a.abs()).sum(-1).mean() / k
    return a.new_zeros(())


def _sparse(
    sae: SAE, recipe: Recipe, p: Tensor, strength: Tensor, v: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of topk and batchtopk: fired (n,), decoded at every nested level (B, m, d), weighted penalty."""
    config = sae.config
    m = max(1, len(config.nested))
    if config.architecture == "topk":
        rows, cols, group = _ranked(strength, config.nested or (config.k,), drop=config.output == "relu")
    else:
        flat = strength.flatten().topk(config.k * len(p), sorted=False).indices.sort().values
        rows, cols = flat.div(p.shape[1], rounding_mode="floor"), flat % p.shape[1]
        group = _group(cols, config.nested) if config.nested else torch.zeros_like(cols)
    bags = rows * m + group
    if config.nesting == "prefixes":  # entries by rank already lie in the order of their bags
        order = torch.argsort(bags, stable=True)
        rows, cols, bags = rows[order], cols[order], bags[order]
    values = sae.output(picked(v, sae.pre_bias, sae.encoder, sae.latent_bias, p, rows, cols))
    decoded = decode_entries(values, cols, sae.atoms, bags, len(p) * m).view(len(p), m, -1).cumsum(1)
    fired = torch.zeros(p.shape[1], dtype=torch.bool, device=p.device)
    fired[cols[values.detach() != 0]] = True
    penalty, weight = recipe.penalised()
    if not weight:
        return fired, decoded, values.new_zeros(())
    padded = torch.zeros_like(p).index_put((rows, cols), values)
    return fired, decoded, weight * _penalty(penalty, padded, u, recipe.k)


def _ranked(strength: Tensor, levels: tuple[int, ...], drop: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and levels of the entries with a rank below levels[-1]; `drop` omits those of which max(p, 0) is 0."""
    most = levels[-1]
    if drop:  # no image has more positive pre-activations, so all further levels are the same
        most = max(1, min(most, int((strength > 0).sum(-1).amax())))
    top = strength.topk(most, dim=-1)
    keep = top.values > 0 if drop else torch.ones_like(top.values, dtype=torch.bool)
    rows, ranks = keep.nonzero(as_tuple=True)
    return rows, top.indices[rows, ranks], _group(ranks, levels)


def _group(position: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """In which of the intervals [0, b_0), [b_0, b_1) and so on each position lies."""
    return torch.searchsorted(torch.tensor(bounds, device=position.device), position, right=True)


def _auxiliary(sae: SAE, p: Tensor, v: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    """|e - e'|^2 / |e|^2, with e' of the d / 2 strongest dead latents of each image."""
    candidates = dead.nonzero().squeeze(1)
    top = p[:, candidates].topk(min(len(candidates), max(1, v.shape[1] // 2)), dim=-1).indices
    cols = candidates[top].flatten()
    rows = torch.arange(len(p), device=p.device).repeat_interleave(top.shape[1])
    values = picked(v, sae.pre_bias, sae.encoder, sae.latent_bias, p, rows, cols).clamp(min=0)
    explained = decode_entries(values, cols, sae.atoms, rows, len(p))
    return (error - explained).square().sum() / error.square().sum().clamp(min=torch.finfo(error.dtype).tiny)
