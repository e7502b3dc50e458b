"""Where other people's files say that their SAE reads, and of which model: hook names, modules and folders to a `Site`.

    blocks.10.hook_resid_post, layers.10, resid_post_layer_10      layer10.residual
    blocks.10.hook_resid_pre                                       layer9.residual: what goes into a layer left the one before
    blocks.3.hook_mlp_out, layers.3.mlp                            layer3.mlp
    blocks.3.attn.hook_z, layers.3.attention                       no place that has a name here: refused
    22_resid, layers.3.mlp, layer_23/RUN                           folders of clipscope, sparsify, saev
    DATA_activations_MODEL_22_post_mlp_residual_RULE/trainer_0     folder of sae-for-vlm; -1_post_projection is the embedding

What a file leaves empty it does not say: each function then gives less of a site, or none.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from saecore.sae import sites
from saecore.sae.sites import Site


class Place(NamedTuple):
    """What a file says, empty where it does not."""

    site: str = ""
    """In the text form of `saecore.sae.sites`."""
    model: str = ""
    """The model's name, as it stands there."""


_HOOK = re.compile(r"(?:.*\.)?(?:blocks|resblocks|layers?|h)\.(?P<layer>\d+)(?:\.(?P<rest>.+))?")
_SUBMODULE = re.compile(r"(?P<rest>[a-z_]+?)_layer_?(?P<layer>\d+)")
_PARTS = {
    **dict.fromkeys(("", "output", "resid", "resid_post", "hook_resid_post"), "residual"),
    **dict.fromkeys(("mlp", "mlp_out", "hook_mlp_out"), "mlp"),
}
"""What may follow the layer in a name, and which part of the layer it is."""


def of_hook(name: str, where: str, tokens: str = "") -> str:
    """The site that the name of a hook, or of a module, stands for; ValueError if that is a place without a name here."""
    if name in ("embedding", "embedding:l2"):
        return name
    match = _HOOK.fullmatch(name) or _SUBMODULE.fullmatch(name)
    if match is not None:
        layer, rest = int(match["layer"]), match["rest"] or ""
        if rest.removeprefix("hook_") == "resid_pre" and layer:
            layer, rest = layer - 1, "resid"
        if rest in _PARTS:
            return str(Site(layer, _PARTS[rest], tokens))
    raise ValueError(
        f"{where} says that its SAE reads {name!r}, a place that has no name here; a site is {sites.GRAMMAR}"
    )


def of_prisma(config: Mapping[str, Any], where: str) -> Place:
    """ViT-Prisma's config. Its `cached_activations_path` names other layers in published files, and is not read."""
    layer, kind = config.get("hook_point_layer"), _text(config, "layer_subtype")
    hook = f"blocks.{layer}.{kind}" if layer is not None and kind else _text(config, "hook_point")
    cls, patches = config.get("cls_token_only"), config.get("use_patches_only")
    if cls and patches:
        raise ValueError(f"{where}: expected one of cls_token_only and use_patches_only at most, found both set")
    tokens = "cls" if cls else "patches" if patches else "all"
    return Place(of_hook(hook, where, tokens) if hook else _of_layer(layer), _text(config, "model_name"))


def of_saelens(metadata: Mapping[str, Any], where: str) -> Place:
    """SAELens' config and its metadata in one. In old versions `hook_name` was `hook_point`. It does not say which tokens."""
    hook = _text(metadata, "hook_name") or _text(metadata, "hook_point")
    site = of_hook(hook, where) if hook else _of_layer(metadata.get("hook_layer"))
    return Place(site, _text(metadata, "model_name"))


_ACTIVATIONS = re.compile(
    r".+_activations_(?P<model>.+)_(?:(?P<layer>\d+)_post_mlp_residual|-?\d+_post_projection)(?:_.+)?"
)
"""What sae-for-vlm calls activations, and the folder of an SAE that was trained on them."""


def of_dictionary(trainer: Mapping[str, Any], where: str, folder: Path) -> Place:
    """dictionary_learning's trainer. sae-for-vlm leaves its three names empty, and names the folder around it instead."""
    module, model = _text(trainer, "submodule_name"), _text(trainer, "lm_name")
    site = of_hook(module, where) if module else _of_layer(trainer.get("layer"))
    named = None if site else _ACTIVATIONS.fullmatch(named_path(folder).parent.name)
    if named is not None:
        at = sites.EMBEDDING if named["layer"] is None else Site(int(named["layer"]), "residual")
        site, model = str(at), model or named["model"]
    return Place(site, model)


def of_sparsify(folder: Path) -> Place:
    """sparsify makes a folder for each hook point, such as layers.3 or layers.3.mlp."""
    name = named_path(folder).name
    return Place(of_hook(name, f"the folder {name}") if re.search(r"(^|\.)(layers|h)\.\d", name) else "")


def of_clipscope(path: Path) -> Place:
    """clipscope's folders are called 22_resid: the hook is on the whole of that layer."""
    layer = re.fullmatch(r"(\d+)_resid", named_path(path).parent.name)
    return Place(str(Site(int(layer[1]), "residual")) if layer else "")


def of_saev(path: Path) -> Place:
    """saev's repositories of many SAEs have layer_23/RUN/sae.pt; those of one SAE say nothing."""
    layer = re.fullmatch(r"layer_(\d+)", named_path(path).parent.parent.name)
    return Place(_of_layer(int(layer[1])) if layer else "")


def named_path(path: Path) -> Path:
    """The path in full, with its own names: a file in the cache of the Hub is a link to one whose folder is called blobs."""
    return Path(os.path.abspath(path))


def _of_layer(layer: Any) -> str:
    """Of a file that names a layer and no more."""
    return str(Site(layer)) if isinstance(layer, int) and not isinstance(layer, bool) else ""


def _text(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key)
    return value if isinstance(value, str) else ""
