"""Relevance maps: one value per patch for any linear read-out of the CLIP image embedding.

Each method is one pure function of a `Batch`: the `Trace` of one forward, and the targets. It explains every target of every
image at once, without autograd and without a second forward. It always explains the pre-activation, never the value after TopK,
which is flat wherever a latent is off. With A the CLS attention row of a layer and D = dz/dA along the CLS path
(`saecore.towers.cls_path`), by head h, summed over the last `layers` layers l:

    contrib        sum_lh A (v . W_O' u)         signed, exact: adds up to the pre-activation with its remainder
    contrib_grad   sum_lh A D                    signed, exact gradient: adds up likewise
    chefer         R_0 <- R_0 + c (R_0, R_i),  c = mean_h max(A D, 0)       of the last layer: mean_h max(A D, 0)
    legrad         sum_l mean_h max(D, 0)        by default of each layer's own target, not of the embedding's
    gradeclip      max(lambda_i sum_h D, 0)      lambda: cosine of CLS's query and each key, from 0 to 1 over the patches
    dense          z of the patch's token in CLS's place, or v . W_O' u without attention: an activation, not a cause
    attention      mean_h A                      the same for every target: a control

The remainder is defined for the first two, and NaN for the others. `saecore.methods.Options` documents the options.
SigLIP has no CLS token: the learned query of its pooling takes CLS's place below, on a path of one layer.

Left out: methods that remove patches, or need more than one forward (`saecore.relevance.occlusion`,
`saecore.relevance.rollout`).

Shapes are those of `saecore.towers.tower`: B images, k targets, N tokens, P patches, H heads, D width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from saecore.methods import DEFAULT_OPTIONS, Options
from saecore.relevance import tangent
from saecore.relevance.own_targets import own_target_gradients
from saecore.relevance.targets import Targets, cosine_read_outs
from saecore.removal.head import Head
from saecore.towers.cls_path import attention_gradients, by_head
from saecore.towers.tower import ImageTower, Trace

LIT_FOR_ANY_TEXT = 0.8
"""The threshold of LeGrad's published code: patches above it light for any text."""


class Batch(NamedTuple):
    """One forward over B images, and the targets to explain: all that a method reads."""

    tower: ImageTower
    pixels: Tensor
    """uint8 (B, height, width, 3)."""
    embedding: Tensor
    """float32 (B, E)."""
    trace: Trace
    targets: Targets
    exact: bool
    """Whether norms are differentiated too, or frozen. Exact and frozen methods have a batch each."""
    read_outs: Tensor
    """float32 (B, k, E): the targets' w."""
    offsets: Tensor
    """float32 (B, k): the targets' c."""
    options: Options
    heads: bool
    """Whether heads are kept apart, by contrib, contrib_grad, chefer of one layer, legrad and attention."""
    check: bool
    """Whether contrib_grad checks its gradient, which costs one row a layer."""
    head: Head | None = None
    """What removal predicts with."""


class Maps(NamedTuple):
    """k maps of each image; of a decomposition, relevance.sum(-1) + remainder = pre-activation."""

    relevance: Tensor
    """float32 (B, k, P), row-major over the patch grid, in the method's units. With `Batch.heads` it is (B, k, H, P), and the
    heads add up to the map."""
    remainder: Tensor
    """float32 (B, k): what no patch accounts for (the CLS token's own path, MLPs, biases, constants); NaN if undefined."""
    gradient_error: Tensor | None = None
    """float32 (B, k), of contrib_grad only: the distance of its terms, added with fixed signs, from the derivative taken
    forwards (`saecore.relevance.tangent`); None if that was not computed."""
    standard_error: Tensor | None = None
    """float32 (B, k, P), of shapley only: of the sampling."""


def batch_of(
    tower: ImageTower,
    pixels: Tensor,
    embedding: Tensor,
    trace: Trace,
    targets: Targets,
    exact: bool = False,
    options: Options = DEFAULT_OPTIONS,
    heads: bool = False,
    check: bool = True,
    head: Head | None = None,
) -> Batch:
    """The batch, with the targets' read-outs computed."""
    read_outs = targets.read_outs(embedding, exact)
    return Batch(tower, pixels, embedding, trace, targets, exact, *read_outs, options, heads, check, head)


