"""SAEs by address: the embedded one, our own folders, and other people's files.

    demo, demo-patches                          the embedded SAEs: of the embedding, and of patch tokens
    FOLDER                                      our config.json and sae.safetensors (`SAE.save` writes them), or another format
    FILE.pth, FILE.pt                           an MSAE checkpoint, or a single file of another format
    s3://..., gs://...                          our own folder, or a single file, on an object store
    hf://OWNER/REPOSITORY[/PATH][@REVISION]     a folder or a file on the Hugging Face Hub, cached by huggingface_hub

Other formats, and how they are converted, are in `saecore.sae.formats` and `saecore.sae.embedding_formats`. The files that
exist, and what they hold, tell the format. A folder that could be of two formats is refused. Where an SAE reads, its site, is
told by its files or else by whoever loads it, and never guessed.

Nothing is unpickled freely: files of torch are read with `weights_only=True` and an allow-list of NumPy scalars.

Left out: safetensors files without a folder, which do not say what their tensors are.
"""

import dataclasses
import re
import tempfile
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from saecore import storage
from saecore.hub import DEMO_PATCHES, DEMO_SAE, embedded, snapshot
from saecore.sae import embedding_formats, formats, hooks, sites
from saecore.sae.config import SAEConfig, from_fields
from saecore.sae.model import CONFIG_FILE, SAE, WEIGHTS_FILE
from saecore.sae.soundness import check_sae
from saecore.untrusted import about, read_json_file, read_safetensors, read_torch, shape_of

_SINGLE = (".pth", ".pt")

_CHECKPOINT = re.compile(r"ae(_\d+)?\.pt")
"""What dictionary_learning calls its files of weights."""

FOLDERS = formats.FOLDERS | embedding_formats.FOLDERS


def load_sae(address: str, site: str = "") -> SAE:
    """The SAE at `address` (forms above), in float32 on the CPU; ValueError in one sentence if it cannot be loaded.

    `site` says where the SAE reads, in the text form of `saecore.sae.sites`. It is needed where the files do not say it, and
    must not contradict them where they do.
    """
    with about(address):
        try:
            sae = _load(address)
        except OSError as error:  # a file that may not be read, or a folder in its place
            raise ValueError(f"cannot be read: {error}") from error
        sae.config = dataclasses.replace(sae.config, site=sites.settled(sae.config.site, site))
    return sae


def load_running_sae(address: str, site: str = "") -> SAE:
    """The same, of an SAE that can run on images. ValueError for one that reads where none can run yet."""
    sae = load_sae(address, site)
    with about(address):
        sites.check_runs(sae.config.site, sae.config.model)
    return sae


def load_embedding_sae(address: str, site: str = "") -> SAE:
    """The same, of an SAE that reads the image embedding. ValueError for one that reads inside the tower."""
    sae = load_sae(address, site)
    with about(address):
        sites.check_embedding(sae.config.site, sae.config.model)
    return sae


def _load(address: str) -> SAE:
    """The SAE at `address`; its site is empty where the files do not say it."""
    address = embedded(address, DEMO_SAE) if address != "demo-patches" else str(DEMO_PATCHES)
    remote = address.startswith("hf://")
    if (address.partition("@")[0] if remote else address).endswith(".safetensors"):
        raise ValueError("a safetensors file does not say what its tensors are; give its folder")
    if "://" in address and not remote:
        return _read_store(address)
    path = _download(address) if remote else Path(address)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError("no such file or folder; an SAE on the Hugging Face Hub is hf://OWNER/REPOSITORY")
    if path.suffix not in _SINGLE:
        raise ValueError(f"expected a folder with {CONFIG_FILE}, or a .pth or .pt file")
    return _read_file(path)


def _read_store(address: str) -> SAE:
    """Our own folder, or a single file, on an object store. It is copied for as long as it is read: readers take paths.

    A single file keeps the names of the two folders around it, which may say where its SAE reads.
    """
    *around, name = PurePosixPath(storage.split_settings(address)[0]).parts[-3:]
    is_single = name.endswith(_SINGLE)
    base = storage.parent(address) if is_single else address
    needed = (name,) if is_single else (CONFIG_FILE, WEIGHTS_FILE)
    if missing := [file for file in needed if not storage.is_file(storage.join_uri(base, file))]:
        raise ValueError(f"no {missing[0]} there; of a folder in another format than ours, make a copy on a disk first")
    with tempfile.TemporaryDirectory() as copied:
        folder = Path(copied, *(part for part in around if part != ".."))
        folder.mkdir(parents=True, exist_ok=True)
        for file in (*needed, f"{name}.json"):  # what an MSAE file's name does not say stands in a file besides it
            if file in needed or storage.is_file(storage.join_uri(base, file)):
                (folder / file).write_bytes(storage.read_bytes(storage.join_uri(base, file)))
        return _read_file(folder / name) if is_single else load_folder(folder)


