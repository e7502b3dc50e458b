"""Every figure against a second, plain derivation in NumPy, or against a truth that was planted."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from saecore.evaluation import quality
from saecore.sae.model import SAE, SAEConfig
from tests.helpers.towers import random_sae

WIDTH, LATENTS = 24, 96


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sae_of(architecture: str, k: int = 8, output: str = "relu", threshold: float = 0.3) -> SAE:
    """`random_sae`'s tensors under another rule."""
    config = SAEConfig(n_inputs=WIDTH, n_latents=LATENTS, k=k, architecture=architecture, output=output)
    sae = SAE(config).requires_grad_(False)
    tensors = random_sae().state_dict()
    if sae.threshold is not None:
        tensors["threshold"] = torch.full_like(sae.threshold, threshold)
    sae.load_state_dict(tensors)
    return sae


def identity() -> SAE:
    """An SAE that loses nothing: a latent for either direction of every axis."""
    sae = SAE(SAEConfig(n_inputs=WIDTH, n_latents=2 * WIDTH, k=WIDTH)).requires_grad_(False)
    both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    sae.encoder.copy_(both.T)
    sae.decoder.copy_(both)  # type: ignore[union-attr]
    return sae


def code_of(sae: SAE, x: Tensor, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dense pre-activations, dense latents of which the k strongest are kept, and their reconstruction, in float64."""
    w = {name: tensor.double().numpy() for name, tensor in sae.state_dict().items()}
    p = ((x.double().numpy() - w["mean"]) * w["scale"] - w["pre_bias"]) @ w["encoder"] + w["latent_bias"]
    kept = np.argsort(np.argsort(-p, axis=1), axis=1) < k
    dense = np.where(kept, np.maximum(p, 0), 0)
    return p, dense, (dense @ w["decoder"] + w["pre_bias"]) / w["scale"] + w["mean"]


# ---- Reconstruction.


def test_the_figures_of_a_plain_derivation() -> None:
    """1,500 rows: more than one batch; a mean far from 0, which fvu must not count as variance."""
    sae, x = random_sae(), normal(1500, WIDTH) + 2
    found = quality.quality(sae, x)
    _, dense, again = code_of(sae, x, 8)
    rows = x.double().numpy()
    left = rows - again
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(again, axis=1)
    expected = {
        "fvu": (left**2).sum() / ((rows - rows.mean(0)) ** 2).sum(),
        "fvu_msae": (left.var(1) / rows.var(1)).mean(),
        "nmae": (np.abs(left).sum(1) / np.abs(rows).sum(1)).mean(),
        "cosine": ((rows * again).sum(1) / norms).mean(),
        "l0": (dense > 0).sum(1).mean(),
        "dead": (dense == 0).all(0).mean(),
    }
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found.images == 1500


def test_an_offset_of_a_whole_image_is_seen_by_fvu_alone() -> None:
    """x' = x + 1 from a pre-bias: no variance over an image's entries is lost, though every entry is wrong."""
    sae, x = identity(), normal(50, WIDTH)
    assert quality.quality(sae, x).fvu == pytest.approx(0, abs=1e-10)
    sae.latent_bias.copy_(sae.encoder.sum(0))  # (v - b) E + c = v E, but b is added on the way out
    sae.pre_bias.fill_(1.0)
    found = quality.quality(sae, x)
    assert found.fvu_msae == pytest.approx(0, abs=1e-9)
    assert found.fvu == pytest.approx(x.numel() / float((x - x.mean(0)).square().sum()), rel=1e-4)
    assert found.nmae == pytest.approx(float((WIDTH / x.abs().sum(1)).mean()), rel=1e-4)


def test_dead_latents_are_counted_and_few_images_have_no_cknna() -> None:
    sae = random_sae()
    sae.latent_bias[:24] = -1e6
    sae.latent_bias[24:] += 5
    sae.config = SAEConfig(n_inputs=WIDTH, n_latents=LATENTS, k=72)
    found = quality.quality(sae, normal(13, WIDTH))
    assert found.dead == pytest.approx(0.25, abs=0.02)
    assert math.isnan(found.cknna)


def test_cknna_sees_images_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows may lie in the order of their classes; the first ones alone would be of one class."""
    monkeypatch.setattr(quality, "CKNNA_ROWS", 20)
    monkeypatch.setattr(quality, "cknna", lambda u, latents: float(len(u)) if len(u) == len(latents) else math.nan)
    x = normal(59, WIDTH)
    assert quality.quality(random_sae(), x).cknna == 20


# ---- Neighbours and atoms.


def cknna_by_loops(x: np.ndarray, y: np.ndarray, neighbours: int) -> float:
    """Huh et al. 2024, with Song et al. 2012's unbiased HSIC as the sums over pairs and triples that it abbreviates."""
    m = len(x)
    kernels = [rows @ rows.T for rows in (x, y)]
    nearest = []
    for kernel in kernels:
        others = [sorted((j for j in range(m) if j != i), key=lambda j: -kernel[i, j])[:neighbours] for i in range(m)]
        nearest.append([set(found) for found in others])

    def hsic(one: np.ndarray, other: np.ndarray) -> float:
        traced = means_one = means_other = crossed = 0.0
        for i in range(m):
            for j in range(m):
                if i != j:
                    traced += one[i, j] * other[j, i]
                    means_one += one[i, j]
                    means_other += other[i, j]
                    crossed += sum(one[i, j] * other[j, q] for q in range(m) if q != j)
        whole = traced + means_one * means_other / ((m - 1) * (m - 2)) - 2 * crossed / (m - 2)
        return whole / (m * (m - 3))

    def masked(kernel: np.ndarray, holds: Callable[[int, int], bool]) -> np.ndarray:
        return np.array([[kernel[i, j] if holds(i, j) else 0.0 for j in range(m)] for i in range(m)])

    both = [masked(kernel, lambda i, j: j in nearest[0][i] and j in nearest[1][i]) for kernel in kernels]
    one = masked(kernels[0], lambda i, j: j in nearest[0][i])
    other = masked(kernels[1], lambda i, j: j in nearest[1][i])
    return hsic(both[0], both[1]) / (math.sqrt(hsic(one, one) * hsic(other, other)) + 1e-6)


def test_cknna_equals_its_definition_in_loops() -> None:
    x = normal(40, 5)
    y = x @ normal(5, 6, seed=1) + normal(40, 6, seed=2)
    expected = cknna_by_loops(x.double().numpy(), y.double().numpy(), 10)
    assert quality.cknna(x, y) == pytest.approx(expected, rel=1e-9)
    assert 0.1 < expected < 0.9


def test_cknna_is_one_for_the_same_and_about_zero_for_unrelated_rows() -> None:
    x = normal(300, 20)
    assert quality.cknna(x, x) == pytest.approx(1, abs=1e-6)
    rotation = torch.linalg.qr(normal(20, 20, seed=1))[0]
    assert quality.cknna(x, 3 * x @ rotation) == pytest.approx(1, abs=1e-3)
    assert abs(quality.cknna(x, normal(300, 20, seed=2))) < 0.1


def test_orthogonality_is_the_double_sum() -> None:
    atoms = normal(12, 5)
    rows = (atoms / atoms.norm(dim=1, keepdim=True)).double().numpy()
    expected = sum(float(rows[i] @ rows[j]) ** 2 for i in range(12) for j in range(12) if i != j) / 144
    assert quality.orthogonality(atoms) == pytest.approx(expected, rel=1e-6)
    assert quality.orthogonality(3 * torch.eye(6)) == pytest.approx(0, abs=1e-12)


def test_alignment_with_a_permuted_copy_is_one() -> None:
    one, other, order = random_sae(), random_sae(), torch.randperm(LATENTS, generator=torch.Generator().manual_seed(0))
    other.encoder.copy_(one.encoder[:, order] * 2)
    other.decoder.copy_(one.decoder[order])  # type: ignore[union-attr, index]
    assert quality.alignment(one, other) == pytest.approx({"atoms": 1, "encoders": 1, "same": 1}, abs=1e-6)
    assert quality.alignment(one, random_sae(seed=3))["same"] == 0
    with pytest.raises(ValueError, match="widths 24 and 20 cannot be compared"):
        quality.alignment(one, random_sae(n_inputs=20))


# ---- Recovery.


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_recovery_zeroes_all_but_the_k_strongest(architecture: str) -> None:
    """Where a k rules it may be exceeded; 1,000 is as many as there are."""
    sae, x = sae_of(architecture), normal(1100, WIDTH)
    rows = x.double().numpy()
    found = quality.recovery(sae, x, [1000, 4, 30])
    assert [row["k"] for row in found] == [4, 30, LATENTS]
    for row in found:
        again = code_of(sae, x, int(row["k"]))[2]
        assert row["fvu"] == pytest.approx(((rows - again) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum(), rel=1e-5)
        cosines = (rows * again).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(again, axis=1)
        assert row["cosine"] == pytest.approx(cosines.mean(), rel=1e-5)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu"])
def test_recovery_ends_at_what_fires_where_no_k_rules(architecture: str) -> None:
    sae, x = sae_of(architecture, threshold=1.0), normal(200, WIDTH)
    last = quality.recovery(sae, x, [3, LATENTS])[-1]
    found = quality.quality(sae, x)
    assert (last["fvu"], last["cosine"]) == pytest.approx((found.fvu, found.cosine), rel=1e-5)


# ---- Classifiers.


def test_agreement_is_kl_same_answer_and_accuracy() -> None:
    before, after = (3 * normal(50, 4, seed=seed) for seed in (0, 1))
    labels = before.argmax(1).clone()
    labels[:10] = (labels[:10] + 1) % 4
    p, q = (np.exp(z.double().numpy()) / np.exp(z.double().numpy()).sum(1, keepdims=True) for z in (before, after))
    found = quality.agreement(before, after, labels)
    assert found["kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    assert found["same"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["accuracy_reconstructed"] == pytest.approx((q.argmax(1) == labels.numpy()).mean())
    assert quality.agreement(before, after).keys() == {"kl", "same"}


def classes(n: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings round three centres, labels, centres."""
    labels = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(1))
    centres = 3 * normal(3, WIDTH, seed=2)
    return centres[labels] + normal(n, WIDTH, seed=3), labels, centres


def test_zero_shot_is_clips_classifier_on_both() -> None:
    x, labels, texts = classes()
    sae = random_sae()
    found = quality.zero_shot(sae, x, texts, labels)
    t = texts / texts.norm(dim=1, keepdim=True)
    logits = [100 * (rows / rows.norm(dim=1, keepdim=True)) @ t.T for rows in (x, sae.reconstruct(x))]
    assert found == pytest.approx(quality.agreement(logits[0], logits[1], labels), rel=1e-3)
    assert found["accuracy"] > 0.97
    kept = quality.zero_shot(identity(), x, 5 * texts, labels)
    assert kept == pytest.approx({**kept, "kl": 0, "same": 1, "accuracy_reconstructed": kept["accuracy"]}, abs=1e-3)


def test_a_linear_probe_learns_separable_classes_and_a_good_sae_keeps_them() -> None:
    x, labels, _ = classes()
    good = quality.linear_probe(identity(), x, labels)
    assert good["accuracy"] > 0.97
    assert (good["same"], good["accuracy_reconstructed"]) == (1, good["accuracy"])
    assert good["kl"] == pytest.approx(0, abs=1e-5)
    bad = quality.linear_probe(random_sae(), x, labels)
    assert bad["accuracy"] > 0.97
    assert bad["same"] < good["same"]
    assert quality.linear_probe(identity(), x, labels.flip(0))["accuracy"] < 0.6
