"""Other people's SAEs, each converted once to our form, so that everything downstream knows only ours (`saecore.sae.model`).

    format                files                                        read
    saev                  sae.pt: a line of JSON, then a state dict    Relu, TopK, BatchTopK
    ViT-Prisma            config.json, n_images_*.pt                   relu, topk; layer_norm, constant_norm_rescale
    dictionary_learning   config.json, ae.pt                           AutoEncoder, AutoEncoderTopK, BatchTopKSAE,
                                                                       MatryoshkaBatchTopKSAE, JumpReluAutoEncoder
    SAELens               cfg.json, sae_weights.safetensors            standard, topk, jumprelu; its normalisers
    sparsify              cfg.json, sae.safetensors                    topk
    clipscope             one .pt: sizes and a state dict              topk, with negative activations

Conversion is exact, up to float32. The same tensor names mean different rules in different formats, so the format decides:
where the decoder's bias b is not taken off the input, c + bE is the latent bias; where activations are scaled by decoder
norms, encoder and decoder take them up. BatchTopK thresholds that were never calibrated stay NaN.

Readers say at which site an SAE reads (`saecore.sae.sites`) and of which model, as far as its files do, and nothing where
they do not: saev, clipscope, sparsify and sae-for-vlm say it in the names of folders only. What a training pipeline did to
activations before its SAE saw them is in none of these files.

Left out, and refused by name: gated, temporal, transcoders, group-max; pickled configs and whole modules (legacy ViT-Prisma,
patchSAE, overcomplete). SAEs that read the embedding, such as MSAE, are in `saecore.sae.embedding_formats`.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saecore.sae import hooks
from saecore.sae.config import SAEConfig
from saecore.untrusted import mapping, number, read_json, read_safetensors, read_torch, scalar, shape_of, shown, whole

Converted = tuple[SAEConfig, dict[str, Tensor]]
"""What `saecore.sae.checkpoints.from_tensors` takes; the site is empty where the files do not say it."""

# ---- Checking and converting.


def ask(config: Mapping[str, Any], key: str, where: str) -> Any:
    """`config[key]`, which must be there."""
    if not isinstance(config, Mapping) or config.get(key) is None:
        raise ValueError(f"{where}: expected a value for {key!r}, found none")
    return config[key]


def choose(what: str, value: Any, supported: Mapping[Any, str], where: str) -> str:
    """Our word for a format's `value`."""
    if not isinstance(value, str | bool | None) or value not in supported:
        raise ValueError(f"{where}: {what} {value!r} is not supported; supported: {', '.join(map(str, supported))}")
    return supported[value]


