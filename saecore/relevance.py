"""Relevance maps: one value per patch for any linear read-out of the CLIP image embedding.

One pure function a method; all take a `Trace` and explain every read-out of every image of the batch at once, with no
autograd and no second forward. Always the pre-activation is explained, never the value after TopK, which is flat wherever
a latent is off. With A the CLS attention row of a layer and D = dz/dA along the CLS path (`saecore.cls_path`), by head h:

    contrib        sum_lh A (v . W_O' u)         signed, exact: adds up to the pre-activation with its remainder
    contrib_grad   sum_lh A D                    signed, exact gradient: adds up likewise
    chefer         R_0 <- R_0 + c (R_0, R_i),  c = mean_h max(A D, 0)       of the last layer: mean_h max(A D, 0)
    legrad         sum_l mean_h max(D, 0)
    gradeclip      max(lambda_i sum_h D, 0)      lambda: cosine of CLS's query and each key, from 0 to 1 over the patches
    attention      mean_h A                      the same for every read-out: a control

The remainder is defined for the first two, and NaN for the others: they are in no units.

Left out: gradient rollout, dense read-outs, occlusion.

Shapes as in `saecore.clip`: B images, k read-outs, N = 1 + P tokens, H heads, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saecore.clip import ImageTower, Trace
from saecore.cls_path import attention_gradients


class Maps(NamedTuple):
    """k maps of each image; for methods that decompose, relevance.sum(-1) + remainder = pre-activation."""

    relevance: Tensor
    """float32 (B, k, P), row-major over the patch grid, in pre-activation units where the method has units."""
    remainder: Tensor
    """float32 (B, k): what no patch accounts for (the CLS token's own path, MLPs, biases, constants); NaN if undefined."""


def contrib(tower: ImageTower, trace: Trace, read_outs: Tensor, offsets: Tensor) -> Maps:
    """Exact signed contribution of every patch to `read_outs . e + offsets`, summed over heads and all layers.

    Gandelsman et al. 2024 (arXiv:2310.05916), with every term centred exactly. With u the read-out pulled back to the CLS
    residual stream (final LayerNorm frozen) and A, v the CLS attention row and values of layer l and head h:

        R_i = sum_{l,h} A_i^{lh} (v_i^{lh} . W_O^{lh}' u)       remainder = everything else that was added to CLS

    Invariant: sum_i R_i + remainder = pre-activation, because the CLS residual stream is a sum. The remainder is computed
    from its own terms and not by subtraction, so that the invariant can fail and is worth measuring.
    A direct effect only: what patches do to CLS through other patches, or through its later MLPs, is not in R.

    read_outs: (B, k, E); offsets: (B, k). Cost: 2ND(1 + k) + 2kD^2 FLOP per layer and image, 1 to 6 % of a forward at k = 32.
    """
    direction, constant = tower.pull_back(read_outs, trace.cls_final)
    own_path = trace.cls_before[0].float()
    tokens_BkN = torch.zeros((*read_outs.shape[:2], trace.values[0].shape[1]), device=direction.device)
    layers = tower.vision.encoder.layers
    for index, (layer, v, attention) in enumerate(zip(layers, trace.values, trace.cls_attention, strict=True)):
        out = layer.self_attn.out_proj
        target_BkD = direction.to(v.dtype) @ out.weight
        by_head_BNHD = v.unflatten(-1, (tower.n_heads, -1))
        weighted_BND = (by_head_BNHD * attention.transpose(1, 2).unsqueeze(-1).to(v.dtype)).flatten(2)
        tokens_BkN += target_BkD @ weighted_BND.transpose(1, 2)
        leaving = trace.cls_before[index + 1] if index + 1 < len(layers) else trace.cls_final
        own_path = own_path + out.bias.float() + leaving.float() - trace.cls_after[index].float()
    fixed = (direction @ own_path.unsqueeze(-1)).squeeze(-1)
    return Maps(tokens_BkN[..., 1:], tokens_BkN[..., 0] + fixed + constant + offsets)


def contrib_grad(tower: ImageTower, trace: Trace, read_outs: Tensor, offsets: Tensor) -> Maps:
    """Attention times its exact gradient along the CLS path, summed over heads and all layers: signed.

    R_i = sum_l sum_h A_i^{lh} dz/dA_i^{lh}: unlike `contrib` it knows what later MLPs and later queries of the CLS token make
    of a patch. Invariant of each layer: sum over tokens of A D = G_y . (y - x - b_O), which the remainder takes from the
    residual stream, so that relevance.sum + remainder = pre-activation can fail.
    """
    pre = (read_outs @ trace_embedding(tower, trace)[..., None]).squeeze(-1) + offsets
    tokens = torch.zeros((*read_outs.shape[:2], trace.values[0].shape[1]), device=read_outs.device)
    linear = torch.zeros_like(pre)
    for index, D, G_y in attention_gradients(tower, trace, read_outs, len(trace.values)):
        tokens += (trace.cls_attention[index][:, None] * D).sum(2)
        bias = tower.vision.encoder.layers[index].self_attn.out_proj.bias.float()
        added = trace.cls_after[index].float() - trace.cls_before[index].float() - bias
        linear += (G_y @ added[..., None]).squeeze(-1)
    return Maps(tokens[..., 1:], tokens[..., 0] + pre - linear)


def trace_embedding(tower: ImageTower, trace: Trace) -> Tensor:
    """The embedding (B, E) that a trace ends in."""
    return tower.embed_cls(trace.cls_final)


def chefer(tower: ImageTower, trace: Trace, read_outs: Tensor, offsets: Tensor, layers: int = 1) -> Maps:
    """Chefer et al. 2021 (arXiv:2103.15679): positive part of attention times gradient; CLIP's default is the last layer.

    With more `layers`, their rule R <- R + c R along the CLS path: all rows of c but CLS's are left out, so that only the CLS
    row of R ever changes.
    """
    own = torch.ones(read_outs.shape[:2], device=read_outs.device)
    patches = torch.zeros((*own.shape, trace.values[0].shape[1] - 1), device=own.device)
    gradients = list(attention_gradients(tower, trace, read_outs, layers))
    for index, D, _ in reversed(gradients):  # the rule goes from the first layer to the last
        cam = (trace.cls_attention[index][:, None] * D).clamp(min=0).mean(2)
        patches = patches + cam[..., :1] * patches + cam[..., 1:]
        own = own + cam[..., 0] * own
    return Maps(patches, torch.full_like(own, torch.nan))


def legrad(tower: ImageTower, trace: Trace, read_outs: Tensor, offsets: Tensor, layers: int = 1) -> Maps:
    """LeGrad (Bousselham et al. 2024, arXiv:2404.03214) of the true target: positive part of the attention gradient.

    The paper reads the target off the mean token of each layer; here it is the read-out of the embedding itself.
    """
    total = torch.zeros((*read_outs.shape[:2], trace.values[0].shape[1] - 1), device=read_outs.device)
    for _, D, _ in attention_gradients(tower, trace, read_outs, layers):
        total += D[..., 1:].clamp(min=0).mean(2)
    return Maps(total, total.new_full(total.shape[:2], torch.nan))


def gradeclip(tower: ImageTower, trace: Trace, read_outs: Tensor, offsets: Tensor) -> Maps:
    """Grad-ECLIP (Zhao et al. 2024, arXiv:2502.18816) with the model's own heads; the published code runs one head."""
    _, D, _ = next(attention_gradients(tower, trace, read_outs, 1))
    query, keys = trace.cls_query[-1].float(), trace.keys[-1][:, 1:].float()
    loose = torch.cosine_similarity(query[:, None], keys, dim=-1)
    low, high = loose.amin(-1, keepdim=True), loose.amax(-1, keepdim=True)
    loose = (loose - low) / (high - low).clamp(min=torch.finfo(loose.dtype).tiny)
    relevance = (loose[:, None] * D.sum(2)[..., 1:]).clamp(min=0)
    return Maps(relevance, relevance.new_full(relevance.shape[:2], torch.nan))


def attention(tower: ImageTower, trace: Trace, read_outs: Tensor, offsets: Tensor) -> Maps:
    """The last layer's CLS attention, mean over heads: knows nothing of the read-out, and so is what maps must beat."""
    row = trace.cls_attention[-1].mean(1)[:, None, 1:]
    relevance = row.expand(-1, read_outs.shape[1], -1).contiguous()
    return Maps(relevance, relevance.new_full(relevance.shape[:2], torch.nan))


def completeness_error(maps: Maps, pre_activations: Tensor) -> Tensor:
    """(B, k): |relevance.sum + remainder - pre-activation| / max(1, |pre-activation|)."""
    error = maps.relevance.sum(-1) + maps.remainder - pre_activations
    return error.abs() / pre_activations.abs().clamp(min=1)


def sink_share(maps: Maps, sinks: Tensor) -> Tensor:
    """(B, k) in [0, 1]: the part of sum |relevance| that lies on patches flagged as sinks, bool (B, P)."""
    size = maps.relevance.abs()
    return (size * sinks[:, None]).sum(-1) / size.sum(-1).clamp(min=torch.finfo(size.dtype).tiny)
