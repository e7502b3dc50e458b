"""The SAE against an example worked by hand, a plain NumPy derivation, and its own files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saecore.sae import SAE, SAEConfig, load_folder
from tests.towers import random_sae


def test_an_example_worked_by_hand() -> None:
    """u = 2(x - m) = (2, 4); p = (u - b) E + c = (1, 4) E + c = (1, 4, 4, -5) + (0, 0, 1, 0); top 2 of it: latents 2 and 1."""
    sae = SAE(SAEConfig(n_inputs=2, n_latents=4, k=2)).requires_grad_(False)
    sae.mean.copy_(torch.tensor([1.0, 0.0]))
    sae.scale.fill_(2.0)
    sae.pre_bias.copy_(torch.tensor([1.0, 0.0]))
    sae.encoder.copy_(torch.tensor([[1.0, 0.0, 0.0, -1.0], [0.0, 1.0, 1.0, -1.0]]))
    sae.latent_bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert sae.decoder is not None
    sae.decoder.copy_(torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]))
    x = torch.tensor([[2.0, 2.0]])
    code = sae.encode_sparse(x)
    assert code.latents.tolist() == [[2, 1]]
    assert code.activations.tolist() == [[5.0, 4.0]]
    # decoded: (4, 5) + b = (5, 5), / 2 + m = (3.5, 2.5)
    assert sae.reconstruct(x).tolist() == [[3.5, 2.5]]


def test_equals_a_derivation_in_numpy() -> None:
    sae = random_sae(n_inputs=12, n_latents=40, k=6)
    weights = {name: tensor.numpy().astype(np.float64) for name, tensor in sae.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(9, 12))
    pre = ((x - weights["mean"]) * weights["scale"] - weights["pre_bias"]) @ weights["encoder"] + weights["latent_bias"]
    dense = np.zeros_like(pre)
    for row, values in enumerate(pre):
        strongest = np.argsort(values)[::-1][:6]
        dense[row, strongest] = np.maximum(values[strongest], 0)
    reconstruction = (dense @ weights["decoder"] + weights["pre_bias"]) / weights["scale"] + weights["mean"]
    code = sae.encode_sparse(torch.from_numpy(x))
    np.testing.assert_allclose(torch.zeros(9, 40).scatter(1, code.latents, code.activations), dense, atol=1e-5)
    np.testing.assert_allclose(sae.reconstruct(torch.from_numpy(x)), reconstruction, atol=1e-5)


def test_a_latent_that_is_not_positive_does_not_fire() -> None:
    sae = random_sae(k=8)
    sae.latent_bias.fill_(-100.0)
    code = sae.encode_sparse(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)))
    assert (code.pre_activations < 0).all()
    assert (code.activations == 0).all()


def test_read_outs_are_the_gradient_and_the_offset() -> None:
    sae = random_sae()
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    w, c = sae.read_outs(torch.arange(96))
    torch.testing.assert_close(x @ w.T + c, sae.pre_activations(x), rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    sae = random_sae()
    sae.save(tmp_path)
    again = load_folder(tmp_path)
    assert again.config == sae.config
    assert again.sha256() == sae.sha256()
    assert all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), again.state_dict().values(), strict=True))
    again.latent_bias[0] += 1
    assert again.sha256() != sae.sha256()


def test_what_a_folder_can_get_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no SAE in"):
        load_folder(tmp_path)
    random_sae(n_latents=96).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_latents": 95}))
    with pytest.raises(ValueError, match=r"decoder.*expected shape \(95, 24\), found \(96, 24\)"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "gated"}))
    with pytest.raises(ValueError, match="'gated' is not supported"):
        load_folder(tmp_path)
    with pytest.raises(ValueError, match="cannot let k = 9"):
        SAEConfig(n_inputs=4, n_latents=8, k=9)