def take(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> list[Tensor]:
    """The tensors of exactly these names and shapes, in this order, in float64; ValueError names the first that differs."""
    stored = {
        name: shape_of(t, f"{where}: tensor {name!r}", weights=False) for name, t in mapping(state, where).items()
    }
    for name in sorted(shapes.keys() | stored.keys()):
        if shapes.get(name) != stored.get(name):
            wanted = f"shape {shapes[name]}" if name in shapes else "no such tensor"
            raise ValueError(f"{where}: tensor {name!r}: expected {wanted}, found {stored.get(name, 'none')}")
    for name in shapes:
        shape_of(state[name], f"{where}: tensor {name!r}")
    return [state[name].double() for name in shapes]


def convert(
    encoder: Tensor,
    latent_bias: Tensor,
    decoder: Tensor,
    bias: Tensor,
    *,
    threshold: Tensor | None = None,
    subtracts: bool = True,
    by_norm: bool = False,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Our tensors from an encoder (d, n), its bias (n,), a decoder (n, d) and its bias (d,).

    `subtracts`: whether the encoder sees x - bias. `by_norm`: whether pre-activations are multiplied by the norms of decoder
    rows, and activations divided by them again. `scale` multiplies x on the way in and divides it on the way out.
    """
    if not subtracts:
        latent_bias = latent_bias + bias @ encoder
    if by_norm:
        norms = torch.linalg.vector_norm(decoder, dim=-1).clamp(min=1e-12)  # rows of zeros stay so
        encoder, latent_bias, decoder = encoder * norms, latent_bias * norms, decoder / norms[:, None]
    tensors = {
        "encoder": encoder,
        "latent_bias": latent_bias,
        "decoder": decoder,
        "pre_bias": bias,
        "mean": torch.zeros_like(bias),
        "scale": torch.tensor(scale),
    }
    if threshold is not None:
        tensors["threshold"] = threshold
    return {name: tensor.float() for name, tensor in tensors.items()}


def w_shapes(d: int, n: int) -> dict[str, tuple[int, ...]]:
    """The names that most formats share. They say nothing about the rule."""
    return {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}


def calibrated(threshold: Any, where: str, least: float = 0.0) -> Tensor:
    """A stored BatchTopK threshold, or NaN where training never set it."""
    if isinstance(threshold, Tensor) and bool(threshold.isnan().all()):
        return torch.tensor(torch.nan)
    value = number(threshold, f"{where}: threshold")
    return torch.tensor(value if value >= least else torch.nan)


def group_ends(sizes: Any, what: str) -> tuple[int, ...]:
    """Where groups of these sizes end."""
    if not isinstance(sizes, Tensor) or sizes.ndim != 1 or not 0 < sizes.numel() <= MOST_GROUPS:
        raise ValueError(f"{what} is {shown(sizes)}, expected a list of whole numbers")
    return tuple(itertools.accumulate(whole(size, what) for size in sizes.tolist()))


MOST_GROUPS = 4096
"""Of a Matryoshka dictionary; published ones have up to ten."""


def _times(d: Any, factor: Any, what: str) -> int:
    """Latents as so many times the width; '12' * 4 is a text in Python."""
    return whole(d, "the width of the SAE") * whole(factor, what)


# ---- One reader a format: path -> what `from_tensors` takes.


def read_saev(path: Path) -> Converted:
    """saev's `sae.pt`. Only its oldest files, without a schema number, come from code that took the bias off the input."""
    if path.is_dir():
        path = path / "sae.pt"
    with path.open("rb") as file:
        line = file.readline(1 << 20)
    where = f"the first line of {path.name}"
    header = read_json(line, where)
    schema = header.get("schema")
    if schema not in (None, 2, 3, 4, 5):  # 1 was written by both codes
        raise ValueError(f"{path.name}: saev schema {schema!r} is not supported; supported: none, 2, 3, 4, 5")
    config = header if schema is None else ask(header, "cfg", where)
    d = ask(config, "d_model" if "d_model" in config else "d_vit", where)
    n = config["d_sae"] if "d_sae" in config else _times(d, ask(config, "exp_factor", where), f"exp_factor in {where}")
    activation = {"cls": "Relu"} if schema is None else ask(config, "activation", where)
    supported = {"Relu": "relu", "TopK": "topk", "BatchTopK": "batchtopk"}
    architecture = choose("saev activation", ask(activation, "cls", where), supported, path.name)
    k = 0 if architecture == "relu" else ask(ask(activation, "params", where), "top_k", where)
    state = read_torch(path, skip=len(line))
    threshold = None
    if architecture == "batchtopk":
        stored = state.pop("activation.threshold", torch.zeros(()))
        # it starts at 0, which is no threshold
        threshold = calibrated(stored, path.name, least=torch.finfo(torch.float32).tiny)
    tensors = convert(*take(state, w_shapes(d, n), path.name), threshold=threshold, subtracts=schema is None)
    output = "signed" if architecture == "topk" else "relu"  # its TopK knows no ReLU
    return SAEConfig(d, n, k, architecture, output, source=f"saev {path.name}", site=hooks.of_saev(path).site), tensors


NORMALISERS = {
    None: "none",
    "none": "none",
    False: "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}


def read_prisma(folder: Path) -> Converted:
    """ViT-Prisma's `config.json` and `n_images_*.pt`."""
    files = sorted(folder.glob("n_images_*.pt"))
    if len(files) != 1:
        raise ValueError(f"{folder}: expected one n_images_*.pt, found {len(files)}")
    where = f"{folder.name}/config.json"
    config = read_json((folder / "config.json").read_bytes(), where)
    choose("architecture", config.get("architecture", "standard"), {"standard": ""}, where)
    if config.get("is_transcoder"):
        raise ValueError(f"{where}: expected an autoencoder, found a transcoder")
    architecture = choose("activation_fn_str", ask(config, "activation_fn_str", where), PLAIN, where)
    k = ask(config.get("activation_fn_kwargs") or {}, "k", where) if architecture == "topk" else 0
    normalise = choose("normalize_activations", config.get("normalize_activations"), NORMALISERS, where)
    d, n = ask(config, "d_in", where), ask(config, "d_sae", where)
    tensors = convert(*take(read_torch(files[0]), w_shapes(d, n), files[0].name))
    site, model = hooks.of_prisma(config, where)
    source = f"ViT-Prisma {folder.name}"
    return SAEConfig(d, n, k, architecture, normalise=normalise, source=source, site=site, model=model), tensors


PLAIN = {"relu": "relu", "topk": "topk"}

DICTIONARIES = {
    "AutoEncoder": "relu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
    "MatroyshkaBatchTopKSAE": "batchtopk",  # its first spelling, which sae-for-vlm's files have
    "JumpReluAutoEncoder": "jumprelu",
}


def read_dictionary_checkpoint(folder: Path) -> Converted:
    """The same before its training ended: `checkpoints/ae_STEP.pt`, one of them, as sae-for-vlm publishes them."""
    files = sorted(folder.glob("checkpoints/ae_*.pt"))
    if len(files) != 1:
        raise ValueError(f"{folder}: expected one checkpoints/ae_*.pt, found {len(files)}; give the file that you want")
    return read_dictionary_learning(folder, files[0])


def read_dictionary_learning(folder: Path, weights_file: Path | None = None) -> Converted:
    """dictionary_learning's `config.json` and `ae.pt`, or a file of weights that is called otherwise."""
    path = weights_file or folder / "ae.pt"
    where = f"{folder.name}/config.json"
    trainer = ask(read_json((folder / "config.json").read_bytes(), where), "trainer", where)
    name = ask(trainer, "dict_class", where)
    architecture = choose("dict_class", name, DICTIONARIES, where)
    has_groups = name in ("MatryoshkaBatchTopKSAE", "MatroyshkaBatchTopKSAE")
    if "transcoder" in str(trainer.get("trainer_class")).lower():
        raise ValueError(f"{where}: expected an autoencoder, found one trained by {trainer['trainer_class']}")
    d, n = ask(trainer, "activation_dim", where), ask(trainer, "dict_size", where)
    state = read_torch(path)
    file = f"{folder.name}/{path.relative_to(folder)}"
    k, stored, nested = 0, torch.tensor(-1.0), tuple[int, ...]()
    if architecture in ("topk", "batchtopk"):
        k = whole(scalar(ask(state, "k", file)), f"{file}: k")
        if k != trainer.get("k", k):
            raise ValueError(f"{where} says k = {trainer['k']}, {file} says {k}")
        state.pop("k")
        stored = state.pop("threshold", stored)
    if has_groups:
        nested = group_ends(ask(state, "group_sizes", file), f"{file}: group_sizes")
        if nested[-1:] != (n,):
            raise ValueError(f"{file}: expected group sizes that sum to {n} latents, found {sum(nested[-1:])}")
        state.pop("group_sizes")
    if architecture == "jumprelu":
        *weights, threshold = take(state, w_shapes(d, n) | {"threshold": (n,)}, file)
        norms = torch.linalg.vector_norm(weights[2], dim=-1)
        if not torch.allclose(norms, torch.ones_like(norms), atol=1e-3):
            raise ValueError(
                f"{file}: expected decoder rows of norm 1, found {float(norms.min()):.3g} to {float(norms.max()):.3g}: "
                "versions of JumpReluAutoEncoder disagree on whether activations are multiplied by it"
            )
        tensors = convert(*weights, threshold=threshold, subtracts=False)
    elif has_groups:
        tensors = convert(*take(state, w_shapes(d, n), file), threshold=calibrated(stored, file))
    else:  # two nn.Linear: both weights are transposed
        shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n)}
        shapes |= {"bias" if name == "AutoEncoder" else "b_dec": (d,)}
        encoder, latent_bias, decoder, bias = take(state, shapes, file)
        # AutoEncoderTopK stores one, but keeps k
        kept = calibrated(stored, file) if architecture == "batchtopk" else None
        tensors = convert(encoder.T, latent_bias, decoder.T, bias, threshold=kept)
    nesting, source = "prefixes" if nested else "none", f"dictionary_learning {folder.name}"
    site, model = hooks.of_dictionary(trainer, where, folder)
    config = SAEConfig(d, n, k, architecture, nesting=nesting, nested=nested, source=source, site=site, model=model)
    return config, tensors


def read_saelens(folder: Path) -> Converted:
    """SAELens' `cfg.json` and `sae_weights.safetensors`, of versions before and after 6.0."""
    where = f"{folder.name}/cfg.json"
    config = read_json((folder / "cfg.json").read_bytes(), where)
    supported = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
    architecture = choose("architecture", config.get("architecture", "standard"), supported, where)
    function = config.get("activation_fn", config.get("activation_fn_str")) or "relu"
    if architecture == "relu":  # before 6.0 a TopK SAE was a "standard" one with another function: as ReLU, L0 explodes
        architecture = choose("activation_fn", function, PLAIN, where)
    k = 0
    if architecture == "topk":
        k = ask(config if "k" in config else config.get("activation_fn_kwargs") or {}, "k", where)
    metadata = {**config, **mapping(config.get("metadata") or {}, f"metadata in {where}")}
    hook, hook_out = metadata.get("hook_name"), metadata.get("hook_name_out")
    if hook_out not in (None, hook):
        raise ValueError(f"{where}: expected an autoencoder, found one from {hook} to {hook_out}")
    site, model = hooks.of_saelens(metadata, where)
    normaliser, scale = config.get("normalize_activations"), 1.0
    if normaliser in ("expected_average_only_in", True):
        normaliser, scale = "none", _saelens_scale(folder, where)
    normalise = choose("normalize_activations", normaliser, NORMALISERS, where)
    d, n = ask(config, "d_in", where), ask(config, "d_sae", where)
    state = read_safetensors(folder / "sae_weights.safetensors")
    if "scaling_factor" in state and bool((state["scaling_factor"] == 1).all()):  # written for a while, never used
        del state["scaling_factor"]
    shapes = w_shapes(d, n) | ({"threshold": (n,)} if architecture == "jumprelu" else {})
    weights = take(state, shapes, f"{folder.name}/sae_weights.safetensors")
    tensors = convert(
        *weights[:4],
        threshold=weights[4] if architecture == "jumprelu" else None,
        subtracts=config.get("apply_b_dec_to_input", True),
        by_norm=architecture == "topk" and config.get("rescale_acts_by_decoder_norm", False),
        scale=scale,
    )
    source = f"SAELens {folder.name}"
    return SAEConfig(d, n, k, architecture, normalise=normalise, source=source, site=site, model=model), tensors


def _saelens_scale(folder: Path, where: str) -> float:
    file = folder / "activation_scaler.json"
    factor = read_json(file.read_bytes(), file.name).get("scaling_factor") if file.is_file() else None
    if factor is None:
        raise ValueError(
            f"{where}: normalize_activations is expected_average_only_in, so expected the scaling factor of its training "
            f"data in {file.name}, found none"
        )
    return number(factor, f"scaling_factor in {file.name}")


def read_sparsify(folder: Path) -> Converted:
    """sparsify's `cfg.json` and `sae.safetensors`."""
    where = f"{folder.name}/cfg.json"
    config = read_json((folder / "cfg.json").read_bytes(), where)
    choose("activation", config.get("activation", "topk"), {"topk": "topk"}, where)
    if config.get("transcode") or config.get("signed"):
        raise ValueError(f"{where}: expected an unsigned autoencoder, found transcode or signed set")
    d, k = ask(config, "d_in", where), ask(config, "k", where)
    factor = f"expansion_factor in {where}"
    n = config.get("num_latents") or _times(d, ask(config, "expansion_factor", where), factor)
    state = read_safetensors(folder / "sae.safetensors")
    if bool(state.pop("W_skip", torch.zeros(())).any()):
        raise ValueError(f"{folder}: expected an autoencoder, found a skip connection (W_skip)")
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "W_dec": (n, d), "b_dec": (d,)}
    encoder, *others = take(state, shapes, f"{folder.name}/sae.safetensors")
    tensors = convert(encoder.T, *others)
    return SAEConfig(d, n, k, "topk", source=f"sparsify {folder.name}", site=hooks.of_sparsify(folder).site), tensors


