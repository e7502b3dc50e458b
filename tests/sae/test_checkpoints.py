"""SAE addresses and MSAE files, on files made here in the published form, against MSAE's rule in plain NumPy."""

import json
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saecore.sae.checkpoints import load_sae
from tests.helpers.towers import random_sae

DATA = "cc3m_ViT-L~14_train_image_2905936_24.pth"
NAME = f"96_24_TopKReLU_8_RW_False_False_0.0_{DATA}"


def write_msae(path: Path) -> dict[str, Any]:
    """An MSAE checkpoint with the tensors of `random_sae`, and of the kind that its name says; returns its content."""
    sae = random_sae()
    model = OrderedDict(
        (name, tensor.clone()) for name, tensor in sae.state_dict().items() if name not in ("mean", "scale")
    )
    if re.search("_True_(True|False)_", path.name):  # tied
        del model["decoder"]
    if "JumpReLU" in path.name:
        model["activation.log_threshold"] = torch.linspace(-3, 0.5, 96)
        model["dead_activations.log_threshold"] = model["activation.log_threshold"].clone()
    model["latents_activation_frequency"] = torch.zeros(96, dtype=torch.int64)
    content = {
        "model": model,
        "mean_center": sae.mean.clone(),
        "scaling_factor": float(sae.scale),
        "target_norm": np.float64(24**0.5),  # a pickled NumPy scalar, as published files hold it
    }
    torch.save(content, path)
    return content


def embeddings() -> torch.Tensor:
    return torch.randn(7, 24, generator=torch.Generator().manual_seed(0))


