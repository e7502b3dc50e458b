"""The SAE against an example worked by hand, plain NumPy derivations, autograd, and its own files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saecore.sae.checkpoints import load_folder
from saecore.sae.model import LAYER_NORM_EPS, SAE, SAEConfig
from tests.helpers.towers import random_sae

VARIANTS: list[dict[str, Any]] = [
    {"architecture": "topk", "k": 6},
    {"architecture": "topk", "k": 6, "output": "signed", "by_magnitude": True},
    {"architecture": "topk", "k": 6, "output": "absolute", "by_magnitude": True, "soft_cap": 0.7},
    {"architecture": "relu"},
    {"architecture": "relu", "normalise": "layer_norm", "tied": True},
    {"architecture": "batchtopk", "k": 5},
    {"architecture": "batchtopk", "k": 5, "by_magnitude": True, "normalise": "constant_norm"},
    {"architecture": "jumprelu", "soft_cap": 1.5},
    {"architecture": "jumprelu", "normalise": "layer_norm"},
    {"architecture": "topk", "k": 6, "site": "embedding:l2"},
    {"architecture": "topk", "k": 6, "site": "embedding:l2", "normalise": "layer_norm"},
    {"architecture": "jumprelu", "site": "embedding:l2", "normalise": "constant_norm", "soft_cap": 1.5},
]


def variant(choices: dict[str, Any], seed: int = 1) -> SAE:
    """An SAE of that variant whose mean, scale, biases and thresholds all matter."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(SAEConfig(n_inputs=12, n_latents=40, **choices)).requires_grad_(False).eval()
    for tensor in sae.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    sae.scale.fill_(1.7)
    if sae.threshold is not None:
        sae.threshold.abs_().add_(0.2)
    return sae


def embeddings(rows: int = 9) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, 12)).astype(np.float32)