def read_clipscope(path: Path, content: Mapping[str, Any]) -> Converted:
    """clipscope's checkpoint, already read: a top-k without ReLU, without latent biases; its folder names the layer."""
    d, n, k = (ask(content, key, path.name) for key in ("d_in", "n_features", "k"))
    shapes = {"enc": (d, n), "dec": (n, d), "pre_b": (d,)}
    encoder, decoder, bias = take(ask(content, "model_state_dict", path.name), shapes, path.name)
    tensors = convert(encoder, torch.zeros(encoder.shape[1]), decoder, bias)
    site = hooks.of_clipscope(path).site
    return SAEConfig(d, n, k, "topk", "signed", source=f"clipscope {path.name}", site=site), tensors


FOLDERS = {
    "SAELens": (("cfg.json", "sae_weights.safetensors"), read_saelens),
    "sparsify": (("cfg.json", "sae.safetensors"), read_sparsify),
    "dictionary_learning": (("config.json", "ae.pt"), read_dictionary_learning),
    "dictionary_learning's checkpoints": (("config.json", "checkpoints/ae_*.pt"), read_dictionary_checkpoint),
    "ViT-Prisma": (("config.json", "n_images_*.pt"), read_prisma),
    "saev": (("sae.pt",), read_saev),
}
"""What makes a folder one of a format, and its reader."""