def contrib(batch: Batch) -> Maps:
    """Exact signed contribution of every patch to `read_outs . e + offsets`, summed over heads and layers.

    Gandelsman et al. 2024 (arXiv:2310.05916), with every term centred exactly. With u the read-out pulled back to the CLS
    residual stream (final LayerNorm frozen or exact) and A, v the CLS attention row and values of layer l and head h:

        R_i = sum_{l,h} A_i^{lh} (v_i^{lh} . W_O^{lh}' u)       remainder = everything else that was added to CLS

    Invariant: sum_i R_i + remainder = pre-activation, because the CLS residual stream is a sum. The remainder is computed
    from its own terms and not by subtraction, so that the invariant can fail and is worth measuring.
    R holds direct effects only: it omits what patches do to CLS through other patches, or through CLS's later MLPs.

    Cost: 2ND(1 + k) + 2kD^2 FLOP per layer and image, which is 1 to 6 % of a forward at k = 32.
    """
    tower, trace = batch.tower, batch.trace
    direction, constant = tower.pull_back(batch.read_outs, trace.query_final, batch.exact)
    path = tower.path()
    layers = batch.options.layers_of("contrib", len(path))
    # Whatever earlier layers added to CLS counts as its own path.
    own_path = trace.query_before[-layers].float()
    tokens_BkHN = _no_tokens(batch)
    for index in range(-layers, 0):
        layer, v, A = path[index], trace.values[index], trace.query_attention[index]
        leaving = trace.query_final if index == -1 else trace.query_before[index + 1]
        own_path = own_path + layer.out_bias.float() + leaving.float() - trace.query_after[index].float()
        target_BkD = direction.to(v.dtype) @ layer.out
        v_BNHD = by_head(v, tower.n_heads)
        if batch.heads:
            read_BHkN = by_head(target_BkD, tower.n_heads).transpose(1, 2) @ v_BNHD.permute(0, 2, 3, 1)
            tokens_BkHN = tokens_BkHN + A[:, None] * read_BHkN.transpose(1, 2).float()
        else:  # A product of concatenated heads sums over the heads, so one product does for all.
            weighted_BND = (v_BNHD * A.transpose(1, 2).unsqueeze(-1).to(v.dtype)).flatten(2)
            tokens_BkHN += (target_BkD @ weighted_BND.transpose(1, 2))[:, :, None]
    fixed = (direction @ own_path.unsqueeze(-1)).squeeze(-1)
    return _decomposed(batch, tokens_BkHN, fixed + constant + batch.offsets)


def contrib_grad(batch: Batch) -> Maps:
    """Attention times its exact gradient along the CLS path, summed over heads and layers: signed.

    R_i = sum_l sum_h A_i^{lh} dz/dA_i^{lh}. Unlike `contrib` it includes what later MLPs and later queries of the CLS token
    make of a patch. Invariant of each layer: sum over tokens of A D = G_y . (y - x - b_O). The remainder takes the right side
    from the residual stream, so that relevance.sum + remainder = pre-activation can fail. The invariant holds for any G_y,
    right or wrong; `saecore.relevance.tangent` checks for each target of each image that G_y is the gradient.
    """
    tower, trace = batch.tower, batch.trace
    pre = (batch.read_outs @ tower.embed_query(trace.query_final)[..., None]).squeeze(-1) + batch.offsets
    path, by_stream, tokens_BkHN = tower.path(), torch.zeros_like(pre), _no_tokens(batch)
    layers = batch.options.layers_of("contrib_grad", len(path))
    s, signed = tangent.signs(layers, tower.n_heads, tokens_BkHN.shape[-1]).to(pre.device), torch.zeros_like(pre)
    for index, D, G_y in _gradients(batch, layers):
        product_BkHN = trace.query_attention[index][:, None] * D
        signed += product_BkHN.flatten(2) @ s[index].flatten()
        tokens_BkHN = tokens_BkHN + (product_BkHN if batch.heads else product_BkHN.sum(2, keepdim=True))
        added = trace.query_after[index].float() - trace.query_before[index].float() - path[index].out_bias.float()
        by_stream += (G_y @ added[..., None]).squeeze(-1)
    maps = _decomposed(batch, tokens_BkHN, pre - by_stream)
    if not batch.check:
        return maps
    direction, _ = tower.pull_back(batch.read_outs, trace.query_final, batch.exact)
    return maps._replace(gradient_error=(signed - tangent.derivative(tower, trace, direction, layers)).abs())