def _read_folder(folder: Path) -> SAE:
    names = [name for name, (files, _) in FOLDERS.items() if all(any(folder.glob(file)) for file in files)]
    if "dictionary_learning" in names:  # its checkpoints stay in the folder when a training ends
        names = [name for name in names if name != "dictionary_learning's checkpoints"]
    own = (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()
    if own + len(names) > 1:
        raise ValueError(f"{folder}: expected the files of one SAE, found those of {', '.join(names + ['ours'] * own)}")
    if own:
        return load_folder(folder)
    if not names:
        others = "; ".join(f"{' and '.join(files)} ({name})" for name, (files, _) in FOLDERS.items())
        raise ValueError(f"no SAE in {folder}: expected {CONFIG_FILE} and {WEIGHTS_FILE} there, or {others}")
    return from_tensors(*FOLDERS[names[0]][1](folder), str(folder))


def _read_file(path: Path) -> SAE:
    with path.open("rb") as file:
        first = file.read(1)
    if first == b"{":
        return from_tensors(*formats.read_saev(path), path.name)
    content = read_torch(path)
    if _CHECKPOINT.fullmatch(path.name):
        for weights in (hooks.named_path(path), path.resolve()):  # where it is named, and where a link leads
            for folder in weights.parents[:2]:
                if (folder / CONFIG_FILE).is_file():
                    return from_tensors(*formats.read_dictionary_learning(folder, weights), path.name)
    if {"model_state_dict", "n_features"} <= content.keys():
        return from_tensors(*formats.read_clipscope(path, content), path.name)
    if "bpre" in content:
        return from_tensors(*embedding_formats.read_sem(path, content), path.name)
    if "tied_bias" in content:
        return from_tensors(*embedding_formats.read_dncbm(path, content), path.name)
    return from_tensors(*embedding_formats.read_msae(path, content), path.name)


def _download(address: str) -> Path:
    """The file, or the folder, of a Hub address in the local cache."""
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
    # All at once: the repository's list of files, or the cache where there is no network, tells which of them exist.
    path = snapshot(repository, revision or None, lambda files: wanted) / inside
    if not path.exists():
        raise ValueError(f"no {inside} with an SAE in {repository}")
    return path


# ---- From files to an SAE.


def load_folder(folder: str | Path) -> SAE:
    """An SAE that `SAE.save` wrote; ValueError if the folder holds none, or one that contradicts itself."""
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"no SAE in {folder}: expected {CONFIG_FILE} and {WEIGHTS_FILE} there")
    config = read_json_file(folder / CONFIG_FILE)
    if config.pop("format", None) != "relevance-map-sae" or config.pop("version", None) != 1:
        raise ValueError(
            f"{folder / CONFIG_FILE} does not describe an SAE of this project (format relevance-map-sae, version 1)"
        )
    known = {field.name for field in dataclasses.fields(SAEConfig)}
    if set(config) - known:
        raise ValueError(
            f"{folder / CONFIG_FILE} has unknown fields {sorted(set(config) - known)}; a newer version wrote it"
        )
    return from_tensors(
        from_fields(config, str(folder / CONFIG_FILE)), read_safetensors(folder / WEIGHTS_FILE), str(folder)
    )


def from_tensors(config: SAEConfig, tensors: dict[str, Tensor], where: str) -> SAE:
    """Fill an SAE from named tensors of the shapes that `config` asks for; ValueError names the first that differs.

    Each tensor is taken out of `tensors` as soon as it is copied, so that a large SAE does not lie in memory twice.
    """
    # Only the shapes: nothing is allocated because a config claims it, before its file is known to hold it.
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in SAE(config).state_dict().items()}
    shapes = {name: shape_of(tensor, f"SAE tensor {name!r} in {where}") for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | shapes.keys(), key=str):
        if expected.get(name) != shapes.get(name):
            raise ValueError(
                f"SAE tensor {name!r} in {where}: expected shape {expected.get(name)}, found {shapes.get(name)}"
            )
    sae = SAE(config).eval().requires_grad_(False)
    for name, own in sae.state_dict().items():
        own.copy_(tensors.pop(name))  # to float32, whatever it was
    check_sae(sae, where)
    return sae
