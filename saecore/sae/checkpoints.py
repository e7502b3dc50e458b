"""SAEs by address: the embedded one, our own folders, MSAE files (Zaigrajew et al. 2025, arXiv:2502.20578), and others'.

    demo                                        the embedded SAE
    FOLDER                                      config.json and sae.safetensors, see `saecore.sae.model`; others' folders
    FILE.pth, FILE.pt                           an MSAE checkpoint; its name is its configuration; others' single files
    hf://OWNER/REPOSITORY[/PATH][@REVISION]     either of the last two on the Hugging Face Hub, cached by huggingface_hub

Others' formats, and how they are converted, are in `saecore.sae.formats` and `saecore.sae.embedding_formats`. Which one it is
is told by the files that exist and by what they hold; a folder that could be two is refused. Where the SAE reads, its site,
is told by the files too, or else by whoever loads it, and never guessed. An MSAE file whose name lost its configuration takes
it from a JSON file beside it, FILE.pth.json, with the fields of `SAEConfig`.

Nothing is unpickled freely: files of torch are read with `weights_only=True` and an allow-list of NumPy scalars.

Left out: MSAE's list of nested levels and its loss weights, which neither file nor name holds beyond the first level.
"""

import dataclasses
import re
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from saecore.hub import snapshot
from saecore.sae import embedding_formats, formats, sites
from saecore.sae.config import SAEConfig, from_fields
from saecore.sae.model import CONFIG_FILE, SAE, WEIGHTS_FILE, from_tensors, load_folder
from saecore.untrusted import about, mapping, number, read_json_file, read_torch

DEMO = Path(__file__).parent.parent / "demo" / "sae"

# n_d_activation[_k or sparsity weight][_weighting]_tied_normalize_softcap[_data]: fields that the tensors do not hold. A
# Matryoshka file (weighting UW or RW) is at inference a TopK SAE whose k is the first nesting level.
_MSAE_NAME = re.compile(
    r"(?P<n>\d+)_(?P<d>\d+)_"
    r"((?P<topk>(Batch)?TopK(abs)?(ReLU)?)_(?P<k>\d+)(_(?P<weighting>UW|RW))?|(?P<relu>(Jump)?ReLU)(_\d+)?)"
    r"_(?P<tied>True|False)_(?P<normalize>True|False)_(?P<soft_cap>\d+(\.\d+)?)(_(?P<data>.*))?"
)

# dataset_model_split_kind_rows_width of the embeddings that it was trained on: the model as ViT-L~14.
_MSAE_DATA = re.compile(r".+_(?P<model>[^_]+)_[^_]+_(?:image|text)_\d+_\d+")

_SINGLE = (".pth", ".pt")

_CHECKPOINT = re.compile(r"ae(_\d+)?\.pt")
"""What dictionary_learning calls its files of weights."""

FOLDERS = formats.FOLDERS | embedding_formats.FOLDERS


def load_sae(address: str, site: str = "") -> SAE:
    """The SAE at `address` (forms above), in float32 on the CPU; ValueError in one sentence if it cannot be had.

    `site` says where it reads, in the text form of `saecore.sae.sites`, where its files do not; what they do say it must not
    deny.
    """
    with about(f"--sae {address}"):
        try:
            sae = _load(address)
        except OSError as error:  # of a file that may not be read, or is a folder
            raise ValueError(f"cannot be read: {error}") from error
    sae.config = dataclasses.replace(sae.config, site=sites.settled(sae.config.site, site, address))
    return sae


def _load(address: str) -> SAE:
    """The same with an empty site where the files do not say it."""
    if address == "demo":
        return load_folder(DEMO)
    remote = address.startswith("hf://")
    if (address.partition("@")[0] if remote else address).endswith(".safetensors"):
        raise ValueError("a safetensors file does not say what its tensors are; give its folder")
    path = _download(address) if remote else Path(address)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError("no such file or folder; an SAE on the Hugging Face Hub is hf://OWNER/REPOSITORY")
    if path.suffix not in _SINGLE:
        raise ValueError(f"expected a folder with {CONFIG_FILE}, or a .pth or .pt file")
    return _read_file(path)