def chefer(batch: Batch) -> Maps:
    """Chefer et al. 2021 (arXiv:2103.15679): positive part of attention times gradient; CLIP's default is the last layer.

    With more layers it is their rule R <- R + c R along the CLS path: of c only the CLS row is used, so that only the CLS row
    of R ever changes. The rule mixes heads, so they can be kept apart in one layer only (ValueError otherwise).
    """
    tower = batch.tower
    layers = batch.options.layers_of("chefer", len(tower.path()))
    if batch.heads and layers > 1:
        raise ValueError(f"chefer mixes the heads of {layers} layers: they can be kept apart in one layer only")
    gradients = list(_gradients(batch, layers))
    patches = _no_tokens(batch)[..., tower.n_own :]
    for index, D, _ in reversed(gradients):  # The rule goes from the first layer to the last.
        cam = _mean_heads((batch.trace.query_attention[index][:, None] * D).clamp(min=0), batch)
        patches = patches + cam[..., : tower.n_own].sum(-1, keepdim=True) * patches + cam[..., tower.n_own :]
    return _undivided(batch, patches)


def legrad(batch: Batch) -> Maps:
    """LeGrad (Bousselham et al. 2024, arXiv:2404.03214): positive part of the attention gradient, summed over layers.

    `legrad_target="mean"`, the default, is as published. Each layer has its own target: the read-out of an embedding that is
    made of the layer's mean token, or for SigLIP of its pooled tokens. All rows of the layer's attention count. The published
    code takes the last two layers, the paper all. `"cls"` is ours: the read-out of the embedding itself, by CLS's attention
    row. Below the last layer it follows the CLS path.
    """
    tower, options = batch.tower, batch.options
    if options.legrad_target == "mean":
        return _undivided(batch, _own_targets(batch, options.layers_of("legrad", tower.n_layers)))
    total = _no_tokens(batch)[..., tower.n_own :]
    for _, D, _ in _gradients(batch, options.layers_of("legrad", len(tower.path()))):
        total = total + _mean_heads(D.clamp(min=0), batch)[..., tower.n_own :]
    return _undivided(batch, total)


def _own_targets(batch: Batch, layers: int) -> Tensor:
    """LeGrad as published: patches (B, k, H or 1, P).

    For SigLIP, the published code also explains a text that says nothing, and scales its map from 0 to 1 over the patches.
    Patches where this map is above 0.8 light for any text, and the code sets them to zero.
    """
    blank = batch.targets.words.blank if corrects_legrad(batch.tower, batch.options) else None

    def read_outs(embedding: Tensor) -> Tensor:
        w, _ = batch.targets.read_outs(embedding, batch.exact)
        return w if blank is None else torch.cat([w, cosine_read_outs(blank, embedding, batch.exact)[0]], 1)

    gradients = own_target_gradients(batch.tower, batch.trace, read_outs, layers, batch.exact)
    patches = torch.stack([_mean_heads(D, batch) for D in gradients]).sum(0)[..., batch.tower.n_own :]
    if blank is None:
        return patches
    blank_map = patches[:, -1:].sum(2, keepdim=True)
    low, high = blank_map.amin(-1, keepdim=True), blank_map.amax(-1, keepdim=True)
    return patches[:, :-1].where(blank_map - low <= LIT_FOR_ANY_TEXT * (high - low), 0.0)


def corrects_legrad(tower: ImageTower, options: Options) -> bool:
    """Whether legrad needs `WordTargets.blank`: only for SigLIP, whose tokens are all patches."""
    return options.legrad_correction and options.legrad_target == "mean" and tower.n_own == 0


def gradeclip(batch: Batch) -> Maps:
    """Grad-ECLIP (Zhao et al. 2024, arXiv:2502.18816) with the model's own heads; the published code runs one head.

    Its notebook takes the cosine of q and k, which is our default. Its scripts take the cosine of W_O q + b_O and W_O k + b_O
    (`gradeclip_cosine="projected"`).
    """
    trace, n_own = batch.trace, batch.tower.n_own
    _, D, _ = next(_gradients(batch, 1))
    query, keys = trace.query_q[-1][:, None], trace.keys[-1][:, n_own:]
    if batch.options.gradeclip_cosine == "projected":
        layer = batch.tower.path()[-1]
        query, keys = (linear(x, layer.out, layer.out_bias) for x in (query, keys))
    cosines = torch.cosine_similarity(query.float(), keys.float(), dim=-1)
    low, high = cosines.amin(-1, keepdim=True), cosines.amax(-1, keepdim=True)
    weights = (cosines - low) / (high - low).clamp(min=torch.finfo(cosines.dtype).tiny)
    return _undivided(batch, (weights[:, None] * D.sum(2)[..., n_own:]).clamp(min=0)[:, :, None])


