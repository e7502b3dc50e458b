"""Sparse autoencoders on CLIP image embeddings, and their file format.

With x a CLIP image embedding as the tower gives it (not L2-normalised), m its training mean and s a scalar:

    u = s (x - m)                      standardised, so that mean |u|^2 is about d
    p = (u - b) E + c                  pre-activations, one per latent
    a = max(p, 0) at the k largest p, 0 elsewhere                      (TopK: Gao et al. 2024, arXiv:2406.04093)
    x' = (a D + b) / s + m             reconstruction, back in CLIP's space

p is affine in x, dp_j/dx = s E[:, j] whatever fires: relevance maps stand on that and never need autograd here.
Centring and scaling happen in this file, once; callers pass raw embeddings. Everything is float32: in bfloat16 more than
half of the images select other latents.

Left out for now: activations other than TopK, and other people's files (see `saecore.checkpoints`).

Shapes: B images, d embedding width (`n_inputs`), n latents (`n_latents`), k latents that may fire.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "sae.safetensors"


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """What the tensors alone do not say."""

    n_inputs: int
    """Width of the CLIP embedding."""
    n_latents: int
    """Number of latents."""
    k: int
    """How many latents may fire for one image."""
    architecture: str = "topk"
    """Activation function; `topk` is the only one so far."""
    source: str = ""
    """Where the weights come from: a training command, or a foreign file and its format."""

    def __post_init__(self) -> None:
        if self.architecture != "topk":
            raise ValueError(f"SAE architecture {self.architecture!r} is not supported; supported: topk")
        if not 0 < self.k <= self.n_latents:
            raise ValueError(f"an SAE of {self.n_latents} latents cannot let k = {self.k} of them fire")


class Code(NamedTuple):
    """Sparse code of B embeddings, strongest latent first."""

    latents: Tensor
    """int64 (B, k): which latents have the k largest pre-activations."""
    activations: Tensor
    """float32 (B, k): their activations; 0 where the pre-activation is not positive."""
    pre_activations: Tensor
    """float32 (B, k)."""


class SAE(nn.Module):
    """A TopK sparse autoencoder; equations at the head of the file."""

    mean: Tensor
    scale: Tensor

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        d, n = config.n_inputs, config.n_latents
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("scale", torch.ones(()))
        self.pre_bias = nn.Parameter(torch.zeros(d))
        self.encoder = nn.Parameter(torch.zeros(d, n))
        self.latent_bias = nn.Parameter(torch.zeros(n))
        self.decoder = nn.Parameter(torch.zeros(n, d))

    def standardise(self, x: Tensor) -> Tensor:
        """CLIP embeddings (B, d) -> u (B, d)."""
        return (x.float() - self.mean) * self.scale

    def pre_activations(self, x: Tensor) -> Tensor:
        """CLIP embeddings (B, d) -> p (B, n)."""
        return torch.addmm(self.latent_bias, self.standardise(x) - self.pre_bias, self.encoder)

    def encode_sparse(self, x: Tensor) -> Code:
        """CLIP embeddings (B, d) -> the k latents that may fire, and how strongly they do."""
        top = torch.topk(self.pre_activations(x), self.config.k, dim=-1)
        return Code(top.indices, top.values.clamp(min=0), top.values)

    def decode_sparse(self, latents: Tensor, activations: Tensor) -> Tensor:
        """Sparse code (B, k) -> reconstruction (B, d) in CLIP's space."""
        # embedding_bag sums weighted decoder rows without the (B, k, d) tensor that indexing would make.
        standardised = nn.functional.embedding_bag(latents, self.decoder, per_sample_weights=activations, mode="sum")
        return (standardised + self.pre_bias) / self.scale + self.mean

    def forward(self, x: Tensor) -> Tensor:
        """CLIP embeddings (B, d) -> reconstruction (B, d)."""
        code = self.encode_sparse(x)
        return self.decode_sparse(code.latents, code.activations)

    def read_outs(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latent ids (...) -> (w, c) with pre-activation = w . x + c; w is (..., d), c is (...)."""
        w = self.encoder.T[latents] * self.scale
        offset = self.mean + self.pre_bias / self.scale
        return w, self.latent_bias[latents] - w @ offset

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `sae.safetensors` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"format": "relevance-map-sae", "version": 1, **dataclasses.asdict(self.config)}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)

    def sha256(self) -> str:
        """Hash of everything that changes results: the config without its source, and every tensor's bytes."""
        described = {key: value for key, value in dataclasses.asdict(self.config).items() if key != "source"}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_folder(folder: str | Path) -> SAE:
    """Read an SAE saved by `SAE.save`; raises ValueError if the folder holds none, or one that contradicts itself."""
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"no SAE in {folder}: expected {CONFIG_FILE} and {WEIGHTS_FILE} there")
    config = json.loads((folder / CONFIG_FILE).read_text())
    if config.pop("format", None) != "relevance-map-sae" or config.pop("version", None) != 1:
        raise ValueError(
            f"{folder / CONFIG_FILE} does not describe an SAE of this project (format relevance-map-sae, version 1)"
        )
    known = {field.name for field in dataclasses.fields(SAEConfig)}
    if set(config) - known:
        raise ValueError(
            f"{folder / CONFIG_FILE} has unknown fields {sorted(set(config) - known)}; a newer version wrote it"
        )
    return from_tensors(SAEConfig(**config), safetensors.torch.load_file(folder / WEIGHTS_FILE), str(folder))


def from_tensors(config: SAEConfig, tensors: dict[str, Tensor], where: str) -> SAE:
    """Fill an SAE from named tensors of the shapes that `config` asks for; ValueError names the first that differs."""
    sae = SAE(config)
    expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"SAE tensor {name!r} in {where}: expected shape {expected.get(name)}, found {found.get(name)}"
            )
    sae.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return sae.eval().requires_grad_(False)
