"""Other people's SAEs on CLIP's final embedding, each converted once to our form, as in `saecore.sae.formats`.

    format        files                                                   rule
    MSAE          {n}_{d}_{rule}_..._{data}.pth                           TopK, BatchTopK, ReLU or JumpReLU, by its name
    SEM           MSAE_{model}_{d}_{n}_{k}x{k}_{weighting}.pth            TopK at nested k, ReLU; one bias, off and on again
    DN-CBM        clip_{model}_sparse_autoencoder_final.pt                ReLU; one bias, off and on again
    TopKSAE       config.json, model.safetensors (PyTorchModelHubMixin)   TopK without ReLU; decoder rows of length 1

MSAE (Zaigrajew et al. 2025, arXiv:2502.20578), SEM (Guimard et al. 2026, arXiv:2603.19028) and DN-CBM (Rao et al. 2024,
arXiv:2407.14499) read the embedding as CLIP's `encode_image` gives it.

The configuration of an MSAE file is its name. If the file was renamed, a JSON file of the same folder, FILE.pth.json, has to
give the fields of `SAEConfig`. SEM's scripts keep all positive pre-activations, whatever k the SAE was trained at. Here the
first level of SEM fires, as that of MSAE does.

TopKSAE is the class of `lasgroup/clip-topk-sae` (arXiv:2509.24510). Its config names no site. The SAE in that repository was
trained on L2-normalised embeddings of CLIP B/16, as its authors' code shows: its site is `embedding:l2`.

Left out: MSAE's nested levels after the first, and their loss weights, which neither the file nor its name holds; files of
the library under DN-CBM (`sparse_autoencoder` of ai-safety-foundation) for several components at once.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saecore.sae.config import MOST_INPUTS, SAEConfig, from_fields
from saecore.sae.formats import Converted, ask, convert, take, w_shapes
from saecore.untrusted import mapping, number, read_json, read_json_file, read_safetensors, shape_of, whole

# n_d_activation[_k or sparsity weight][_weighting]_tied_normalize_softcap[_data]: fields that the tensors do not hold. At
# inference a Matryoshka file (weighting UW or RW) is a TopK SAE whose k is the first nested level.
_MSAE_NAME = re.compile(
    r"(?P<n>\d+)_(?P<d>\d+)_"
    r"((?P<topk>(Batch)?TopK(abs)?(ReLU)?)_(?P<k>\d+)(_(?P<weighting>UW|RW))?|(?P<relu>(Jump)?ReLU)(_\d+)?)"
    r"_(?P<tied>True|False)_(?P<normalize>True|False)_(?P<soft_cap>\d+(\.\d+)?)(_(?P<data>.*))?"
)

# dataset_model_split_kind_rows_width of the embeddings that the SAE was trained on, with the model as ViT-L~14.
_MSAE_DATA = re.compile(r".+_(?P<model>[^_]+)_[^_]+_(?:image|text)_\d+_\d+")


def read_msae(path: Path, content: dict[str, Any]) -> Converted:
    """MSAE's checkpoint, already read; its configuration is in its name, or in a JSON file of the same folder."""
    missing = {"model", "mean_center", "scaling_factor"} - content.keys()
    if missing:
        raise ValueError(
            f"{path.name} lacks {', '.join(sorted(missing))}: not an MSAE checkpoint, nor a single file of another format "
            "that is read; if a config.json in the same folder describes it, give the folder"
        )
    spec = Path(f"{path}.json")
    config = _msae_spec(spec) if spec.is_file() else _msae_name(path)
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
    # The stored number, never recomputed: two definitions of it are in circulation, with and without a square root.
    tensors["scale"] = torch.tensor(number(content["scaling_factor"], f"scaling_factor in {path.name}"))
    return config, tensors


def _msae_name(path: Path) -> SAEConfig:
    name = _MSAE_NAME.fullmatch(path.stem)
    if name is None:
        raise ValueError(
            f"{path.name} is not named like an MSAE checkpoint (LATENTS_WIDTH_TopKReLU_K_..._...): the name is the "
            f"configuration, so a renamed file needs {path.name}.json beside it, with n_inputs, n_latents, k, architecture"
        )
    data = _MSAE_DATA.fullmatch(name["data"] or "")
    activation = name["topk"] or name["relu"]
    architecture = {"ReLU": "relu", "JumpReLU": "jumprelu"}.get(activation)
    by_magnitude = "abs" in activation
    output = "relu" if activation.endswith("ReLU") else "signed"
    if architecture is None:
        architecture = "batchtopk" if activation.startswith("Batch") else "topk"
        # TopK gives |p|; BatchTopK selects by |p| but keeps the sign.
        if by_magnitude and architecture == "topk":
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


def _msae_spec(path: Path) -> SAEConfig:
    return from_fields({"source": f"MSAE checkpoint {path.stem}", **read_json_file(path)}, path.name)


