"""Functions that training needs and for which PyTorch has no derivative, or no sparse one.

`jump_relu` and `step` have zero gradient almost everywhere with respect to their threshold t; both get the pseudo-derivatives
of Rajamanoharan et al. 2024 (arXiv:2407.14435, equations 11 and 12), with the rectangle kernel R of bandwidth w:

    jump_relu(x, t) = x 1[x > t]        d/dt = -(t / w) R((x - t) / w)        d/dx = 1[x > t]
    step(x, t)      =   1[x > t]        d/dt = -(1 / w) R((x - t) / w)        d/dx = 0
    R(v)            =   1[|v| < 1/2]

MSAE learns log t and omits the factor dt/dlog t. Here t itself is the parameter, so the formulas hold as printed.

`picked` and `decode_entries` are the two halves of an autoencoder in which B images have E firing latents together, E << B n.
The forward product with the encoder is dense, since every latent must be looked at. All other products touch only the E
entries. With 64 of 24,576 latents on, B = 1,024 and d = 768 on 2 CPU cores, decoding takes 9 ms and d(values) 24 ms; the dense
product takes 444 ms.

Left out: the losses that these functions are for (`saecore.training.objectives`).

Shapes: B images, d inputs, n latents, E entries (image, latent) in the order of their image.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import embedding_bag


class _Rectangle(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inside = (x > -0.5) & (x < 0.5)
        ctx.save_for_backward(inside)
        return inside.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside


class _JumpReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return x * (x > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, threshold = ctx.saved_tensors
        near = rectangle((x - threshold) / ctx.bandwidth)
        to_threshold = (-(threshold / ctx.bandwidth) * near * grads[0]).sum_to_size(threshold.shape)
        return grads[0] * (x > threshold), to_threshold, None


class _Step(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, threshold = ctx.saved_tensors
        near = rectangle((x - threshold) / ctx.bandwidth)
        to_threshold = (-(1 / ctx.bandwidth) * near * grads[0]).sum_to_size(threshold.shape)
        return torch.zeros_like(x), to_threshold, None


class _Picked(Function):
    """Entries of p = (v - b) E + c, which was computed before without a graph; only weights of the entries get gradients."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, b: Tensor, encoder: Tensor, c: Tensor, p: Tensor, rows: Tensor, cols: Tensor
    ) -> Tensor:
        ctx.save_for_backward(v, b, encoder, rows, cols)
        return p[rows, cols]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, b, encoder, rows, cols = ctx.saved_tensors
        n = encoder.shape[1]
        # The gradient of a latent's weights is a weighted sum of the inputs for which the latent fired: a bag of embedding_bag.
        order = torch.argsort(cols, stable=True)
        bounds = torch.searchsorted(cols[order], torch.arange(n + 1, device=cols.device))
        weights = grads[0][order]
        to_encoder = embedding_bag(
            rows[order], v - b, bounds, per_sample_weights=weights, mode="sum", include_last_offset=True
        )
        to_bias = torch.zeros(n, dtype=grads[0].dtype, device=cols.device).index_add_(0, cols, grads[0])
        # Summed over images before the product: a vector instead of a (B, n) matrix.
        to_pre_bias = -(encoder @ to_bias)
        return None, to_pre_bias, to_encoder.T, to_bias, None, None, None


def rectangle(x: Tensor) -> Tensor:
    """1 where |x| < 1/2, else 0; gradients pass where it is 1."""
    return _Rectangle.apply(x)


def jump_relu(x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """x where it exceeds the threshold (which broadcasts against it), else 0."""
    return _JumpReLU.apply(x, threshold, bandwidth)


def step(x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 where x exceeds the threshold, else 0."""
    return _Step.apply(x, threshold, bandwidth)


def picked(v: Tensor, b: Tensor, encoder: Tensor, c: Tensor, p: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """p[rows, cols] (E,) of p = (v - b) E + c (B, n), differentiable in b, E and c but not in v."""
    return _Picked.apply(v, b, encoder, c, p, rows, cols)


def decode_entries(values: Tensor, cols: Tensor, atoms: Tensor, bags: Tensor, n_bags: int) -> Tensor:
    """Sums (n_bags, d) of the rows `cols` of `atoms`, weighted with `values`, both (E,); `bags` (E,), ascending, numbers the
    sums."""
    starts = torch.searchsorted(bags, torch.arange(n_bags + 1, device=bags.device))
    return embedding_bag(cols, atoms, starts, per_sample_weights=values, mode="sum", include_last_offset=True)
