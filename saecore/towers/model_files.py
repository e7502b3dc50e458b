"""Check the files of a CLIP or SigLIP model in transformers' format before transformers builds anything from them.

transformers makes the layers and sizes that config.json claims, one after the other, and only then compares them with the
weights. Here the claims are first compared with the shapes in the headers of the weights. So a model that does not fit is
refused at once, and no more is ever allocated than the files hold.

Left out: addresses (`saecore.hub`), whether the weights compute anything (`saecore.towers.soundness`).
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel

from saecore.hub import WEIGHTS
from saecore.untrusted import mapping, number, read_json_file, shown, stored_shapes, whole

Shapes = Mapping[str, tuple[int, ...]]

CONFIG_FILE = "config.json"

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "projection_dim",
    "vocab_size",
    "max_position_embeddings",
)
"""The numbers of a config from which sizes are computed."""

_FOREIGN = ("quantization_config", "auto_map", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation")
"""Fields of a config that say how a model is to be loaded. They are ignored: there is one way here."""


def read_fields(folder: Path) -> dict[str, Any]:
    """The content of config.json, with a `model_type` in it."""
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"no {CONFIG_FILE} in {folder}, so it is no model in transformers' format")
    fields = read_json_file(folder / CONFIG_FILE)
    if not isinstance(fields.get("model_type"), str):
        raise ValueError(f"{CONFIG_FILE} says model_type {shown(fields.get('model_type'))}, expected a name")
    return fields


def read_config(half: type[PreTrainedModel], fields: Mapping[str, Any]) -> PretrainedConfig:
    """transformers' config of one half of a model: its section of config.json, or all of it where that is its own."""
    kind = half.config_class
    of, where = fields, CONFIG_FILE
    if fields["model_type"] != kind.model_type:
        where = f"{kind.base_config_key} in {CONFIG_FILE}"
        of = mapping(fields.get(kind.base_config_key) or {}, where)  # without one it is transformers' default
    for name in _SIZES:
        if of.get(name) is not None:
            whole(of[name], f"{name} of {where}")
    if of is not fields and fields.get("projection_dim") is not None:
        # The whole model's number counts, as in CLIPModel: the sections of LAION's L/14 and bigG say 512, which is wrong.
        of = {**of, "projection_dim": whole(fields["projection_dim"], f"projection_dim of {CONFIG_FILE}")}
    try:
        config = kind.from_dict({name: value for name, value in of.items() if name not in _FOREIGN})
    except Exception as error:  # transformers' checks have exceptions of their own, and anything may pass them
        raise ValueError(f"{where} is not what {kind.__name__} takes: {type(error).__name__}: {error}") from error
    activation = getattr(config, "hidden_act", None)
    if activation not in transformers.activations.ACT2FN:
        raise ValueError(f"hidden_act of {where} is {shown(activation)}, which transformers does not know")
    if not 0 < number(config.layer_norm_eps, f"layer_norm_eps of {where}") < 1:
        raise ValueError(f"layer_norm_eps of {where} is {config.layer_norm_eps}, expected a number between 0 and 1")
    return config


def check_weights(folder: Path, half: type[PreTrainedModel], config: PretrainedConfig) -> str:
    """The name of the file of weights; ValueError if they are not of the layers and shapes that `config` asks for."""
    name, shapes = read_shapes(folder)
    own = {"vision_config": "vision_model", "text_config": "text_model"}[half.config_class.base_config_key]
    layers = _n_layers(shapes, own)
    if config.num_hidden_layers != layers:  # before the build below: of a million layers that takes a minute
        raise ValueError(f"{CONFIG_FILE} claims {config.num_hidden_layers:,} layers, {name} holds {layers:,} of {own}")
    try:
        with torch.device("meta"):  # shapes without numbers
            asked = {name: tuple(tensor.shape) for name, tensor in half(config).named_parameters()}
    except (RuntimeError, ArithmeticError, ValueError, TypeError) as error:  # sizes that overflow, or do not divide
        raise ValueError(f"{CONFIG_FILE} describes no model: {error}") from error
    held = {_plain(key, own): shape for key, shape in shapes.items()}
    for key, shape in asked.items():
        if (stored := held.get(_plain(key, own), shape)) != shape:
            raise ValueError(f"{CONFIG_FILE} asks for {key} of shape {shape}, {name} holds it in shape {stored}")
    lacks = [key for key in asked if _plain(key, own) not in held]
    if lacks:
        more = f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""
        raise ValueError(f"{name} lacks the weights {', '.join(lacks[:3])}{more}, of which its embedding is made")
    return name


def read_shapes(folder: Path) -> tuple[str, Shapes]:
    """The name of the file of weights in `folder`, or of their index, and their shapes; ValueError if there are none."""
    for weights in WEIGHTS:
        if (folder / weights).is_file():
            return weights, stored_shapes(folder / weights)
        if (folder / f"{weights}.index.json").is_file():
            return f"{weights}.index.json", _indexed(folder, f"{weights}.index.json")
    raise ValueError(f"no weights in {folder}: expected {' or '.join(WEIGHTS)}")


def load(half: type[PreTrainedModel], folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    """One half of a model, whose files were checked, in float32; ValueError if it still cannot be loaded."""
    try:
        with _quietly():
            model, report = half.from_pretrained(
                folder, config=config, attn_implementation="sdpa", dtype=torch.float32, output_loading_info=True
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"its weights cannot be loaded: {error}") from error
    if report["missing_keys"]:
        raise ValueError(
            f"it lacks the weights {', '.join(sorted(report['missing_keys']))}, of which its embedding is made"
        )
    return model


@contextmanager
def _quietly() -> Iterator[None]:
    """Inside, transformers is silent: it would list the weights of the other half as not expected. Then its settings are
    restored."""
    logging = transformers.utils.logging
    level, bars, downloads = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # this enables huggingface_hub's too, which the caller may have switched off
            if not downloads:
                disable_progress_bars()


def _indexed(folder: Path, name: str) -> Shapes:
    """The shapes in all files that an index names; ValueError for a file in another folder."""
    files = set(mapping(read_json_file(folder / name).get("weight_map"), f"weight_map in {name}").values())
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
            raise ValueError(f"{name} names {shown(file)}, expected a file in the same folder")
        shapes |= stored_shapes(folder / file)
    return shapes


def _plain(name: str, own: str) -> str:
    """A weight's name without its prefix: versions of transformers, and whole and half models, differ in that."""
    return re.sub(rf"^(clip\.|siglip\.|model\.)?({own}\.)?", "", name)


def _n_layers(shapes: Shapes, own: str) -> int:
    """How many layers this half has."""
    pattern = re.compile(r"(?:^|\.)(?:(\w+_model)\.)?encoder\.layers\.(\d+)\.")
    matches = [match for match in map(pattern.search, shapes) if match and match[1] in (None, own)]
    return len({match[2] for match in matches})