def computed(
    content: dict[str, Any], activation: str, k: int = 8, normalize: bool = False, soft_cap: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Activations and reconstruction by MSAE's rule (reference, section 1.4), in float64."""
    model = {name: tensor.double().numpy() for name, tensor in content["model"].items()}
    mean, scale = content["mean_center"].double().numpy(), content["scaling_factor"]
    u = (embeddings().double().numpy() - mean) * scale
    m, r = u.mean(-1, keepdims=True), u.std(-1, ddof=1, keepdims=True)
    if normalize:
        u = (u - m) / (r + 1e-5)
    p = (u - model["pre_bias"]) @ model["encoder"] + model["latent_bias"]
    by = np.abs(p) if "abs" in activation else p
    if activation.startswith("Batch"):  # over the whole batch, keeping signs
        a = np.where(by >= np.sort(by, axis=None)[-k * len(p)], p, 0)
    elif activation.startswith("TopK"):
        a = np.where(by >= np.sort(by, axis=-1)[:, [-k]], by, 0)
    elif activation == "JumpReLU":
        a = np.where(p > np.exp(model["activation.log_threshold"]), p, 0)
    else:
        a = p
    a = np.maximum(a, 0) if activation.endswith("ReLU") else a
    z = soft_cap * np.tanh(a / soft_cap) if soft_cap else a
    decoded = z @ model.get("decoder", model["encoder"].T) + model["pre_bias"]
    return z, (decoded * r + m if normalize else decoded) / scale + mean


def check(path: Path, expected: tuple[np.ndarray, np.ndarray], threshold: float | None = None) -> None:
    sae = load_sae(str(path))
    if threshold is not None:
        assert sae.threshold is not None
        sae.threshold.fill_(threshold)
    found = sae.encode_sparse(embeddings()).dense(sae.config.n_latents).numpy()
    np.testing.assert_array_equal(np.count_nonzero(found, axis=-1), np.count_nonzero(expected[0], axis=-1))  # L0
    np.testing.assert_allclose(found, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.reconstruct(embeddings()).numpy(), expected[1], rtol=1e-5, atol=1e-5)


def test_an_msae_file_loads_and_computes_the_same(tmp_path: Path) -> None:
    write_msae(tmp_path / NAME)
    sae = load_sae(str(tmp_path / NAME))
    assert (sae.config.n_inputs, sae.config.n_latents, sae.config.k) == (24, 96, 8)
    assert (sae.config.nesting, sae.config.nested) == ("levels", (8,))
    expected = random_sae().reconstruct(embeddings())
    torch.testing.assert_close(sae.reconstruct(embeddings()), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("96_24_ReLU_003_False_False_0.0", {"activation": "ReLU"}),
        ("96_24_TopK_60_False_False_0.0", {"activation": "TopK", "k": 60}),
        ("96_24_TopKReLU_60_False_False_0.0", {"activation": "TopKReLU", "k": 60}),
        ("96_24_TopKabs_8_False_False_0.0", {"activation": "TopKabs"}),
        ("96_24_TopKabsReLU_8_False_False_0.0", {"activation": "TopKabsReLU"}),
        ("96_24_TopKReLU_8_UW_False_False_0.0", {"activation": "TopKReLU"}),
        ("96_24_TopKReLU_8_RW_False_False_0.0", {"activation": "TopKReLU"}),
        ("96_24_JumpReLU_003_False_False_0.0", {"activation": "JumpReLU"}),
        ("96_24_TopKReLU_8_True_False_0.0", {"activation": "TopKReLU"}),
        ("96_24_TopKReLU_8_False_True_0.0", {"activation": "TopKReLU", "normalize": True}),
        ("96_24_TopK_60_False_False_1.5", {"activation": "TopK", "k": 60, "soft_cap": 1.5}),
    ],
)
def test_every_msae_variant_computes_what_msae_computes(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    for path in (tmp_path / f"{name}_{DATA}", tmp_path / f"{name}_{DATA}".replace(".pth", ".pt")):
        content = write_msae(path)
        check(path, computed(content, **options))
    counts = np.count_nonzero(computed(content, **options)[0], axis=-1)
    if options["activation"] in ("TopK", "TopKabs", "TopKabsReLU"):
        assert (counts == options.get("k", 8)).all()


@pytest.mark.parametrize("activation", ["BatchTopK", "BatchTopKReLU", "BatchTopKabs", "BatchTopKabsReLU"])
def test_batchtopk_needs_a_threshold_and_then_computes_what_msae_computes(tmp_path: Path, activation: str) -> None:
    path = tmp_path / f"96_24_{activation}_8_False_False_0.0_{DATA}"
    content = write_msae(path)
    sae = load_sae(str(path))
    assert (sae.config.architecture, sae.config.k) == ("batchtopk", 8)
    with pytest.raises(ValueError, match="no threshold"):
        sae.reconstruct(embeddings())
    expected = computed(content, activation)
    p = sae.pre_activations(embeddings()).double()
    strongest = (p.abs() if "abs" in activation else p).flatten().topk(8 * 7 + 1).values
    check(path, expected, threshold=float(strongest[-2:].mean()))
    assert ((expected[0] < 0).any()) == (activation == "BatchTopKabs")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("renamed.pth", r"a renamed file needs renamed\.pth\.json"),
        (NAME.replace("_8_RW", "_RW"), "is not named like an MSAE checkpoint"),
        (NAME.replace("TopKReLU_8_RW", ""), "is not named like an MSAE checkpoint"),
        (NAME.replace("TopKReLU", "GroupMax"), "is not named like an MSAE checkpoint"),
        (NAME.replace("TopKReLU_8", "TopKReLU_97"), "96 latents cannot let k = 97"),
        (NAME.replace("96_24", "95_24"), r"expected shape \(95, 24\), found \(96, 24\)"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(tmp_path: Path, name: str, complaint: str) -> None:
    write_msae(tmp_path / name)
    with pytest.raises(ValueError, match=complaint):
        load_sae(str(tmp_path / name))


def test_tensors_that_do_not_fit_the_name_are_refused(tmp_path: Path) -> None:
    jumping = write_msae(tmp_path / f"96_24_JumpReLU_False_False_0.0_{DATA}")
    torch.save(jumping, tmp_path / NAME)
    with pytest.raises(ValueError, match=r"'threshold' .*: expected shape None, found \(96,\)"):
        load_sae(str(tmp_path / NAME))
    jumping["model"]["dead_activations.log_threshold"][5] += 1
    torch.save(jumping, tmp_path / NAME)
    with pytest.raises(ValueError, match="two equal copies of log_threshold"):
        load_sae(str(tmp_path / NAME))
    torch.save({"encoder": torch.zeros(1)}, tmp_path / NAME)
    with pytest.raises(ValueError, match="lacks mean_center, model, scaling_factor"):
        load_sae(str(tmp_path / NAME))


def test_a_specification_beside_a_file_overrides_its_name(tmp_path: Path) -> None:
    for name in ("renamed.pth", NAME):
        content = write_msae(tmp_path / name)
        spec = {"n_inputs": 24, "n_latents": 96, "k": 60, "output": "signed"}
        (tmp_path / f"{name}.json").write_text(json.dumps(spec))
        check(tmp_path / name, computed(content, "TopK", k=60))
        (tmp_path / f"{name}.json").write_text(json.dumps(spec | {"sparsity": 1}))
        with pytest.raises(ValueError, match=r"does not hold the fields of an SAEConfig: .*'sparsity'"):
            load_sae(str(tmp_path / name))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    with (tmp_path / NAME).open("wb") as file:
        pickle.dump({"model": Evil()}, file)
    with pytest.raises(ValueError, match="cannot be read as a plain checkpoint"):
        load_sae(str(tmp_path / NAME))
    torch.save({"model": Evil()}, tmp_path / NAME)
    with pytest.raises(ValueError, match="cannot be read as a plain checkpoint"):
        load_sae(str(tmp_path / NAME))
    assert not (tmp_path / "ran").exists()


def test_addresses_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for address, complaint in [
        (str(tmp_path / "none"), "no such file or folder"),
        (str(tmp_path), "expected config.json and sae.safetensors"),
        ("hf://WolodjaZ", "expected hf://OWNER/REPOSITORY"),
        ("hf://no-one/nothing", "hf://no-one/nothing"),
    ]:
        with pytest.raises(ValueError, match=complaint) as caught:
            load_sae(address)
        assert "\n" not in str(caught.value)


def test_an_sae_on_an_object_store(store: Path) -> None:
    """Our own folder as `SAE.save` writes it, and a single file with its specification: the same SAE as from a disk."""
    sae = random_sae()
    sae.save(store / "runs" / "sae")
    assert load_sae("s3://bucket/runs/sae").sha256() == sae.sha256()
    write_msae(store / NAME)
    assert load_sae(f"s3://bucket/{NAME}").sha256() == load_sae(str(store / NAME)).sha256()
    for missing in ("s3://bucket/runs", "s3://bucket/nothing", "s3://bucket/nothing.pth"):
        with pytest.raises(ValueError, match=rf"^{missing}: no (config.json|nothing.pth) there; "):
            load_sae(missing)


def test_a_hub_address_is_looked_up_with_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub's own cache layout is not ours to test: only that we ask it for the right thing."""
    random_sae().save(tmp_path / "b16")
    write_msae(tmp_path / NAME)
    asked: list[tuple[str, str | None, list[str]]] = []

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("saecore.hub.listing", lambda repository, revision: [])  # so that the Hub answers
    assert load_sae("hf://me/saes/b16@v2").config.n_latents == 96
    repository, revision, patterns = asked.pop()
    assert (repository, revision) == ("me/saes", "v2")
    assert {"b16/config.json", "b16/sae.safetensors", "b16/cfg.json", "b16/ae.pt", "b16/sae.pt"} < set(patterns)
    assert all(pattern.startswith("b16/") for pattern in patterns)
    assert load_sae(f"hf://me/saes/{NAME}").config.k == 8
    assert asked.pop() == ("me/saes", None, [NAME, f"{NAME}.json"])
    for address in ("hf://me/saes/b32", "hf://me/saes/b32/other.pth"):
        with pytest.raises(ValueError, match="with an SAE in me/saes"):
            load_sae(address)
    with pytest.raises(ValueError, match=r"no SAE in .* cfg\.json and sae_weights\.safetensors \(SAELens\)"):
        load_sae("hf://me/saes")
    assert "config.json" in asked.pop()[2]
    asked.clear()
    with pytest.raises(ValueError, match="does not say what its tensors are; give its folder"):
        load_sae("hf://me/saes/b16/sae.safetensors@v2")
    assert asked == []
