"""Every figure against a second derivation in NumPy, or a truth that was planted."""

import numpy as np
import pytest
import torch

from saecore import quality
from saecore.sae import SAE, SAEConfig
from tests.towers import random_sae


def embeddings(rows: int = 120, width: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.3


def identity(width: int = 6) -> SAE:
    """2d latents that reconstruct anything: one for each direction and its opposite."""
    sae = SAE(SAEConfig(n_inputs=width, n_latents=2 * width, architecture="relu")).requires_grad_(False)
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    assert sae.decoder is not None
    sae.encoder.copy_(both.T)
    sae.decoder.copy_(both)
    return sae


def test_figures_equal_numpy() -> None:
    sae, x = random_sae(k=5), embeddings()
    found = quality.quality(sae, x)
    a, b = x.double().numpy(), sae.reconstruct(x).double().numpy()
    code = sae.encode(x)[0].numpy()
    error = a - b
    assert found.fvu == pytest.approx((error**2).sum() / ((a - a.mean(0)) ** 2).sum(), rel=1e-5)
    assert found.fvu_msae == pytest.approx((error.var(axis=1) / a.var(axis=1)).mean(), rel=1e-5)
    assert found.nmae == pytest.approx((np.abs(error).sum(1) / np.abs(a).sum(1)).mean(), rel=1e-5)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert found.cosine == pytest.approx(cosine.mean(), rel=1e-5)
    assert found.l0 == pytest.approx((code != 0).sum(1).mean())
    assert found.dead == pytest.approx((code == 0).all(0).mean())
    assert found.images == 120


def test_msaes_fvu_does_not_see_an_offset_of_a_whole_image() -> None:
    """Its variance is over the features of one image: 0 for a reconstruction that is off by 1 everywhere."""
    sae = identity()
    sae.pre_bias.fill_(0.0)
    sae.latent_bias.fill_(0.0)
    x = embeddings(width=6)
    assert quality.quality(sae, x).fvu == pytest.approx(0, abs=1e-10)
    assert sae.decoder is not None
    shifted = SAE(SAEConfig(n_inputs=6, n_latents=13, architecture="relu")).requires_grad_(False)
    assert shifted.decoder is not None
    shifted.encoder[:, :12], shifted.decoder[:12] = sae.encoder, sae.decoder
    shifted.latent_bias[12], shifted.decoder[12] = 1.0, 1.0  # adds 1 to every feature of every image
    found = quality.quality(shifted, x)
    assert found.fvu_msae == pytest.approx(0, abs=1e-10)
    assert found.fvu > 1


def literal_cknna(x: np.ndarray, y: np.ndarray, neighbours: int) -> float:
    """Pair by pair."""
    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    near = []
    for kernel in (k, l):
        mask = np.zeros((n, n))
        for i in range(n):
            others = [j for j in range(n) if j != i]
            mask[i, sorted(others, key=lambda j: -kernel[i, j])[:neighbours]] = 1
        near.append(mask)

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - np.diag(np.diag(a)), b - np.diag(np.diag(b))
        one = np.ones(n)
        first = np.trace(a @ b)
        second = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
        third = 2 / (n - 2) * (one @ a @ b @ one)
        return (first + second - third) / (n * (n - 3))

    both = near[0] * near[1]
    own = hsic(near[0] * k, near[0] * k) * hsic(near[1] * l, near[1] * l)
    return hsic(both * k, both * l) / (np.sqrt(own) + 1e-6)


def test_cknna() -> None:
    x, y = embeddings(40, 8), embeddings(40, 5, seed=1)
    assert quality.cknna(x, x) == pytest.approx(1, abs=1e-4)
    assert quality.cknna(x, x @ torch.linalg.qr(torch.randn(8, 8)).Q) == pytest.approx(1, abs=1e-3)
    unrelated = embeddings(600, 8) - 0.3, embeddings(600, 8, seed=1) - 0.3
    assert abs(quality.cknna(unrelated[0], unrelated[1])) < 0.05
    for one, other in ((x, y), (x, x[:, :4])):
        literal = literal_cknna(one.double().numpy(), other.double().numpy(), 10)
        assert quality.cknna(one, other) == pytest.approx(literal, rel=1e-6)


def test_orthogonality_is_the_double_sum() -> None:
    atoms = embeddings(9, 6)
    rows = (atoms / atoms.norm(dim=1, keepdim=True)).double().numpy()
    cosines = rows @ rows.T
    assert quality.orthogonality(atoms) == pytest.approx(
        sum(cosines[i, j] ** 2 for i in range(9) for j in range(9) if i != j) / 81
    )
    assert quality.orthogonality(torch.eye(5)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_recovery_is_what_the_strongest_latents_make(architecture: str) -> None:
    sae, x = random_sae(k=5), embeddings()
    if architecture == "relu":
        relu = SAE(SAEConfig(n_inputs=24, n_latents=96, architecture="relu")).requires_grad_(False)
        relu.load_state_dict(sae.state_dict())
        sae = relu
    spread = (x - x.mean(0)).double().square().sum()
    for row in quality.recovery(sae, x, [1, 5, 20]):
        full = sae.encode(x, topk=int(row["k"]))[1]
        error = (x - sae.decode(full)).double().square().sum()
        assert row["fvu"] == pytest.approx(float(error / spread), rel=1e-4)


def test_an_sae_agrees_with_its_shuffled_self_and_not_with_another() -> None:
    sae, order = random_sae(), torch.randperm(96, generator=torch.Generator().manual_seed(3))
    shuffled = random_sae()
    shuffled.encoder.copy_(sae.encoder[:, order])
    assert sae.decoder is not None
    assert shuffled.decoder is not None
    shuffled.decoder.copy_(sae.decoder[order])
    assert quality.alignment(sae, shuffled) == pytest.approx({"atoms": 1, "encoders": 1, "same": 1}, abs=1e-5)
    assert quality.alignment(sae, random_sae(seed=5))["atoms"] < 0.7


def test_agreement_of_logits() -> None:
    one, other = embeddings(50, 4), embeddings(50, 4, seed=2)
    labels = torch.arange(50) % 4
    found = quality.agreement(one, other, labels)
    p, q = (np.exp(rows.double().numpy()) for rows in (one, other))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert found["kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    assert found["same"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    assert found["accuracy"] == pytest.approx((p.argmax(1) == labels.numpy()).mean())


def test_classifiers_see_the_same_in_a_perfect_reconstruction_and_nothing_in_none() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(6)[:3] * 4
    labels = torch.arange(300) % 3
    x = centres[labels] + torch.randn(300, 6, generator=generator) * 0.4
    for found in (quality.zero_shot(identity(), x, centres, labels), quality.linear_probe(identity(), x, labels)):
        assert found["accuracy"] > 0.98
        assert found["accuracy_reconstructed"] == pytest.approx(found["accuracy"])
        assert found["kl"] == pytest.approx(0, abs=1e-5)
    blind = identity()
    blind.encoder.zero_()
    assert quality.linear_probe(blind, x, labels)["accuracy_reconstructed"] < 0.5


def test_a_calibrated_threshold_lets_k_fire_on_average() -> None:
    x = embeddings(4000, 24)
    sae = SAE(SAEConfig(n_inputs=24, n_latents=96, k=7, architecture="batchtopk")).requires_grad_(False)
    sae.load_state_dict({**random_sae().state_dict(), "threshold": torch.tensor(torch.nan)})
    quality.calibrate(sae, x[:3000], 7)
    assert quality.quality(sae, x[3000:]).l0 == pytest.approx(7, rel=0.05)
    with pytest.raises(ValueError, match="topk SAE has no threshold"):
        quality.calibrate(random_sae(), x, 7)
