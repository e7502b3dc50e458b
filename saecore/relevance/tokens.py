"""Maps for SAEs that read the tokens of a layer: where a latent is active, and what causes its value for the image.

The value of latent j for an image is pooled over tokens (`saecore.relevance.pooling`). Maps explain a sum of its
pre-activations p_tj at the tokens t that make the value:

    z_j = sum_t c_tj p_tj       max    c = 1 at the token of the maximum, where the latent fires most
                                cls    c = 1 at CLS
                                sum    c = 1 at each token where it fires; mean: c = 1 / T there

A latent that fires nowhere has, by max, the token where its pre-activation is largest, and by sum and mean z = 0.

    activation     a_tj itself, at each patch: where it is active, not what it depends on
    contrib        sum_t c_tj sum_lh A_t (v . W_O' u_t) + own stream       exact: adds up to z with its remainder
    contrib_grad   sum_t c_tj sum_l A_t D_t + gradient times own stream    exact gradient: adds up likewise
    occlusion      z minus z without the patch; what a dropped token gave is gone with it
    attention      the last layer's attention of the tokens that make z, mean over heads: a control

A_t is the row of attention by which token t looks at all others, and D_t the gradient by it along the path of t, as
`saecore.towers.cls_path` has it for CLS. What token t carries where it enters the first of the layers is the patch itself, so
it counts for that patch; of CLS it goes to the remainder, as do MLPs, biases and constants.

Shapes: B images, N tokens of the tower, T of them read, P patches, n targets, H heads, D width, Q queries: pairs of a target
and a token.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saecore.methods import DEFAULT_OPTIONS, METHODS, Options
from saecore.relevance import tangent
from saecore.relevance.maps import Maps
from saecore.relevance.occlusion import losses
from saecore.relevance.pooling import Pooled, pool_tokens
from saecore.relevance.targets import TargetAxis
from saecore.sae.model import SAE
from saecore.towers.cls_path import Passing, before_layer, by_head, gradients_along
from saecore.towers.tokens import TokenTower, TokenTrace
from saecore.towers.tower import PathLayer

PAIRS_AT_ONCE = 1024
"""Pairs of a target and a token whose gradients are held at once. In 11 layers of B/16 each takes 340 kB."""


class TokenTargets(NamedTuple):
    """The targets of B images: z = sum_t weights_t p_t of a latent."""

    sae: SAE
    latents: Tensor
    """int64 (B, n)."""
    weights: Tensor
    """float32 (B, n, N): c, of all tokens of the tower."""

    def of(self, which: slice) -> "TokenTargets":
        """Some of the targets."""
        return TokenTargets(self.sae, self.latents[:, which], self.weights[:, which])

    def pre_activations(self, streams: Tensor) -> Tensor:
        """Streams (B, R, M, D), R sets of M tokens for each image -> p (B, R, n, M)."""
        B, R, M, _ = streams.shape
        inputs = self.sae.inputs(streams.flatten(0, 2)).values - self.sae.pre_bias
        rows, bias = self.sae.encoder.T[self.latents], self.sae.latent_bias[self.latents]
        return (inputs.view(B, R * M, -1) @ rows.mT + bias[:, None]).view(B, R, M, -1).mT

    def values(self, streams: Tensor, present: Tensor) -> Tensor:
        """z of R sets of tokens of each image: streams (B, R, M, D) of the tokens with the numbers `present`, (R, M) for all
        images or (B, R, M) -> (B, R, n)."""
        numbers = present.expand(*streams.shape[:3])[:, :, None].expand(-1, -1, self.weights.shape[1], -1)
        weights = self.weights[:, None].expand(-1, streams.shape[1], -1, -1).gather(-1, numbers)  # B R n M
        return (self.pre_activations(streams) * weights).sum(-1)

    def whole(self, streams: Tensor) -> Tensor:
        """z (B, n) of the streams of all tokens, (B, N, D)."""
        return self.values(streams[:, None], torch.arange(streams.shape[1], device=streams.device)[None])[:, 0]


class TokenBatch(NamedTuple):
    """One forward over B images, and the targets to explain: all that a method reads."""

    tower: TokenTower
    pixels: Tensor
    """uint8 (B, height, width, 3)."""
    streams: Tensor
    """float32 (B, N, D): what the SAE reads, of all tokens of the tower."""
    trace: TokenTrace
    targets: TokenTargets
    at_tokens: Tensor
    """float32 (B, n, T): activations at the tokens that the site reads."""
    pre_activations: Tensor
    """float32 (B, n, N): p at every token of the tower."""
    values: Tensor
    """float32 (B, n): z."""
    options: Options


def token_targets(sae: SAE, tower: TokenTower, streams: Tensor, code: Pooled, pool: str) -> TokenTargets:
    """The targets of latents that were pooled."""
    own = tower.reads_from
    weights = streams.new_zeros(*code.latents.shape, streams.shape[1])
    targets = TokenTargets(sae, code.latents, weights)
    if pool == "cls":
        weights[..., 0] = 1
        return targets
    p = targets.pre_activations(streams[:, None, own:])[:, 0]
    fires = code.at_tokens != 0
    if pool == "max":
        strength = code.at_tokens.abs()
        # Of a latent that fires nowhere, the token where it is nearest to firing.
        near = p.abs() if sae.config.by_magnitude else p
        token = torch.where(fires.any(-1), strength.argmax(-1), near.argmax(-1))
        weights.scatter_(-1, token[..., None] + own, 1.0)
        return targets
    signs = p.sign() if sae.config.output == "absolute" else torch.ones_like(p)
    weights[..., own:] = fires * signs / (fires.shape[-1] if pool == "mean" else 1)
    return targets


def layers_needed(methods: Iterable[str], options: Options, n_layers: int) -> int:
    """Of how many last layers a trace must tell, so that these methods can read it."""
    depths = [options.layers_of(name, n_layers) if METHODS[name].takes_layers else 1 for name in methods]
    return max(depths, default=1)


def check_fits(tower: TokenTower, methods: Iterable[str], options: Options) -> None:
    """ValueError for options that these methods, or this tower, cannot follow where an SAE reads tokens."""
    if options.norm == "exact":
        raise ValueError("norm exact: where the SAE reads tokens, the norms that it takes of them are held constant")
    if any(METHODS[name].takes_layers for name in methods) and options.layers > tower.n_layers:
        raise ValueError(f"layers {options.layers}: as far as the SAE's site, this model has {tower.n_layers}")
    if "occlusion" in methods and options.block >= max(tower.grid) and not tower.n_own:
        raise ValueError(
            f"block {options.block}: this model has {max(tower.grid)} patches a side, and nothing else to see"
        )


def explain_tokens(
    methods: tuple[str, ...],
    tower: TokenTower,
    pixels: Tensor,
    streams: Tensor,
    trace: TokenTrace,
    targets: TokenTargets,
    code: Pooled,
    options: Options,
) -> dict[str, Maps]:
    """The maps of one forward by every method. `code` is that of the targets' latents."""
    p = targets.pre_activations(streams[:, None])[:, 0]
    values = (p * targets.weights).sum(-1)
    batch = TokenBatch(tower, pixels, streams, trace, targets, code.at_tokens, p, values, options)
    return {method: FUNCTIONS[method](batch) for method in methods}


