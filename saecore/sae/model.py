"""Sparse autoencoders on CLIP image embeddings, and their file format.

With x a CLIP image embedding as the tower gives it (not L2-normalised), m its training mean and s a scalar:

    y = x, or x / |x|                  where the SAE's site says that its input is L2-normalised first
    u = s (y - m)                      standardised, so that mean |u|^2 is about d
    v = N(u)                           a per-sample normaliser, where there is one
    p = (v - b) E + c                  pre-activations, one per latent
    a = phi(p)                         activations, most of them 0
    z = C tanh(a / C)                  soft cap, where there is one
    y' = N^-1(z D + b) / s + m         D = E' where tied
    x' = y', or |x| y'                 reconstruction, back in CLIP's space

    architecture   which latents fire                                     source
    relu           p > 0                                                  Cunningham et al. 2023, arXiv:2309.08600
    topk           the k largest p of an image                            Gao et al. 2024, arXiv:2406.04093
    batchtopk      p > one threshold, calibrated after training           Bussmann et al. 2024, arXiv:2412.06410
    jumprelu       p > a threshold of the latent's own                    Rajamanoharan et al. 2024, arXiv:2407.14435

Matryoshka SAEs are these at inference; they differ in training. `nested` says at what: at several k of one TopK SAE (MSAE,
Zaigrajew et al. 2025, arXiv:2502.20578) or at several prefixes of the dictionary (Bussmann et al. 2025, arXiv:2503.17547).

Without normalisers p is affine in x, dp_j/dx = s E[:, j] whatever fires: relevance maps stand on that and never need
autograd here. With one, be it N or |x|, `read_outs` freezes it or takes its exact Jacobian. The soft cap lies behind p, so
maps know none. Normalising, centring and scaling happen in this file, once; callers pass raw embeddings. Everything is
float32: in bfloat16 more than half of the images select other latents.

Left out: gated SAEs; other people's files (`saecore.sae.checkpoints`); gradients that training needs
(`saecore.training.kernels`).

Shapes: B images, d embedding width (`n_inputs`), n latents (`n_latents`), K latents listed for each image.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from torch import Tensor, nn

from saecore.sae.config import SAEConfig, from_fields
from saecore.sae.sites import EMBEDDING
from saecore.sae.soundness import check_sae
from saecore.untrusted import read_json_file, read_safetensors, shape_of

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "sae.safetensors"

LEAST_LENGTH = 1e-12
"""Length that an embedding of zeros is taken to have."""

LAYER_NORM_EPS = 1e-5
"""Added to the standard deviation, not to the variance, and on the way in only: what the published SAEs do."""

CARD = """---
{{ card_data }}
---

# Sparse autoencoder on CLIP image embeddings

{{ description }}

```python
from saecore.sae.checkpoints import load_sae

sae = load_sae("hf://OWNER/REPOSITORY")   # or a local folder
latents, full_latents = sae.encode(embeddings)   # CLIP image embeddings as they are; what its site asks for is done inside
```