def derived(sae: SAE, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pre-activations, dense activations and reconstruction, image by image, as the head of sae/model.py has them."""
    c = sae.config
    w = {name: tensor.numpy().astype(np.float64) for name, tensor in sae.state_dict().items()}
    atoms = w["encoder"].T if c.tied else w["decoder"]
    pre, dense, out = [], [], []
    for row in x.astype(np.float64):
        length = np.sqrt((row**2).sum()) if c.site == "embedding:l2" else 1.0
        u = (row / length - w["mean"]) * w["scale"]
        shift, spread = 0.0, 1.0
        v = u
        if c.normalise == "layer_norm":
            shift = u.sum() / 12
            spread = np.sqrt(((u - shift) ** 2).sum() / 11)
            v = (u - shift) / (spread + LAYER_NORM_EPS)
        elif c.normalise == "constant_norm":
            spread = np.sqrt((u**2).sum() / 12)
            v = u / spread
        p = (v - w["pre_bias"]) @ w["encoder"] + w["latent_bias"]
        strength = np.abs(p) if c.by_magnitude else p
        if c.architecture == "topk":
            fires = np.isin(np.arange(40), np.argsort(-strength)[: c.k])
        else:
            fires = strength > w.get("threshold", 0.0)
        value = {"relu": np.maximum(p, 0), "signed": p, "absolute": np.abs(p)}[c.output]
        if c.soft_cap:
            value = c.soft_cap * np.tanh(value / c.soft_cap)
        a = np.where(fires, value, 0.0)
        pre.append(p)
        dense.append(a)
        out.append((((a @ atoms + w["pre_bias"]) * spread + shift) / w["scale"] + w["mean"]) * length)
    return np.stack(pre), np.stack(dense), np.stack(out)


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


@pytest.mark.parametrize("choices", VARIANTS, ids=str)
def test_every_variant_equals_a_derivation_in_numpy(choices: dict[str, Any]) -> None:
    sae, x = variant(choices), embeddings()
    pre, dense, reconstruction = derived(sae, x)
    assert 0 < (dense != 0).sum() < dense.size
    code = sae.encode_sparse(torch.from_numpy(x))
    np.testing.assert_allclose(sae.pre_activations(torch.from_numpy(x)), pre, atol=2e-5)
    np.testing.assert_allclose(code.dense(40), dense, atol=2e-5)
    np.testing.assert_allclose(sae.reconstruct(torch.from_numpy(x)), reconstruction, atol=5e-5)


@pytest.mark.parametrize("choices", VARIANTS, ids=str)
def test_the_code_lists_what_fires_first_whatever_is_beside_it(choices: dict[str, Any]) -> None:
    sae, x = variant(choices), torch.from_numpy(embeddings(30))
    together = sae.encode_sparse(x, at_least=12)
    for row in range(30):
        alone = sae.encode_sparse(x[row : row + 1], at_least=12)
        width = alone.latents.shape[1]
        torch.testing.assert_close(alone.activations[0], together.activations[row, :width], rtol=1e-5, atol=1e-5)
        assert (alone.latents[0] == together.latents[row, :width]).all()
        assert (together.activations[row, width:] == 0).all()
        fires = alone.activations[0] != 0
        assert not fires[int(fires.sum()) :].any()
        strength = alone.pre_activations[0].abs() if sae.config.by_magnitude else alone.pre_activations[0]
        for part in (strength[fires], strength[~fires]):
            assert (part.diff() <= 0).all()


@pytest.mark.parametrize("choices", VARIANTS, ids=str)
def test_read_outs_add_up_and_are_the_gradient(choices: dict[str, Any]) -> None:
    """Both kinds give the pre-activation; the exact one is autograd's gradient, the frozen one too without a normaliser."""
    sae, x = variant(choices), torch.from_numpy(embeddings(5)).requires_grad_()
    latents = torch.tensor([[0, 7, 39]] * 5)
    p = sae.pre_activations(x).gather(1, latents)
    gradient = torch.stack([torch.autograd.grad(p[:, i].sum(), x, retain_graph=True)[0] for i in range(3)], dim=1)
    for exact in (False, True):
        w, c = sae.read_outs(latents, x.detach(), exact=exact)
        torch.testing.assert_close((w * x[:, None]).sum(-1) + c, p, rtol=1e-4, atol=1e-4)
        if exact or not sae.normalises:
            torch.testing.assert_close(w, gradient, rtol=1e-4, atol=1e-5)
    if sae.normalises:
        assert not torch.allclose(sae.read_outs(latents, x.detach())[0], gradient, rtol=1e-3)
        with pytest.raises(ValueError, match="read-outs need the embeddings"):
            sae.read_outs(latents)
        with pytest.raises(ValueError, match="decode needs the embeddings"):
            sae.decode_sparse(latents, torch.zeros(5, 3))


def test_a_latent_that_is_not_positive_does_not_fire() -> None:
    sae = random_sae(k=8)
    sae.latent_bias.fill_(-100.0)
    code = sae.encode_sparse(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)))
    assert (code.pre_activations < 0).all()
    assert (code.activations == 0).all()


def test_a_batchtopk_sae_without_a_threshold_says_so() -> None:
    sae = variant({"architecture": "batchtopk", "k": 5})
    assert sae.threshold is not None
    sae.threshold.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"no threshold.*jobs.measure"):
        sae.encode_sparse(torch.from_numpy(embeddings()))


@pytest.mark.parametrize("choices", VARIANTS, ids=str)
def test_saved_and_loaded_is_the_same(choices: dict[str, Any], tmp_path: Path) -> None:
    sae = variant(choices)
    sae.save(tmp_path)
    again = load_folder(tmp_path)
    assert again.config == sae.config
    assert again.sha256() == sae.sha256()
    assert all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), again.state_dict().values(), strict=True))
    again.latent_bias[0] += 1
    assert again.sha256() != sae.sha256()


def test_a_card_is_written_and_the_hub_mixin_reads_the_folder(tmp_path: Path) -> None:
    sae = variant({"k": 6, "nesting": "levels", "nested": (6, 12), "source": "a test"})
    sae.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "40 latents on embeddings of width 12" in card
    assert "nested levels (6, 12)" in card
    assert "license: mit" in card
    assert SAE.from_pretrained(tmp_path).sha256() == sae.sha256()


def test_it_is_pushed_with_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches huggingface_hub: our two files and the card. The upload itself is the hub's."""
    pushed: dict[str, Any] = {}

    class Api:
        def __init__(self, **options: Any) -> None:
            pass

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, folder_path: Path, **options: Any) -> str:
            pushed.update({path.name: path.stat().st_size for path in Path(folder_path).iterdir()})
            return "https://huggingface.co/me/sae/commit/1"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    random_sae().push_to_hub("me/sae")
    assert pushed.keys() == {"sae.safetensors", "config.json", "README.md"}


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
