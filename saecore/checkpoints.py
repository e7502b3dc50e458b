"""SAEs by address: the embedded one, our own folders, and MSAE files (Zaigrajew et al. 2025, arXiv:2502.20578).

    demo                                        the embedded SAE
    FOLDER                                      config.json and sae.safetensors, see `saecore.sae`
    FILE.pth                                    an MSAE checkpoint; its name is its configuration
    hf://OWNER/REPOSITORY[/PATH][@REVISION]     either of the last two on the Hugging Face Hub, cached by huggingface_hub

Nothing is unpickled freely: MSAE files are read with `weights_only=True` and an allow-list of NumPy scalars.

Left out for now: MSAE's ReLU, BatchTopK and JumpReLU variants, SAELens and other formats.
"""

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from saecore.sae import CONFIG_FILE, SAE, WEIGHTS_FILE, SAEConfig, from_tensors, load_folder

DEMO = Path(__file__).parent / "demo" / "sae"

# n_d_activation_k[_weighting]_tied_normalize_softcap_...: fields that the tensors do not hold. A Matryoshka file
# (weighting UW or RW) is at inference a TopK SAE whose k is the first nesting level.
_MSAE_NAME = re.compile(
    r"(?P<n>\d+)_(?P<d>\d+)_(?P<activation>[A-Za-z]+)(_(?P<k>\d+))?(_(?P<weighting>UW|RW))?"
    r"_(?P<tied>True|False)_(?P<normalize>True|False)_(?P<soft_cap>[0-9.]+)_.*"
)


def load_sae(address: str) -> SAE:
    """The SAE at `address` (forms above), in float32 on the CPU; ValueError in one sentence if it cannot be had."""
    if address == "demo":
        return load_folder(DEMO)
    path = _download(address) if address.startswith("hf://") else Path(address)
    if path.is_dir():
        return load_folder(path)
    if not path.is_file():
        raise ValueError(
            f"--sae {address}: no such file or folder; an SAE on the Hugging Face Hub is hf://OWNER/REPOSITORY"
        )
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"--sae {address}: expected a folder with {CONFIG_FILE}, or an MSAE .pth file")
    return read_msae(path)


def _download(address: str) -> Path:
    """A Hub address to the file, or the folder, in the local cache."""
    location, _, revision = address.removeprefix("hf://").partition("@")
    parts = location.strip("/").split("/")
    if len(parts) < 2:
        raise ValueError(f"--sae {address}: expected hf://OWNER/REPOSITORY, optionally followed by /PATH and @REVISION")
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    names = (
        [inside]
        if inside.endswith((".pth", ".pt"))
        else [f"{inside}/{name}".lstrip("/") for name in (CONFIG_FILE, WEIGHTS_FILE)]
    )
    try:
        files = [Path(huggingface_hub.hf_hub_download(repository, name, revision=revision or None)) for name in names]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"--sae {address}: {' '.join(str(error).split())}") from error
    return files[0] if len(files) == 1 else files[0].parent


def read_msae(path: Path) -> SAE:
    """An MSAE `.pth` checkpoint; ValueError if its name, its contents and its shapes do not agree."""
    name = _MSAE_NAME.fullmatch(path.stem)
    if name is None:
        raise ValueError(
            f"{path.name} is not named like an MSAE checkpoint (LATENTS_WIDTH_TopKReLU_K_..._...): "
            "its name is its configuration, so a renamed file cannot be read"
        )
    for field, supported in (
        ("activation", "TopKReLU"),
        ("tied", "False"),
        ("normalize", "False"),
        ("soft_cap", "0.0"),
    ):
        if name[field] != supported:
            raise ValueError(f"{path.name}: {field} is {name[field]}, this version reads {supported} only")
    content = _load_checked(path)
    missing = {"model", "mean_center", "scaling_factor"} - content.keys()
    if missing:
        raise ValueError(f"{path.name} lacks {', '.join(sorted(missing))}: not an MSAE checkpoint")
    tensors = {key: value for key, value in content["model"].items() if key != "latents_activation_frequency"}
    tensors["mean"] = content["mean_center"]
    # Stored number, never recomputed: two definitions of it are in circulation, with and without a square root.
    tensors["scale"] = torch.tensor(float(content["scaling_factor"]))
    config = SAEConfig(
        n_inputs=int(name["d"]), n_latents=int(name["n"]), k=int(name["k"]), source=f"MSAE checkpoint {path.name}"
    )
    return from_tensors(config, tensors, path.name)


def _load_checked(path: Path) -> dict[str, Any]:
    """`torch.load` that can build nothing but tensors and NumPy float64 scalars."""
    scalar = np.float64(0).__reduce__()[0]  # the constructor, wherever this NumPy keeps it
    allowed: list[Any] = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        type(np.dtype("float64")),
    ]
    with torch.serialization.safe_globals(allowed):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as error:  # torch raises pickle, zip and runtime errors alike for a file it cannot or will not read
            raise ValueError(
                f"{path.name} cannot be read as a plain checkpoint: {str(error).splitlines()[0]}"
            ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, expected MSAE's dictionary")
    return content
