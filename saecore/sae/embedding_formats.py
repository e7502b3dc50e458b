"""Other people's SAEs that were trained on CLIP's final embedding, each converted once to our form like those of `formats`.

    format        files                                                   rule
    SEM           MSAE_{model}_{d}_{n}_{k}x{k}_{weighting}.pth            TopK at nested k, ReLU; one bias, off and on again
    DN-CBM        clip_{model}_sparse_autoencoder_final.pt                ReLU; one bias, off and on again
    TopKSAE       config.json, model.safetensors (PyTorchModelHubMixin)   TopK without ReLU; decoder rows of length 1

SEM (Guimard et al. 2026, arXiv:2603.19028) and DN-CBM (Rao et al. 2024, arXiv:2407.14499) read the embedding as CLIP's
`encode_image` gives it. SEM's scripts keep all positive pre-activations, whatever k the SAE was trained at; here its first
level fires, as of MSAE.

TopKSAE is the class of `lasgroup/clip-topk-sae` (arXiv:2509.24510). Its config names no site. That repository's was trained on
L2-normalised embeddings of CLIP B/16, as its authors' code shows: `--site embedding:l2`.

Left out: files of the library under DN-CBM (`sparse_autoencoder` of ai-safety-foundation) for several components at once.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saecore.sae.config import MOST_INPUTS, SAEConfig
from saecore.sae.formats import Converted, ask, convert, take, w_shapes
from saecore.untrusted import mapping, read_json, read_safetensors, shape_of, whole

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