class Explained(NamedTuple):
    """What `explain_pooled` makes of B images."""

    trace: TokenTrace
    code: Pooled
    """Of the k kept latents, then of those asked for by number."""
    values: Tensor
    """float32 (B, n): z of the same."""
    first: int
    """The first of them that has maps: 0, or k if the kept latents have none."""
    maps: dict[str, Maps]
    """By method, of the latents from `first` on."""


def explain_pooled(
    methods: tuple[str, ...],
    tower: TokenTower,
    sae: SAE,
    pixels: Tensor,
    pool: str,
    k: int,
    axis: TargetAxis,
    options: Options = DEFAULT_OPTIONS,
) -> Explained:
    """uint8 pixels (B, height, width, 3) -> the k strongest latents of each image, pooled, and maps by every method of the
    targets that the axis names."""
    streams, trace = tower.streams(pixels, layers_needed(methods, options, tower.n_layers))
    asked = torch.tensor(axis.asked, dtype=torch.int64, device=streams.device)
    code = pool_tokens(sae, streams[:, tower.reads_from :], pool, k, asked)
    targets = token_targets(sae, tower, streams, code, pool)
    first = k - axis.n_kept
    shown = Pooled(code.latents[:, first:], code.pooled[:, first:], code.at_tokens[:, first:], *code[3:])
    maps = explain_tokens(methods, tower, pixels, streams, trace, targets.of(slice(first, None)), shown, options)
    return Explained(trace, code, targets.whole(streams), first, maps)