Made with Relevance Map SAE. `config.json` describes it, `sae.safetensors` holds its tensors, the mean and the scale of the
embeddings included.
"""


class Code(NamedTuple):
    """Sparse code of B embeddings, strongest latent first: those that fire, then the nearest to it."""

    latents: Tensor
    """int64 (B, K)."""
    activations: Tensor
    """float32 (B, K): 0 for a latent that does not fire."""
    pre_activations: Tensor
    """float32 (B, K)."""


class Inputs(NamedTuple):
    """What the encoder sees of B embeddings, and the way back: x = length ((values * spread + shift) / s + m)."""

    values: Tensor
    """float32 (B, d): v."""
    shift: Tensor
    """float32 (B, 1)."""
    spread: Tensor
    """float32 (B, 1)."""
    length: Tensor
    """float32 (B, 1): |x| where it is taken away first, else 1."""


class SAE(nn.Module, ModelHubMixin, model_card_template=CARD, library_name="relevance-map-sae", license="mit"):
    """A sparse autoencoder; equations at the head of the file. `push_to_hub` and `from_pretrained` are huggingface_hub's."""

    mean: Tensor
    scale: Tensor
    decoder: nn.Parameter | None
    threshold: Tensor | None

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        d, n = config.n_inputs, config.n_latents
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("scale", torch.ones(()))
        self.pre_bias = nn.Parameter(torch.zeros(d))
        # Transposed in memory: a latent's weights lie side by side, as sparse gradients and read-outs want them.
        self.encoder = nn.Parameter(torch.zeros(n, d).T)
        self.latent_bias = nn.Parameter(torch.zeros(n))
        self.register_parameter("decoder", None if config.tied else nn.Parameter(torch.zeros(n, d)))
        if config.architecture == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(n))
        elif config.architecture == "batchtopk":
            self.register_buffer("threshold", torch.full((), torch.nan))  # not calibrated
        else:
            self.threshold = None

    # ---- In and out of the encoder's space.

    @property
    def atoms(self) -> Tensor:
        """D (n, d): what each latent adds to the reconstruction."""
        return self.encoder.T if self.decoder is None else self.decoder

    @property
    def normalises(self) -> str:
        """What it normalises of each sample, in words; empty where it does not: then read-outs are the same for all."""
        length = "l2" if self.config.unit_length else ""
        return ", ".join(filter(None, (length, self.config.normalise.replace("none", ""))))

    def length(self, x: Tensor) -> Tensor:
        """CLIP embeddings (B, d) -> what they are divided by first (B, 1): |x|, or 1."""
        if not self.config.unit_length:
            return torch.ones_like(x[:, :1], dtype=torch.float32)
        return torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).clamp(min=LEAST_LENGTH)

    def deviation(self, x: Tensor) -> Tensor:
        """CLIP embeddings (B, d) -> x - |x| m or x - m: what a reconstruction is to explain of them."""
        return x.float() - self.length(x) * self.mean

    def standardise(self, x: Tensor) -> Tensor:
        """CLIP embeddings (B, d) -> u (B, d)."""
        return (x.float() / self.length(x) - self.mean) * self.scale

    def inputs(self, x: Tensor) -> Inputs:
        """CLIP embeddings (B, d) -> v, and how to come back from it."""
        u, length = self.standardise(x), self.length(x)
        shift, spread = torch.zeros_like(u[:, :1]), torch.ones_like(u[:, :1])
        if self.config.normalise == "layer_norm":
            shift, spread = u.mean(-1, keepdim=True), u.std(-1, keepdim=True)
            return Inputs((u - shift) / (spread + LAYER_NORM_EPS), shift, spread, length)
        if self.config.normalise == "constant_norm":
            spread = torch.linalg.vector_norm(u, dim=-1, keepdim=True) / self.config.n_inputs**0.5
            return Inputs(u / spread, shift, spread, length)
        return Inputs(u, shift, spread, length)

    def leave(self, decoded: Tensor, x: Tensor | None) -> Tensor:
        """Decoder output (B, d) -> CLIP's space (B, d); `x` gives back what a per-sample normaliser took away."""
        if not self.normalises:
            return decoded / self.scale + self.mean
        if x is None:
            raise ValueError(f"this SAE normalises each sample ({self.normalises}): decode needs the embeddings too")
        seen = self.inputs(x)
        return ((decoded * seen.spread + seen.shift) / self.scale + self.mean) * seen.length

    # ---- Latents.

    def pre_activations(self, x: Tensor) -> Tensor:
        """CLIP embeddings (B, d) -> p (B, n)."""
        return torch.addmm(self.latent_bias, self.inputs(x).values - self.pre_bias, self.encoder)

    def firing_threshold(self) -> Tensor:
        """What p (or |p|) must exceed to fire: a scalar or (n,); ValueError for a batchtopk SAE that has none yet."""
        if self.threshold is None:
            return torch.zeros((), device=self.encoder.device)
        if torch.isnan(self.threshold).any():
            raise ValueError(
                "this BatchTopK SAE has no threshold, so what fires for an image would depend on the images beside it; "
                "calibrate it on embeddings first: python -m jobs.measure --sae SAE --embeddings FILE --save FOLDER"
            )
        return self.threshold.clamp(min=0)

    def output(self, pre_activations: Tensor) -> Tensor:
        """What latents with these pre-activations give if they fire, capped."""
        out = pre_activations
        if self.config.output == "relu":
            out = out.clamp(min=0)
        elif self.config.output == "absolute":
            out = out.abs()
        cap = self.config.soft_cap
        return cap * torch.tanh(out / cap) if cap else out

    def encode_sparse(self, x: Tensor, at_least: int = 1) -> Code:
        """CLIP embeddings (B, d) -> the latents that fire, and how strongly.

        K is the SAE's k for topk, else the largest number of latents that fire for one of these images; never less than
        `at_least`. The order of those that do not fire is by pre-activation. An image's own latents do not depend on the batch.
        """
        p = self.pre_activations(x)
        strength = p.abs() if self.config.by_magnitude else p
        if self.config.architecture == "topk":
            latents = strength.topk(max(self.config.k, at_least), dim=-1).indices
            fires = torch.arange(latents.shape[1], device=p.device) < self.config.k
        else:
            firing = strength > self.firing_threshold()
            if self.config.by_magnitude and self.config.output == "relu":
                firing &= p > 0
            most = max(int(firing.sum(-1).amax()) if len(p) else 0, at_least)
            # Below all that fire, in their own order: a latent under its threshold may be stronger than one over another.
            behind = strength - strength.amax(-1, keepdim=True) - 1
            latents = torch.where(firing, strength, behind).topk(most, dim=-1).indices
            fires = firing.gather(-1, latents)
        listed = p.gather(-1, latents)
        return Code(latents, self.output(listed) * fires, listed)

    def decode_sparse(self, latents: Tensor, activations: Tensor, x: Tensor | None = None) -> Tensor:
        """Sparse code (B, K) -> reconstruction (B, d) in CLIP's space; `x` where samples are normalised, see `leave`."""
        # embedding_bag sums weighted decoder rows without the (B, K, d) tensor that indexing would make.
        decoded = nn.functional.embedding_bag(latents, self.atoms, per_sample_weights=activations, mode="sum")
        return self.leave(decoded + self.pre_bias, x)

    def reconstruct(self, x: Tensor) -> Tensor:
        """CLIP embeddings (B, d) -> what the latents that fire make of them (B, d)."""
        code = self.encode_sparse(x)
        return self.decode_sparse(code.latents, code.activations, x)

    # ---- The interface of MSAE's scripts: dense latents, and `full` ones that no k has cut.

    def encode(self, x: Tensor, topk: int = -1) -> tuple[Tensor, Tensor]:
        """CLIP embeddings (B, d) -> (latents, full_latents), both (B, n), as in MSAE's `SAE.encode`.

        `latents` fire by the SAE's own rule. `full_latents` are max(p, 0) where that rule is a k (topk, batchtopk), else the
        same again; `topk`, between 0 and n, keeps their so many largest.
        """
        p = self.pre_activations(x)
        full = p.clamp(min=0)
        if self.config.soft_cap:
            full = self.config.soft_cap * torch.tanh(full / self.config.soft_cap)
        code = self.encode_sparse(x)
        latents = torch.zeros_like(p).scatter(-1, code.latents, code.activations)
        if self.config.architecture in ("relu", "jumprelu"):
            full = latents.clone()
        if 0 < topk < self.config.n_latents:
            top = full.topk(topk, dim=-1)
            full = torch.zeros_like(full).scatter(-1, top.indices, top.values)
        return latents, full

    def decode(self, latents: Tensor, x: Tensor | None = None) -> Tensor:
        """Dense latents (B, n) -> CLIP's space (B, d); `x` where samples are normalised, see `leave`."""
        return self.leave(latents @ self.atoms + self.pre_bias, x)

    def forward(self, x: Tensor, topk: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        """CLIP embeddings (B, d) -> (reconstruction, the same in standardised space, full_latents): MSAE's `SAE.forward`.

        Of the *full* latents: for the reconstruction by those that fire see `reconstruct`.
        """
        full = self.encode(x, topk)[1]
        reconstruction = self.decode(full, x)
        return reconstruction, (reconstruction / self.length(x) - self.mean) * self.scale, full

    # ---- What relevance maps explain.

    def read_outs(self, latents: Tensor, x: Tensor | None = None, exact: bool = False) -> tuple[Tensor, Tensor]:
        """Latent ids (...) -> (w, c) with pre-activation = w . x + c; w is (..., d), c is (...).

        Where each sample is normalised, w depends on it: give `x` (B, d) and ids (B, k). The sum still holds, for w with the
        sample's spread and length taken as constants, or, if `exact`, for w the true gradient.
        """
        rows = self.encoder.T[latents]
        w = rows * self.scale
        if not self.normalises:
            offset = self.mean + self.pre_bias / self.scale
            return w, self.latent_bias[latents] - w @ offset
        if x is None:
            raise ValueError(f"this SAE normalises each sample ({self.normalises}): read-outs need the embeddings")
        seen, d = self.inputs(x), self.config.n_inputs
        v, spread = seen.values.unsqueeze(1), seen.spread.unsqueeze(1)
        along = rows @ v.mT  # (B, k, 1): E_j . v
        if self.config.normalise == "layer_norm":
            w = w - w.mean(-1, keepdim=True)
            if exact:  # d spread / du = v (spread + eps) / ((d - 1) spread)
                w = w - self.scale * along * v * (spread + LAYER_NORM_EPS) / ((d - 1) * spread)
            w = w / (spread + LAYER_NORM_EPS)
        elif self.config.normalise == "constant_norm":
            if exact:  # |v|^2 = d
                w = w - self.scale * along * v / d
            w = w / spread
        if self.config.unit_length:
            length = seen.length.unsqueeze(1)
            if exact:  # dy/dx = (1 - y y') / |x|
                y = x.float().unsqueeze(1) / length
                w = w - (w @ y.mT) * y
            w = w / length
        p = along.squeeze(-1) - rows @ self.pre_bias + self.latent_bias[latents]
        return w, p - (w * x.float().unsqueeze(1)).sum(-1)

    # ---- Files.

    def save(self, folder: str | Path) -> None:
        """Write `config.json`, `sae.safetensors` and a model card into `folder`: huggingface_hub's `save_pretrained`."""
        self.save_pretrained(folder)

    def _save_pretrained(self, save_directory: Path) -> None:
        config = {"format": "relevance-map-sae", "version": 1, **dataclasses.asdict(self.config)}
        (save_directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(tensors, save_directory / WEIGHTS_FILE)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: Any = None, **options: Any) -> "SAE":
        if Path(model_id).is_dir():
            return load_folder(model_id)
        known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        options = {name: value for name, value in options.items() if name in known}
        files = [Path(hf_hub_download(model_id, name, **options)) for name in (CONFIG_FILE, WEIGHTS_FILE)]
        return load_folder(files[0].parent)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """The card that `save` and `push_to_hub` write; says what the config says."""
        c = self.config
        firing = {
            "topk": f", {c.k} of them may fire for an image",
            "batchtopk": f", about {c.k} of them fire for an image",
        }
        words = [f"{c.n_latents:,} latents on embeddings of width {c.n_inputs}, architecture {c.architecture}"]
        words[0] += firing.get(c.architecture, "") + "."
        words.append(f"Site: `{c.site}`" + (f" of `{c.model}`." if c.model else "."))
        if c.nesting != "none":
            words.append(f"Trained at nested {c.nesting} ({', '.join(map(str, c.nested))}).")
        if c.source:
            words.append(f"Weights: `{c.source}`.")
        return super().generate_model_card(*args, description=" ".join(words), **kwargs)

    def describe(self) -> dict[str, Any]:
        """The config, and a batchtopk SAE's threshold: what a run's record says of it."""
        found = dataclasses.asdict(self.config)
        if self.config.architecture == "batchtopk":
            found["threshold"] = float(self.firing_threshold())
        return found

    def sha256(self) -> str:
        """Hash of everything that changes results: the config without its source and model, and every tensor's bytes."""
        left_out = {"source", "model", "model_sha256"}
        if self.config.site == str(EMBEDDING):  # hashes are older than sites, and runs hold them
            left_out.add("site")
        described = {key: value for key, value in dataclasses.asdict(self.config).items() if key not in left_out}
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
    """Fill an SAE from named tensors of the shapes that `config` asks for; ValueError names the first that differs."""
    # Shapes alone: what a config claims is not allocated before its file is known to hold it.
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in SAE(config).state_dict().items()}
    found = {name: shape_of(tensor, f"SAE tensor {name!r} in {where}") for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys(), key=str):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"SAE tensor {name!r} in {where}: expected shape {expected.get(name)}, found {found.get(name)}"
            )
    sae = SAE(config)
    sae.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    sae = sae.eval().requires_grad_(False)
    check_sae(sae, where)
    return sae
