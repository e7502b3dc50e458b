"""Gradients that PyTorch lacks: against the published formulas, finite differences of what they estimate, dense autograd."""

import numpy as np
import torch

from saecore.kernels import decode_entries, jump_relu, picked, rectangle, step

WIDTH = 0.3


def around_thresholds() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    threshold = torch.rand(7, generator=generator, dtype=torch.float64) + 0.2
    x = threshold + torch.randn(400, 7, generator=generator, dtype=torch.float64) * 0.3
    upstream = torch.randn(400, 7, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), threshold.requires_grad_(), upstream


def test_jump_relu_has_the_published_pseudo_derivatives() -> None:
    x, threshold, upstream = around_thresholds()
    y = jump_relu(x, threshold, WIDTH)
    y.backward(upstream)
    assert x.grad is not None
    assert threshold.grad is not None
    p, t, g = x.detach().numpy(), threshold.detach().numpy(), upstream.numpy()
    near = np.abs((p - t) / WIDTH) < 0.5
    assert near.any(axis=0).all()
    np.testing.assert_allclose(y.detach(), np.where(p > t, p, 0))
    np.testing.assert_allclose(x.grad, (p > t) * g)
    np.testing.assert_allclose(threshold.grad, (-(t / WIDTH) * near * g).sum(axis=0))


def test_step_has_the_published_pseudo_derivatives() -> None:
    x, threshold, upstream = around_thresholds()
    y = step(x, threshold, WIDTH)
    y.backward(upstream)
    assert x.grad is not None
    assert threshold.grad is not None
    p, t, g = x.detach().numpy(), threshold.detach().numpy(), upstream.numpy()
    np.testing.assert_allclose(y.detach(), p > t)
    np.testing.assert_allclose(x.grad, np.zeros_like(p))
    np.testing.assert_allclose(threshold.grad, (-(1 / WIDTH) * (np.abs((p - t) / WIDTH) < 0.5) * g).sum(axis=0))


def test_the_pseudo_derivatives_estimate_the_derivative_of_the_expectation() -> None:
    """E[jump_relu(x, t)] and E[step(x, t)] over smooth x do have a derivative in t: the kernels' mean is close to it."""
    x = torch.from_numpy(np.random.default_rng(0).normal(0.5, 1.0, 2_000_000))
    for function in (jump_relu, step):
        threshold = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        function(x, threshold, 0.1).mean().backward()
        at = [float(function(x, torch.tensor(t), 0.1).mean()) for t in (0.75, 0.85)]
        assert threshold.grad is not None
        np.testing.assert_allclose(float(threshold.grad), (at[1] - at[0]) / 0.1, rtol=0.02)


def test_rectangle_passes_gradients_inside_only() -> None:
    x = torch.tensor([-0.5, -0.4, 0.0, 0.49, 0.5, 2.0], requires_grad=True)
    rectangle(x).backward(torch.full((6,), 3.0))
    assert rectangle(x).tolist() == [0, 1, 1, 1, 0, 0]
    assert x.grad is not None
    assert x.grad.tolist() == [0, 3, 3, 3, 0, 0]


def test_the_sparse_halves_equal_dense_autograd() -> None:
    """Values and all gradients, with a latent that fires for nobody, one for many, images without any, in any order."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    v, target = random(6, 5), random(6, 5)
    weights = [random(5), random(5, 9), random(9), random(9, 5)]
    rows = torch.tensor([0, 0, 0, 1, 3, 3, 5, 5])
    cols = torch.tensor([8, 2, 0, 2, 2, 7, 1, 2])
    found = []
    for sparse in (True, False):
        b, encoder, c, atoms = (weight.clone().requires_grad_() for weight in weights)
        if sparse:
            with torch.no_grad():
                p = (v - b) @ encoder + c
            values = picked(v, b, encoder, c, p, rows, cols)
            decoded = decode_entries(values.relu(), cols, atoms, rows, 6)
        else:
            p = (v - b) @ encoder + c
            mask = torch.zeros(6, 9, dtype=torch.float64)
            mask[rows, cols] = 1
            decoded = (p.relu() * mask) @ atoms
        (decoded - target).square().sum().backward()
        found.append([decoded.detach(), *(parameter.grad for parameter in (b, encoder, c, atoms))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