def activation(batch: TokenBatch) -> Maps:
    """The latent's activation at each patch: exact, and never negative unless the SAE's output is signed."""
    return _undivided(batch, batch.at_tokens[..., batch.tower.n_own - batch.tower.reads_from :])


def contrib(batch: TokenBatch) -> Maps:
    """Exact signed contribution of every patch to z: `saecore.relevance.maps.contrib`, with tokens in the place of CLS.

    With norms held constant, p_tj = g_t u_j . x_t + a constant, where only the number g_t is the token's own. So the rows of
    attention of all tokens that make z are added up first, with weights c_tj g_t, and one product with the values does for all
    of them. The remainder is computed from its own terms.

    Cost for each layer: 2 N^2 D FLOP for the attention and 2 N^2 H n for its mixture: by count 3 % of a layer of B/16, n = 32.
    """
    tower, trace, u = batch.tower, batch.trace, batch.targets.sae.directions(batch.targets.latents)
    B, N, _ = batch.streams.shape
    seen = batch.targets.sae.inputs(batch.streams.flatten(0, 1))
    mixed = batch.targets.weights * seen.gain.view(B, 1, N)
    layers = len(trace.entering)
    leaving = [*trace.entering[1:], trace.leaving]
    tokens = mixed * (u @ trace.entering[0].float().mT)  # what each token brings along
    through_mlps = torch.zeros_like(batch.streams)
    rest = torch.zeros_like(batch.values)
    for index, layer in zip(range(layers), tower.path()[-layers:], strict=True):
        through_mlps += leaving[index].float() - trace.after[index].float()
        rest += (u @ layer.out_bias.float()) * mixed.sum(-1)
        read = by_head((u.to(layer.out.dtype) @ layer.out).float(), tower.n_heads).transpose(1, 2)  # B H n Dh
        values = by_head(trace.v[index], tower.n_heads).permute(0, 2, 3, 1).float()  # B H Dh N
        rows = mixed[:, None] @ tower.attention(trace.q[index], trace.k[index])  # B H n N
        tokens += (rows * (read @ values)).sum(1)
    rest += (mixed * (u @ through_mlps.mT)).sum(-1)
    constants = batch.pre_activations - seen.gain.view(B, 1, N) * (u @ batch.streams.mT)
    return _divided(batch, tokens, rest + (batch.targets.weights * constants).sum(-1))


