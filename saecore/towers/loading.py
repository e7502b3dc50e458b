"""Load image and text towers by address: a Hub id, a folder, or `demo`.

    address -> folder (`saecore.hub`) -> its files checked (`model_files`) -> tower -> its values checked (`soundness`)

A model has two halves, an image and a text tower, and each is loaded without the other. Errors are ValueErrors of one sentence
that begins with the address, for whatever a user can get wrong: no such model, a kind that is not supported, weights that are
missing or damaged.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import (
    AutoTokenizer,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    SiglipTextModel,
    SiglipVisionModel,
)

from saecore import hub
from saecore.images.preprocess import load_preprocess
from saecore.towers import model_files
from saecore.towers.clip import ClipTower
from saecore.towers.siglip import SiglipTower
from saecore.towers.soundness import check_images, check_texts
from saecore.towers.text import TextTower
from saecore.towers.tower import ImageTower
from saecore.untrusted import about, read_json_file

Half = TypeVar("Half")

Halves = dict[str, tuple[type[PreTrainedModel], Callable[[Any, Any], Half]]]
"""By transformers' type of the whole model: its class for one half, and what takes that and the preparation of its input."""


def load_tower(address: str, revision: str | None = None) -> ImageTower:
    """The image tower of a model, in float32 on the CPU."""
    halves: Halves[ImageTower] = {
        "clip": (CLIPVisionModelWithProjection, ClipTower),
        "siglip": (SiglipVisionModel, SiglipTower),
    }
    return _load_half(halves, load_preprocess, check_images, address, revision)


def load_text_tower(address: str, revision: str | None = None) -> TextTower:
    """The text tower of a model, in float32 on the CPU."""
    halves: Halves[TextTower] = {
        "clip": (CLIPTextModelWithProjection, TextTower),
        "siglip": (SiglipTextModel, TextTower),
    }
    return _load_half(halves, _load_tokenizer, check_texts, address, revision)


def _load_half(
    halves: Halves[Half],
    load_input: Callable[[str], Any],
    check: Callable[[Half, str], None],
    address: str,
    revision: str | None,
) -> Half:
    """One half of a model with its projection, over what prepares its input, which `load_input` reads from the folder."""
    with about(address):
        folder = hub.model_folder(address, revision)
        fields = model_files.read_fields(folder)
        kind = fields["model_type"]
        supported = [pair for name, pair in halves.items() if kind in (name, pair[0].config_class.model_type)]
        if not supported:
            raise ValueError(
                f"{model_files.CONFIG_FILE} describes a {kind!r} model; supported are CLIP with a CLS token (type 'clip') and "
                "SigLIP or SigLIP 2 at a fixed resolution (type 'siglip')"
            )
        half, tower_class = supported[0]
        config = model_files.read_config(half, fields)
        prepares = load_input(str(folder))
        weights = model_files.check_weights(folder, half, config)
        tower = tower_class(model_files.load(half, folder, config).eval().requires_grad_(False), prepares)
        check(tower, weights)
    return tower


def _load_tokenizer(folder: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of transformers, of JSON, and of a library that raises Exception itself
        for name in ("tokenizer_config.json", "tokenizer.json"):
            if Path(folder, name).is_file():
                read_json_file(Path(folder, name))  # says which file it is, if one of them is not JSON
        raise ValueError(f"its tokenizer cannot be loaded ({type(error).__name__}: {error})") from error