_SEM_NAME = re.compile(r"MSAE_(?P<model>[^_]+)_(?P<d>\d+)_(?P<n>\d+)_(?P<levels>\d+(?:x\d+)*)_[a-z]+")


def read_sem(path: Path, state: Mapping[str, Any]) -> Converted:
    """SEM's state dict, already read; its nested levels are in its name alone."""
    name = _SEM_NAME.fullmatch(path.stem)
    if name is None:
        raise ValueError(
            f"{path.name} holds the tensors of an SEM checkpoint, whose name says at which k it was trained: expected "
            "MSAE_MODEL_WIDTH_LATENTS_KxK_WEIGHTING.pth"
        )
    d, n = int(name["d"]), int(name["n"])
    levels = tuple(int(level) for level in name["levels"].split("x"))
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "bpre": (d,)}
    encoder, latent_bias, decoder, bias = take(state, shapes, path.name)
    tensors = convert(encoder.T, latent_bias, decoder.T, bias)
    source = f"SEM {path.name}"
    config = SAEConfig(d, n, levels[0], nesting="levels", nested=levels, source=source, model=name["model"])
    return config, tensors


# The library writes its parameters with and without an underscore, by version, and the tied bias under three names.
_TIED = ("tied_bias", "pre_encoder_bias._bias_reference", "post_decoder_bias._bias_reference")
_DNCBM_NAME = re.compile(r"clip_(?P<model>.+)_sparse_autoencoder_final")


def read_dncbm(path: Path, content: Mapping[str, Any]) -> Converted:
    """DN-CBM's state dict, already read. A file that lost DN-CBM's name may be any SAE of its library: it names no site."""
    state = {
        re.sub(r"^(encoder|decoder)\._", r"\1.", name): _one(tensor, name, path)
        for name, tensor in mapping(content, path.name).items()
    }
    biases = [state.pop(name) for name in _TIED if name in state]
    if not all(torch.equal(biases[0], other) for other in biases):
        raise ValueError(f"{path.name}: expected equal copies of tied_bias, found some that differ")
    encoder = state.get("encoder.weight")
    if encoder is None or encoder.ndim != 2:
        raise ValueError(f"{path.name}: tensor 'encoder.weight': expected a matrix, found none")
    n, d = encoder.shape
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "tied_bias": (d,)}
    weight, latent_bias, decoder, bias = take(state | {"tied_bias": biases[0]}, shapes, path.name)
    tensors = convert(weight.T, latent_bias, decoder.T, bias)
    name = _DNCBM_NAME.fullmatch(path.stem)
    site, model = ("embedding", re.sub("[_:]", "/", name["model"])) if name else ("", "")
    return SAEConfig(d, n, architecture="relu", source=f"DN-CBM {path.name}", site=site, model=model), tensors


def _one(tensor: Any, name: str, path: Path) -> Tensor:
    """A tensor without the axis over components, of which there must be one."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path.name}: {name!r}: expected a tensor, found a {type(tensor).__name__}")
    shape_of(tensor, f"{path.name}: tensor {name!r}", weights=False)
    axes = 1 if "bias" in name else 2
    if tensor.ndim == axes + 1 and tensor.shape[0] != 1:
        raise ValueError(f"{path.name}: tensor {name!r}: expected one component, found {tensor.shape[0]}")
    return tensor[0] if tensor.ndim == axes + 1 else tensor


def read_topk_sae(folder: Path) -> Converted:
    """TopKSAE's `config.json` and `model.safetensors`."""
    where, file = f"{folder.name}/config.json", f"{folder.name}/model.safetensors"
    config = read_json((folder / "config.json").read_bytes(), where)
    if not {"input_dim", "hidden_dim", "k"} <= config.keys():
        raise ValueError(
            f"{where}: expected input_dim, hidden_dim and k, which describe a TopKSAE; this is another model"
        )
    d, n, k = (ask(config, key, where) for key in ("input_dim", "hidden_dim", "k"))
    state = read_safetensors(folder / "model.safetensors")
    for counter in ("feature_counts", "total_samples"):
        state.pop(counter, None)
    if config.get("decoder_bias") is False:
        state["b_dec"] = torch.zeros(whole(d, f"input_dim in {where}", most=MOST_INPUTS))
    encoder, latent_bias, decoder, bias = take(state, w_shapes(d, n), file)
    if config.get("normalize_decoder", True):
        decoder = normalize(decoder, dim=-1)
    tensors = convert(encoder, latent_bias, decoder, bias, subtracts=False)
    return SAEConfig(d, n, k, "topk", "signed", source=f"TopKSAE {folder.name}", site=""), tensors


FOLDERS = {"TopKSAE": (("config.json", "model.safetensors"), read_topk_sae)}
"""What makes a folder one of a format, and its reader."""
