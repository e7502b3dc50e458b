"""MSAE's interface over our SAE, against MSAE's rule in NumPy, written down once more from what its code does."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from saecore.sae.checkpoints import load_sae
from saecore.sae.msae import MSAE
from tests.sae.test_checkpoints import DATA, embeddings, write_msae
from tests.sae.test_sae import derived, variant
from tests.sae.test_sae import embeddings as own_embeddings

RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "TopK": lambda p: p,
    "TopKReLU": lambda p: np.maximum(p, 0),
    "TopKabs": np.abs,
    "TopKabsReLU": lambda p: np.maximum(np.abs(p), 0),
    "BatchTopK": lambda p: p,
    "BatchTopKReLU": lambda p: np.maximum(p, 0),
    "BatchTopKabs": np.abs,
    "BatchTopKabsReLU": lambda p: np.maximum(np.abs(p), 0),
}
"""Full latents of p, by the name of the activation: |.| where it says abs, then max(., 0) where it says ReLU, and no k."""


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
@pytest.mark.parametrize("activation", RULES)
def test_full_latents_are_those_of_msae(tmp_path: Path, activation: str, soft_cap: float) -> None:
    path = tmp_path / f"96_24_{activation}_8_False_False_{soft_cap}_{DATA}"
    content = write_msae(path)
    w = {name: tensor.double().numpy() for name, tensor in content["model"].items()}
    u = (embeddings().double().numpy() - content["mean_center"].double().numpy()) * content["scaling_factor"]
    p = (u - w["pre_bias"]) @ w["encoder"] + w["latent_bias"]
    assert (p < 0).mean() > 0.1  # where max(p, 0), p and |p| differ
    expected = RULES[activation](p)
    if soft_cap:
        expected = soft_cap * np.tanh(expected / soft_cap)
    sae = load_sae(str(path))
    if sae.threshold is not None:
        sae.threshold.fill_(0.5)
    latents, full = MSAE(sae).encode(embeddings())
    np.testing.assert_allclose(full, expected, rtol=1e-5, atol=1e-5)
    cut_latents, cut = MSAE(sae).encode(embeddings(), topk=3)
    assert torch.equal(cut_latents, latents)
    largest = np.sort(expected, axis=1)[:, -3:]
    np.testing.assert_allclose(np.sort(cut.numpy(), axis=1)[:, -3:], largest, rtol=1e-5, atol=1e-5)
    assert ((cut != 0).sum(1) <= 3).all()
    for all_of_them in (-1, 0, 96, 1000):
        assert torch.equal(MSAE(sae).encode(embeddings(), topk=all_of_them)[1], full)


@pytest.mark.parametrize("choices", [{"architecture": "relu"}, {"architecture": "jumprelu", "soft_cap": 1.5}], ids=str)
def test_where_no_k_rules_full_latents_are_those_that_fire(choices: dict[str, object]) -> None:
    sae, x = variant(choices), own_embeddings()
    latents, full = MSAE(sae).encode(torch.from_numpy(x))
    np.testing.assert_allclose(latents, derived(sae, x)[1], atol=2e-5)
    assert torch.equal(full, latents)


@pytest.mark.parametrize("site", ["embedding", "embedding:l2"])
def test_a_call_decodes_the_full_latents(site: str) -> None:
    sae, x = variant({"architecture": "topk", "k": 6, "site": site}), torch.from_numpy(own_embeddings())
    pre, dense, reconstruction = derived(sae, x.numpy())
    latents, full = MSAE(sae).encode(x)
    np.testing.assert_allclose(latents, dense, atol=2e-5)
    np.testing.assert_allclose(full, np.maximum(pre, 0), atol=2e-5)
    np.testing.assert_allclose(MSAE(sae).decode(latents, x), reconstruction, atol=5e-5)
    by_full, standardised, again = MSAE(sae)(x)
    assert torch.equal(again, full)
    torch.testing.assert_close(by_full, MSAE(sae).decode(full, x))
    torch.testing.assert_close(standardised, full @ sae.atoms + sae.pre_bias, rtol=1e-4, atol=1e-5)
    if site == "embedding:l2":
        with pytest.raises(ValueError, match="decode needs the embeddings"):
            MSAE(sae).decode(latents)
