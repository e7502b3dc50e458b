"""Pseudo-derivatives against their formulas and against what they estimate; sparse products against dense autograd."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saecore.training.kernels import decode_entries, jump_relu, picked, rectangle, step

WIDTH = 0.5
"""Bandwidth: wide, so that many samples lie in the kernel."""


def batch(rows: int = 200, n: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Values, thresholds and incoming gradients, float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, n, generator=generator, dtype=torch.float64).requires_grad_()
    threshold = torch.rand(n, generator=generator, dtype=torch.float64).requires_grad_()
    return x, threshold, torch.randn(rows, n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kernel", [jump_relu, step])
def test_gradients_are_the_published_formulas(kernel: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    x, threshold, incoming = batch()
    out = kernel(x, threshold, WIDTH)
    out.backward(incoming)
    v, t, g = x.detach().numpy(), threshold.detach().numpy(), incoming.numpy()
    near = (np.abs((v - t) / WIDTH) < 0.5).astype(float)
    jump = t if kernel is jump_relu else np.ones_like(t)
    np.testing.assert_array_equal(out.detach(), (v if kernel is jump_relu else 1.0) * (v > t))
    assert threshold.grad is not None
    assert x.grad is not None
    np.testing.assert_allclose(threshold.grad, (-(jump / WIDTH) * near * g).sum(0), rtol=1e-12)
    np.testing.assert_array_equal(x.grad, g * (v > t) * (kernel is jump_relu))


@pytest.mark.parametrize("kernel", [jump_relu, step])
def test_the_mean_gradient_is_the_slope_of_the_expected_loss(
    kernel: Callable[[Tensor, Tensor, float], Tensor],
) -> None:
    """d/dt E[loss], by a central difference over many samples: what one sample's derivative, 0, cannot say.

    The pseudo-derivative takes the loss's slope on either side of the gate alike: the trapezoid rule, exact for squared errors.
    """
    n, t, h = 2_000_000, 0.4, 0.1
    x = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(threshold: Tensor) -> Tensor:
        return (kernel(x, threshold, h) - 1.3 * torch.cos(x)).square().mean()

    threshold = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    loss(threshold).backward()
    assert threshold.grad is not None
    with torch.no_grad():
        slope = (loss(threshold + h / 2) - loss(threshold - h / 2)) / h
    assert float(threshold.grad) == pytest.approx(float(slope), rel=0.03)
    density = np.exp(-t * t / 2) / np.sqrt(2 * np.pi)
    opened, target = (t if kernel is jump_relu else 1.0), 1.3 * np.cos(t)
    exact = -density * ((opened - target) ** 2 - target**2)
    assert float(threshold.grad) == pytest.approx(exact, rel=0.03)


def test_the_rectangle_is_open_and_passes_gradients_inside() -> None:
    x = torch.tensor([-0.5, -0.49, 0.0, 0.49, 0.5], requires_grad=True)
    out = rectangle(x)
    out.backward(torch.arange(5.0))
    assert out.tolist() == [0, 1, 1, 1, 0]
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 2, 3, 0]


def leaves() -> list[Tensor]:
    """v, pre-bias, encoder (stored transposed, as the SAE's), latent bias, atoms; float64."""
    B, d, n = 9, 5, 11
    generator = torch.Generator().manual_seed(2)
    made = [
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((B, d), (d,), (n, d), (n,), (n, d))
    ]
    made[2] = made[2].T
    return [made[0], *(tensor.requires_grad_() for tensor in made[1:])]


def entries() -> tuple[Tensor, Tensor]:
    """Some of all (row, latent); the first and last rows and latents have none, latent 3 has all others."""
    mask = torch.rand(9, 11, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[:, 3] = True
    mask[[0, -1]] = False
    mask[:, [0, -1]] = False
    rows, cols = mask.nonzero(as_tuple=True)
    return rows, cols


def test_picked_equals_dense_autograd() -> None:
    rows, cols = entries()
    weights = torch.randn(len(rows), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found: list[Any] = []
    expected: list[Any] = []
    for gradients, sparse in ((found, True), (expected, False)):
        v, b, encoder, c, _ = leaves()
        p = (v - b) @ encoder + c
        values = picked(v, b, encoder, c, p.detach(), rows, cols) if sparse else p[rows, cols]
        (values.sin() * weights).sum().backward()
        gradients += [values.detach(), b.grad, encoder.grad, c.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_decode_entries_equals_a_dense_product() -> None:
    """Bags without entries, first, last and in the middle, are sums of nothing."""
    rows, cols = entries()
    found: list[Any] = []
    expected: list[Any] = []
    for gradients, sparse in ((found, True), (expected, False)):
        atoms = leaves()[4]
        values = torch.randn(
            len(rows), generator=torch.Generator().manual_seed(5), dtype=torch.float64
        ).requires_grad_()
        dense = torch.zeros(9, 11, dtype=torch.float64).index_put((rows, cols), values)
        decoded = decode_entries(values, cols, atoms, rows, 9) if sparse else dense @ atoms
        decoded.sin().sum().backward()
        gradients += [decoded.detach(), values.grad, atoms.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_no_entries_at_all() -> None:
    """A batch in which nothing fires."""
    v, b, encoder, c, atoms = leaves()
    none = torch.zeros(0, dtype=torch.int64)
    values = picked(v, b, encoder, c, torch.zeros(9, 11, dtype=torch.float64), none, none)
    decoded = decode_entries(values, none, atoms, none, 9)
    assert torch.equal(decoded, torch.zeros(9, 5, dtype=torch.float64))
    decoded.sum().backward()
    assert encoder.grad is not None
    assert not encoder.grad.any()
