"""SAE addresses and MSAE files, on files made here in the published form."""

import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from saecore.checkpoints import load_sae
from tests.towers import random_sae

NAME = "96_24_TopKReLU_8_RW_False_False_0.0_cc3m_ViT-L~14_train_image_2905936_24.pth"


def write_msae(path: Path) -> torch.Tensor:
    """An MSAE checkpoint with the tensors of `random_sae`; returns what it makes of some embeddings."""
    sae = random_sae()
    model = OrderedDict(
        (name, tensor.clone()) for name, tensor in sae.state_dict().items() if name not in ("mean", "scale")
    )
    model["latents_activation_frequency"] = torch.zeros(96, dtype=torch.int64)
    content = {
        "model": model,
        "mean_center": sae.mean.clone(),
        "scaling_factor": float(sae.scale),
        "target_norm": np.float64(24**0.5),  # a pickled NumPy scalar, as published files hold it
    }
    torch.save(content, path)
    return sae.reconstruct(embeddings())


def embeddings() -> torch.Tensor:
    return torch.randn(7, 24, generator=torch.Generator().manual_seed(0))


def test_an_msae_file_loads_and_computes_the_same(tmp_path: Path) -> None:
    expected = write_msae(tmp_path / NAME)
    sae = load_sae(str(tmp_path / NAME))
    assert (sae.config.n_inputs, sae.config.n_latents, sae.config.k) == (24, 96, 8)
    torch.testing.assert_close(sae.reconstruct(embeddings()), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("renamed.pth", "its name is its configuration"),
        (NAME.replace("TopKReLU_8_RW", "ReLU_003"), "activation is ReLU"),
        (NAME.replace("96_24", "95_24"), r"expected shape \(95, 24\), found \(96, 24\)"),
        (NAME.replace("False_False", "False_True"), "normalize is True"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(tmp_path: Path, name: str, complaint: str) -> None:
    write_msae(tmp_path / name)
    with pytest.raises(ValueError, match=complaint):
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


def test_a_hub_address_is_looked_up_with_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub's own cache layout is not ours to test: only that we ask it for the right thing."""
    random_sae().save(tmp_path)
    asked = []

    def download(repository: str, name: str, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        return str(tmp_path / Path(name).name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_sae("hf://me/saes/b16@v2").config.n_latents == 96
    assert asked == [("me/saes", "b16/config.json", "v2"), ("me/saes", "b16/sae.safetensors", "v2")]
