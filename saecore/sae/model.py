"""Sparse autoencoders on CLIP image embeddings.

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

Without a normaliser p is affine in x, and dp_j/dx = s E[:, j] whatever fires: relevance maps stand on that and need no
autograd here. With one, be it N or |x|, `read_outs` freezes it or takes its exact Jacobian. The soft cap comes after p, so
it changes no map. Normalising, centring and scaling happen in this file, once: callers pass raw embeddings. Everything is
float32, since in bfloat16 more than half of the images select other latents.

Left out: gated SAEs; reading files (`saecore.sae.checkpoints`); thresholds of BatchTopK (`saecore.sae.calibration`); MSAE's
own interface (`saecore.sae.msae`); gradients that training needs (`saecore.training.kernels`).

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

from saecore.sae.config import CARD, SAEConfig
from saecore.sae.sites import EMBEDDING

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "sae.safetensors"

LEAST_LENGTH = 1e-12
"""The length that stands in for that of an embedding of zeros."""

CHOSEN_AT_ONCE = 1 << 20
"""Pre-activations among which latents are chosen at once on a CPU, in whose caches their copies, of 4 MB each, stay."""

LAYER_NORM_EPS = 1e-5
"""Added to the standard deviation, not to the variance, and only on the way in, as the published SAEs do."""


class Code(NamedTuple):
    """Sparse code of B embeddings: for each, the latents that fire, strongest first, then those that are nearest to firing."""

    latents: Tensor
    """int64 (B, K)."""
    activations: Tensor
    """float32 (B, K): 0 for a latent that does not fire."""
    pre_activations: Tensor
    """float32 (B, K)."""

    def dense(self, n_latents: int) -> Tensor:
        """float32 (B, n): the activations of all latents, each in its place."""
        zeros = self.activations.new_zeros(len(self.activations), n_latents)
        return zeros.scatter(-1, self.latents, self.activations)


class Inputs(NamedTuple):
    """What the encoder sees of B embeddings, and the way back: x = length ((values * spread + shift) / s + m)."""

    values: Tensor
    """float32 (B, d): v."""
    shift: Tensor
    """float32 (B, 1)."""
    spread: Tensor
    """float32 (B, 1)."""
    length: Tensor
    """float32 (B, 1): |x| where the embedding is divided by it first, else 1."""
    gain: Tensor
    """float32 (B, 1): by how much a step along `SAE.directions` moves p, if norms are held constant."""


class SAE(nn.Module, ModelHubMixin, model_card_template=CARD, library_name="relevance-map-sae", license="mit"):
    """A sparse autoencoder, as the head of this file has it. `push_to_hub` and `from_pretrained` are huggingface_hub's."""

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
        # Transposed in memory: the weights of one latent lie side by side, as sparse gradients and read-outs want them.
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
        """What this SAE normalises of each sample, in words. Empty if nothing: then read-outs are the same for all images."""
        length = "l2" if self.config.unit_length else ""
        return ", ".join(filter(None, (length, self.config.normalise.replace("none", ""))))

    def length(self, x: Tensor) -> Tensor:
        """CLIP embeddings (B, d) -> (B, 1), by which each embedding is divided first: |x|, or 1."""
        if not self.config.unit_length:
            return torch.ones_like(x[:, :1], dtype=torch.float32)
        return torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).clamp(min=LEAST_LENGTH)

    def deviation(self, x: Tensor) -> Tensor:
        """CLIP embeddings (B, d) -> x - |x| m, or x - m: the part that a reconstruction has to explain."""
        return x.float() - self.length(x) * self.mean

    def standardise(self, x: Tensor) -> Tensor:
        """CLIP embeddings (B, d) -> u (B, d)."""
        return (x.float() / self.length(x) - self.mean) * self.scale

    def inputs(self, x: Tensor) -> Inputs:
        """CLIP embeddings (B, d) -> v, and what undoes the normalisation."""
        u, length = self.standardise(x), self.length(x)
        shift, spread = torch.zeros_like(u[:, :1]), torch.ones_like(u[:, :1])
        divisor = spread
        if self.config.normalise == "layer_norm":
            shift, spread = u.mean(-1, keepdim=True), u.std(-1, keepdim=True)
            divisor = spread + LAYER_NORM_EPS
        elif self.config.normalise == "constant_norm":
            divisor = spread = torch.linalg.vector_norm(u, dim=-1, keepdim=True) / self.config.n_inputs**0.5
        return Inputs((u - shift) / divisor, shift, spread, length, 1 / (divisor * length))

    def to_embedding(self, decoded: Tensor, x: Tensor | None) -> Tensor:
        """Decoder output (B, d) -> CLIP's space (B, d); `x`, the embeddings, are needed to undo a per-sample normaliser."""
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
        """The value that p (or |p|) of a latent that fires exceeds: a scalar or (n,); ValueError if it is not calibrated."""
        if self.threshold is None:
            return torch.zeros((), device=self.encoder.device)
        if torch.isnan(self.threshold).any():
            raise ValueError(
                "this BatchTopK SAE has no threshold, so which latents fire for an image would depend on the other images of "
                "its batch; calibrate it on embeddings first, with jobs.measure, which saves it with its threshold"
            )
        return self.threshold.clamp(min=0)

    def output(self, pre_activations: Tensor) -> Tensor:
        """The capped activations of latents that fire with these pre-activations."""
        out = pre_activations
        if self.config.output == "relu":
            out = out.clamp(min=0)
        elif self.config.output == "absolute":
            out = out.abs()
        cap = self.config.soft_cap
        return cap * torch.tanh(out / cap) if cap else out

    def encode_sparse(self, x: Tensor, at_least: int = 1) -> Code:
        """CLIP embeddings (B, d) -> the latents that fire, and how strongly.

        K is the SAE's k for topk, and for others the largest number of latents that fire for one of these images. It is at
        least `at_least`. Latents that do not fire follow in the order of their pre-activations. The latents of an image do
        not depend on its batch.
        """
        p = self.pre_activations(x)
        threshold = None if self.config.architecture == "topk" else self.firing_threshold()
        latents = self._strongest(p.detach(), threshold, at_least)
        listed = p.gather(-1, latents)
        if threshold is None:
            fires = torch.arange(latents.shape[1], device=p.device) < self.config.k
        else:
            fires = self._firing(listed, threshold[latents] if threshold.dim() else threshold)
        return Code(latents, self.output(listed) * fires, listed)

    def _firing(self, p: Tensor, threshold: Tensor) -> Tensor:
        """Which of these pre-activations are above their thresholds; bool, of the shape of p."""
        if not self.config.by_magnitude:
            return p > threshold
        firing = p.abs() > threshold
        return firing & (p > 0) if self.config.output == "relu" else firing

    def _strongest(self, p: Tensor, threshold: Tensor | None, at_least: int) -> Tensor:
        """Pre-activations (B, n) -> latents (B, K): those that fire, strongest first, then the others, likewise."""
        # Some rows at a time, all in the same `room`: copies of p as a whole took 2.2 times its own memory.
        rows = max(1, CHOSEN_AT_ONCE // self.config.n_latents if p.device.type == "cpu" else len(p))
        blocks, room, most = p.split(rows), torch.empty_like(p[:rows]), self.config.k
        if threshold is not None:
            counts = [room[: len(block)].copy_(self._firing(block, threshold)).sum(-1) for block in blocks]
            most = int(torch.cat(counts).amax()) if len(p) else 0
        latents = torch.empty(len(p), max(most, at_least), dtype=torch.int64, device=p.device)
        for block, chosen in zip(blocks, latents.split(rows), strict=True):
            strength, lowered = block, room[: len(block)]
            if self.config.by_magnitude:
                strength = block.abs()
            if threshold is not None:
                # Latents have thresholds of their own: one that does not fire may be stronger than one that does. So those
                # that do not fire are moved below all others, in their own order.
                torch.sub(strength, strength.amax(-1, keepdim=True), out=lowered).sub_(1)
                strength = torch.where(self._firing(block, threshold), strength, lowered, out=lowered)
            chosen.copy_(strength.topk(chosen.shape[1]).indices)
        return latents

    def decode_sparse(self, latents: Tensor, activations: Tensor, x: Tensor | None = None) -> Tensor:
        """Sparse code (B, K) -> reconstruction (B, d) in CLIP's space; `x` where samples are normalised, see `to_embedding`."""
        # embedding_bag sums weighted decoder rows without the (B, K, d) tensor that indexing would make.
        decoded = nn.functional.embedding_bag(latents, self.atoms, per_sample_weights=activations, mode="sum")
        return self.to_embedding(decoded + self.pre_bias, x)

    def reconstruct(self, x: Tensor) -> Tensor:
        """CLIP embeddings (B, d) -> their reconstructions by the latents that fire (B, d)."""
        code = self.encode_sparse(x)
        return self.decode_sparse(code.latents, code.activations, x)

    # ---- What relevance maps explain.

    def read_outs(self, latents: Tensor, x: Tensor | None = None, exact: bool = False) -> tuple[Tensor, Tensor]:
        """Latent ids (...) -> (w, c) with pre-activation = w . x + c; w is (..., d), c is (...).

        An SAE that normalises each sample has another w for each: give `x` (B, d) and ids (B, k). The equation still holds:
        w takes the sample's spread and length as constants or, if `exact`, is the true gradient.
        """
        rows, w = self.encoder.T[latents], self.directions(latents)
        if not self.normalises:
            offset = self.mean + self.pre_bias / self.scale
            return w, self.latent_bias[latents] - w @ offset
        if x is None:
            raise ValueError(f"this SAE normalises each sample ({self.normalises}): read-outs need the embeddings")
        seen, d = self.inputs(x), self.config.n_inputs
        v, spread = seen.values.unsqueeze(1), seen.spread.unsqueeze(1)
        along = rows @ v.mT  # (B, k, 1): E_j . v
        if exact and self.config.normalise == "layer_norm":  # d spread / du = v (spread + eps) / ((d - 1) spread)
            w = w - self.scale * along * v * (spread + LAYER_NORM_EPS) / ((d - 1) * spread)
        elif exact and self.config.normalise == "constant_norm":  # |v|^2 = d
            w = w - self.scale * along * v / d
        if exact and self.config.unit_length:  # dy/dx = (1 - y y') / |x|
            y = x.float().unsqueeze(1) / seen.length.unsqueeze(1)
            w = w - (w @ y.mT) * y
        w = w * seen.gain.unsqueeze(1)
        p = along.squeeze(-1) - rows @ self.pre_bias + self.latent_bias[latents]
        return w, p - (w * x.float().unsqueeze(1)).sum(-1)

    def directions(self, latents: Tensor) -> Tensor:
        """Latent ids (...) -> (..., d): dp/dx with norms held constant, but for the sample's gain (`Inputs.gain`)."""
        w = self.encoder.T[latents] * self.scale
        return w - w.mean(-1, keepdim=True) if self.config.normalise == "layer_norm" else w

    # ---- Files.

    def save(self, folder: str | Path) -> None:
        """Write `config.json`, `sae.safetensors` and a model card into `folder`, by huggingface_hub's `save_pretrained`."""
        self.save_pretrained(folder)

    def _save_pretrained(self, save_directory: Path) -> None:
        config = {"format": "relevance-map-sae", "version": 1, **dataclasses.asdict(self.config)}
        (save_directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(tensors, save_directory / WEIGHTS_FILE)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: Any = None, **options: Any) -> "SAE":
        from saecore.sae.checkpoints import load_folder  # which stands on this file

        if Path(model_id).is_dir():
            return load_folder(model_id)
        known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        options = {name: value for name, value in options.items() if name in known}
        files = [Path(hf_hub_download(model_id, name, **options)) for name in (CONFIG_FILE, WEIGHTS_FILE)]
        return load_folder(files[0].parent)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """The card that `save` and `push_to_hub` write. It says what the config says."""
        return super().generate_model_card(*args, description=self.config.in_words(), **kwargs)

    def describe(self) -> dict[str, Any]:
        """What a run's record says of this SAE: its config, and the threshold of a batchtopk SAE."""
        description = dataclasses.asdict(self.config)
        if self.config.architecture == "batchtopk":
            description["threshold"] = float(self.firing_threshold())
        return description

    def sha256(self) -> str:
        """Hash of everything that changes results: the config without its source and model, and every tensor's bytes."""
        left_out = {"source", "model", "model_sha256"}
        if self.config.site == str(EMBEDDING):  # configs had no site when the first runs recorded these hashes
            left_out.add("site")
        described = {key: value for key, value in dataclasses.asdict(self.config).items() if key not in left_out}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            # Rows at a time, since the encoder lies transposed in memory: a copy of it would be half of the SAE.
            for rows in tensor.split(64) if tensor.dim() else [tensor]:
                digest.update(rows.cpu().contiguous().numpy())
        return digest.hexdigest()
