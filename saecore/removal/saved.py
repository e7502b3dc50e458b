"""A head of removal in a folder: config.json, which says what it belongs to, and head.safetensors, in half precision.

    demo                           the head of the embedded model
    FOLDER, s3://..., gs://...     what `relmap distill` wrote

Half precision keeps 3 digits of weights whose predictions are good to 1 or 2; phi adds up exactly nevertheless, since that is
done in float32 after the weights. Files are read as those of strangers (`saecore.untrusted`).
"""

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path

import safetensors.torch
import torch

from saecore import storage
from saecore.hub import DEMO_REMOVAL, embedded
from saecore.removal.head import Head, HeadConfig
from saecore.removal.recipe import HEAD_WIDTH, LARGEST
from saecore.untrusted import about, check_values, read_json_file, read_safetensors, shape_of, shown, whole

CONFIG_FILE, WEIGHTS_FILE = "config.json", "head.safetensors"

EXACT = ("empty",)
"""Tensors that stay in single precision: remainders are read out of them."""

FORMAT = {"format": "relevance-map-sae-removal", "version": 2}
"""Heads of version 1 had the same tensors, and read values in the place of keys."""


def save_head(head: Head, folder: str) -> None:
    """Write a head into a folder; the configuration comes last, so a folder that has it is whole."""
    tensors = {
        name: tensor.detach().cpu().to(torch.float32 if name in EXACT else torch.float16).contiguous()
        for name, tensor in head.state_dict().items()
    }
    storage.write_atomic(storage.join_uri(folder, WEIGHTS_FILE), safetensors.torch.save(tensors))
    config = {**FORMAT, **dataclasses.asdict(head.config)}
    storage.write_atomic(storage.join_uri(folder, CONFIG_FILE), (json.dumps(config, indent=2) + "\n").encode())


def load_head(address: str) -> Head:
    """The head at an address, in float32 on the CPU; ValueError in one sentence if it cannot be loaded."""
    with about(address):
        folder = embedded(address, DEMO_REMOVAL)
        if "://" not in folder:
            return _read(Path(folder))
        with tempfile.TemporaryDirectory() as copied:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                if storage.is_file(there := storage.join_uri(folder, name)):
                    Path(copied, name).write_bytes(storage.read_bytes(there))
            return _read(Path(copied))


def digest_of(head: Head) -> str:
    """The first 16 digits of the SHA-256 of a head: its tensors, and what it belongs to."""
    described = dataclasses.replace(head.config, source="")
    digest = hashlib.sha256(repr(described).encode())
    for name, tensor in sorted(head.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(folder: Path) -> Head:
    if missing := [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]:
        raise ValueError(
            f"no head of removal there: expected {CONFIG_FILE} and {WEIGHTS_FILE}, and there is no {missing[0]}"
        )
    config = _config(folder)
    with torch.device("meta"):  # only the shapes
        expected = {name: tuple(tensor.shape) for name, tensor in Head(config).state_dict().items()}
    tensors = read_safetensors(folder / WEIGHTS_FILE)
    shapes = {name: shape_of(tensor, f"the tensor {name!r}") for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise ValueError(f"the tensor {name!r}: expected shape {expected.get(name)}, found {shapes.get(name)}")
        check_values(tensors[name], f"the tensor {name!r}")
    head = Head(config).eval().requires_grad_(False)
    head.load_state_dict(tensors)
    return head


def _config(folder: Path) -> HeadConfig:
    fields = read_json_file(folder / CONFIG_FILE)
    if {name: fields.pop(name, None) for name in FORMAT} != FORMAT:
        raise ValueError(
            f"{CONFIG_FILE} does not describe a head of removal ({FORMAT['format']}, version {FORMAT['version']})"
        )
    known = {field.name for field in dataclasses.fields(HeadConfig)}
    if fields.keys() != known:
        raise ValueError(f"{CONFIG_FILE}: expected the fields {sorted(known)}, found {sorted(fields)}")
    for name in ("model_sha256", "site", "source"):
        if not isinstance(fields[name], str):
            raise ValueError(f"{CONFIG_FILE}: {name} is {shown(fields[name])}, expected a text")
    for name in known - {"model_sha256", "site", "source"}:
        whole(fields[name], f"{CONFIG_FILE}: {name}", most=LARGEST["blocks" if name == "blocks" else "width"])
    if fields["width"] % HEAD_WIDTH:
        raise ValueError(f"{CONFIG_FILE}: width is {fields['width']}, expected a multiple of {HEAD_WIDTH}")
    return HeadConfig(**fields)