def dense(batch: Batch) -> Maps:
    """What the SAE makes of each patch's own token. It shows where a target is active, not where it comes from.

    `token`: the patch's last residual stream goes through the final LayerNorm and projection in CLS's place, as in read-outs
    like MaskCLIP's, and the map has the target's value for it, constants included; for SigLIP, the value if the pooling looked
    only at this patch. `value`: the patch's last value vector goes through the attention's output weights, v_i . W_O' u,
    without attention. An SAE that was trained on CLS tokens has seen neither.
    """
    tower, trace = batch.tower, batch.trace
    if batch.options.dense == "token":
        values = batch.targets.values(tower.embed_each(trace.tokens[-1][:, tower.n_own :]))
        return _undivided(batch, values.transpose(1, 2)[:, :, None])
    direction, _ = tower.pull_back(batch.read_outs, trace.query_final, batch.exact)
    v = trace.values[-1]
    read = (direction.to(v.dtype) @ tower.path()[-1].out) @ v.transpose(1, 2)
    return _undivided(batch, read[:, :, None, tower.n_own :].float())


def attention(batch: Batch) -> Maps:
    """The last layer's CLS attention, mean over heads. It does not know the target, so every map should do better."""
    row = _mean_heads(batch.trace.query_attention[-1][:, None], batch)[..., batch.tower.n_own :]
    return _undivided(batch, row.expand(-1, batch.read_outs.shape[1], -1, -1).contiguous())


def _gradients(batch: Batch, layers: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    return attention_gradients(batch.tower, batch.trace, batch.read_outs, layers, batch.exact)


def _no_tokens(batch: Batch) -> Tensor:
    """Zeros to add to, (B, k, 1, N). Heads are summed over, or broadcast."""
    shape = (*batch.read_outs.shape[:2], 1, batch.trace.values[-1].shape[1])
    return torch.zeros(shape, device=batch.read_outs.device)


def _mean_heads(x: Tensor, batch: Batch) -> Tensor:
    """(B, k, H, N) -> the mean over heads, (B, k, 1, N), or each head's part of the mean with `Batch.heads`."""
    return x / x.shape[2] if batch.heads else x.mean(2, keepdim=True)


def _decomposed(batch: Batch, tokens: Tensor, rest: Tensor) -> Maps:
    """Maps from the contributions of all tokens, (B, k, H or 1, N). The CLS token's own part goes to the remainder."""
    n_own = batch.tower.n_own
    patches = tokens[..., n_own:]
    return Maps(patches if batch.heads else patches.squeeze(2), tokens[..., :n_own].sum((2, 3)) + rest)


def _undivided(batch: Batch, patches: Tensor) -> Maps:
    """Maps, (B, k, H or 1, P), without a remainder."""
    relevance = patches if batch.heads else patches.squeeze(2)
    return Maps(relevance, torch.full_like(batch.offsets, torch.nan))


def completeness_error(maps: Maps, pre_activations: Tensor) -> Tensor:
    """(B, k): |relevance.sum + remainder - pre-activation| / max(1, |pre-activation|).

    `Maps.gradient_error` takes the place of the numerator where it is larger.
    """
    error = (maps.relevance.flatten(2).sum(-1) + maps.remainder - pre_activations).abs()
    if maps.gradient_error is not None:
        error = torch.maximum(error, maps.gradient_error)
    return error / pre_activations.abs().clamp(min=1)


def sink_share(maps: Maps, sinks: Tensor) -> Tensor:
    """(B, k) in [0, 1]: the part of sum |relevance| that lies on the patches flagged as sinks, bool (B, P)."""
    size = maps.relevance.abs()
    return (size * sinks[:, None]).sum(-1) / size.sum(-1).clamp(min=torch.finfo(size.dtype).tiny)