def contrib_grad(batch: TokenBatch) -> Maps:
    """Attention times its exact gradient along each token's own path, and the gradient times what the token brings along.

    `saecore.relevance.maps.contrib_grad`, for each pair of a target and a token that makes it, with all other tokens held
    constant. By max a target has one token; by sum and mean it has as many as it fires at, and costs as much for each.
    """
    tower, weights, streams = batch.tower, batch.targets.weights, batch.streams
    sums = [torch.zeros_like(batch.values) for _ in range(2)]
    tokens, (remainder, error) = torch.zeros_like(weights), sums
    path = tower.path()[-len(batch.trace.entering) :]
    u = batch.targets.sae.directions(batch.targets.latents)
    gain = batch.targets.sae.inputs(streams.flatten(0, 1)).gain.view(len(u), -1)
    p = batch.pre_activations
    for target, token, c in _pairs(weights):
        of_target = target[..., None].expand(-1, -1, u.shape[-1])
        G = u.gather(1, of_target) * gain.gather(1, token)[..., None]
        passings = [_passing(batch, path[index], index, token) for index in range(len(path))]
        relevance, rest = torch.zeros_like(tokens[:, :1]), p.flatten(1).gather(1, target * weights.shape[-1] + token)
        s, signed = tangent.signs(len(path), tower.n_heads, weights.shape[-1]).to(G.device), torch.zeros_like(rest)
        for index, inside in gradients_along(path, passings, tower.n_heads, G):
            passing = passings[index]
            product = passing.attention.transpose(1, 2) * inside.D  # B Q H N
            relevance = relevance + product.sum(2)
            signed = signed + product.flatten(2) @ s[index].flatten()
            added = passing.after.float() - passing.before.float() - path[index].out_bias.float()
            rest = rest - (inside.G_y * added).sum(-1)
        entering = passings[0].before.float()
        brought = (before_layer(path[0], passings[0], inside) * entering).sum(-1)
        relevance = relevance.scatter_add(-1, token[..., None], brought[..., None])
        forwards = tangent.derivative_along(path, passings, tower.n_heads, G, start=entering)
        owners = target[..., None].expand(-1, -1, weights.shape[-1])
        tokens.scatter_add_(1, owners, relevance * c[..., None])
        remainder.scatter_add_(1, target, (rest - brought) * c)
        error.scatter_add_(1, target, (signed + brought - forwards).abs() * c.abs())
    return _divided(batch, tokens, remainder)._replace(gradient_error=error)


def occlusion(batch: TokenBatch) -> Maps:
    """What z loses if patches are taken out of the sequence: `saecore.relevance.occlusion.occlusion`, with the same weights c.

    Where a dropped token is one of those that make z, all that it gave is lost.
    """
    values = batch.targets.values
    return Maps(
        losses(batch.tower, batch.pixels, batch.values, values, batch.options.block),
        torch.full_like(batch.values, torch.nan),
    )


def attention(batch: TokenBatch) -> Maps:
    """The last layer's attention of the tokens that make z, mean over heads and, by |c|, over these tokens: a control."""
    rows = batch.tower.attention(batch.trace.q[-1], batch.trace.k[-1]).mean(1)
    share = batch.targets.weights.abs()
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    return _undivided(batch, (share @ rows)[..., batch.tower.n_own :])


FUNCTIONS: dict[str, Callable[[TokenBatch], Maps]] = {
    "activation": activation,
    "contrib": contrib,
    "contrib_grad": contrib_grad,
    "occlusion": occlusion,
    "attention": attention,
}
"""The function of each method that explains tokens."""


def _pairs(weights: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Weights (B, n, N) -> the pairs that have one, some at a time: target, token and weight, (B, Q) each.

    Images have different numbers of pairs: some are filled up with pairs of weight 0.
    """
    flat = weights.flatten(1)
    most = int((flat != 0).sum(1).amax())
    order = (flat == 0).sort(dim=1, stable=True).indices[:, :most]
    for pairs in order.split(max(1, PAIRS_AT_ONCE // len(weights)), 1):
        yield pairs // weights.shape[-1], pairs % weights.shape[-1], flat.gather(1, pairs)


def _passing(batch: TokenBatch, layer: PathLayer, index: int, token: Tensor) -> Passing:
    """What the layer of that index did to tokens (B, Q)."""
    trace = batch.trace
    every = token[..., None].expand(-1, -1, batch.streams.shape[-1])
    before, after, q = (x[index].gather(1, every) for x in (trace.entering, trace.after, trace.q))
    rows = batch.tower.attention(q, trace.k[index])
    inner = layer.mlp.fc1(layer.norm2(after))
    return Passing(before, after, inner, rows, q, trace.k[index], trace.v[index], token)


def _divided(batch: TokenBatch, tokens: Tensor, rest: Tensor) -> Maps:
    """Maps from the contributions of all tokens, (B, n, N). CLS's part goes to the remainder."""
    n_own = batch.tower.n_own
    return Maps(tokens[..., n_own:], tokens[..., :n_own].sum(-1) + rest)


def _undivided(batch: TokenBatch, patches: Tensor) -> Maps:
    return Maps(patches.contiguous(), torch.full_like(batch.values, torch.nan))