def _read_folder(folder: Path) -> SAE:
    found = [name for name, (files, _) in FOLDERS.items() if all(any(folder.glob(file)) for file in files)]
    if "dictionary_learning" in found:  # a training that ended leaves its checkpoints beside it
        found = [name for name in found if name != "dictionary_learning's checkpoints"]
    own = (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()
    if own + len(found) > 1:
        raise ValueError(f"{folder}: expected the files of one SAE, found those of {', '.join(found + ['ours'] * own)}")
    if own:
        return load_folder(folder)
    if not found:
        others = "; ".join(f"{' and '.join(files)} ({name})" for name, (files, _) in FOLDERS.items())
        raise ValueError(f"no SAE in {folder}: expected {CONFIG_FILE} and {WEIGHTS_FILE} there, or {others}")
    return from_tensors(*FOLDERS[found[0]][1](folder), str(folder))


def _read_file(path: Path) -> SAE:
    with path.open("rb") as file:
        first = file.read(1)
    if first == b"{":
        return from_tensors(*formats.read_saev(path), path.name)
    content = read_torch(path)
    if _CHECKPOINT.fullmatch(path.name):
        for folder in path.resolve().parents[:2]:
            if (folder / CONFIG_FILE).is_file():
                return from_tensors(*formats.read_dictionary_learning(folder, path.resolve()), path.name)
    if "model_state_dict" in content:
        return from_tensors(*formats.read_clipscope(path, content), path.name)
    if "bpre" in content:
        return from_tensors(*embedding_formats.read_sem(path, content), path.name)
    if "tied_bias" in content:
        return from_tensors(*embedding_formats.read_dncbm(path, content), path.name)
    return read_msae(path, content)


def _download(address: str) -> Path:
    """A Hub address to the file, or the folder, in the local cache."""
    location, _, revision = address.removeprefix("hf://").partition("@")
    parts = location.strip("/").split("/")
    if len(parts) < 2:
        raise ValueError("expected hf://OWNER/REPOSITORY, optionally followed by /PATH and @REVISION")
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    if inside.endswith(_SINGLE):
        wanted = [inside, f"{inside}.json"]
        if _CHECKPOINT.fullmatch(PurePosixPath(inside).name):
            wanted += [str(folder / CONFIG_FILE) for folder in list(PurePosixPath(inside).parents)[:2]]
    else:
        files = {CONFIG_FILE, WEIGHTS_FILE, "activation_scaler.json"}.union(*(f for f, _ in FOLDERS.values()))
        wanted = [f"{inside}/{file}".lstrip("/") for file in sorted(files)]
    # Not file by file: the listing tells which of them exist, and without a network the cache does.
    path = snapshot(repository, revision or None, lambda files: wanted) / inside
    if not path.exists():
        raise ValueError(f"no {inside} with an SAE in {repository}")
    return path


def read_msae(path: Path, content: dict[str, Any]) -> SAE:
    """An MSAE checkpoint, already read; ValueError if its name or specification, contents and shapes do not agree."""
    missing = {"model", "mean_center", "scaling_factor"} - content.keys()
    if missing:
        raise ValueError(
            f"{path.name} lacks {', '.join(sorted(missing))}: not an MSAE checkpoint; "
            f"if a {CONFIG_FILE} beside it describes it, give its folder"
        )
    spec = Path(f"{path}.json")
    config = _spec(spec) if spec.is_file() else _named(path)
    model = mapping(content["model"], f"model in {path.name}")
    tensors = {key: value for key, value in model.items() if key != "latents_activation_frequency"}
    log_threshold = tensors.pop("activation.log_threshold", None)
    again = tensors.pop("dead_activations.log_threshold", log_threshold)  # one parameter, registered twice
    if log_threshold is not None:
        if not (isinstance(log_threshold, Tensor) and isinstance(again, Tensor)):
            raise ValueError(f"{path.name}: expected log_threshold to be a tensor")
        if not torch.equal(log_threshold, again):
            raise ValueError(f"{path.name}: expected two equal copies of log_threshold, found two that differ")
        tensors["threshold"] = log_threshold.exp()
    if config.architecture == "batchtopk":
        tensors["threshold"] = torch.full((), torch.nan)  # MSAE stores none
    tensors["mean"] = content["mean_center"]
    # Stored number, never recomputed: two definitions of it are in circulation, with and without a square root.
    tensors["scale"] = torch.tensor(number(content["scaling_factor"], f"scaling_factor in {path.name}"))
    return from_tensors(config, tensors, path.name)


def _named(path: Path) -> SAEConfig:
    name = _MSAE_NAME.fullmatch(path.stem)
    if name is None:
        raise ValueError(
            f"{path.name} is not named like an MSAE checkpoint (LATENTS_WIDTH_TopKReLU_K_..._...): its name is its "
            f"configuration, so a renamed file needs one beside it, {path.name}.json with n_inputs, n_latents, k, architecture"
        )
    data = _MSAE_DATA.fullmatch(name["data"] or "")
    activation = name["topk"] or name["relu"]
    architecture = {"ReLU": "relu", "JumpReLU": "jumprelu"}.get(activation)
    by_magnitude = "abs" in activation
    output = "relu" if activation.endswith("ReLU") else "signed"
    if architecture is None:
        architecture = "batchtopk" if activation.startswith("Batch") else "topk"
        if (
            by_magnitude and architecture == "topk"
        ):  # |p| is what fires there; BatchTopK selects by it but keeps the sign
            output = "absolute"
    return SAEConfig(
        n_inputs=int(name["d"]),
        n_latents=int(name["n"]),
        k=int(name["k"] or 0),
        architecture=architecture,
        output=output,
        by_magnitude=by_magnitude,
        normalise="layer_norm" if name["normalize"] == "True" else "none",
        soft_cap=float(name["soft_cap"]),
        tied=name["tied"] == "True",
        nesting="levels" if name["weighting"] else "none",
        nested=(int(name["k"]),) if name["weighting"] else (),
        source=f"MSAE checkpoint {path.name}",
        model=data["model"].replace("~", "/") if data else "",
    )


def _spec(path: Path) -> SAEConfig:
    return from_fields({"source": f"MSAE checkpoint {path.stem}", **read_json_file(path)}, path.name)
