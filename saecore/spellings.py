"""What models are called, and whether two names can mean one model.

One model has several spellings: `openai/clip-vit-base-patch16` is `ViT-B/16` to OpenAI's own loader, `ViT-B-16` in a file's
name, `models--openai--clip-vit-base-patch16` in a cache. Names are compared by the family, size, patch and resolution that they
state: they differ if both state one of these and it is not the same. Nothing is concluded from what a name does not state.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple


class Model(NamedTuple):
    """What a file tells of a model."""

    name: str = ""
    """The name as the file has it: an id, a shape such as ViT-B/16, `demo`, a folder."""
    sha256: str = ""
    """What `ImageTower.sha256` begins with."""


# Who trained a model, or on what, in the order in which a name is searched: a TinyCLIP may name LAION's data too.
_FAMILIES = (
    "siglip2",
    "siglip",
    "dinov3",
    "dinov2",
    "dino",
    "bioclip",
    "tinyclip",
    "metaclip",
    "datacomp",
    "commonpool",
    "dfn",
    "laion2b",
    "laion400m",
    "openai",
)

_SIZES = {"base": "b", "large": "l", "huge": "h", "giant": "g", "small": "s", "tiny": "ti"}

_SHAPE = re.compile(
    r"(?:vit-?(base|large|huge|giant|small|tiny|bigg|so400m|ti|[blhgs])|(base|large|huge|giant|small|so400m))"
    r"-?(?:patch-?)?(\d{1,2})(?!\d)"
)

_RESNET = re.compile(r"(?:^|-)(rn\d+(?:x\d+)?)(?:-|$)")

_RESOLUTION = re.compile(r"-(\d{3})(?:px)?(?=-|$)")


class _Traits(NamedTuple):
    """What a name states; None for what it does not."""

    family: str | None
    size: str | None
    patch: int | None
    resolution: int | None


def _traits(name: str) -> _Traits:
    text = re.sub(r"[^a-z0-9]+", "-", name.lower())
    family = next((family for family in _FAMILIES if family in text.replace("-", "")), None)
    shape, resnet = _SHAPE.search(text), _RESNET.search(text)
    if shape is None:
        return _Traits(family, resnet[1] if resnet else None, None, None)
    size = shape[1] or shape[2]
    resolution = _RESOLUTION.search(text[shape.end() :])
    return _Traits(family, _SIZES.get(size, size), int(shape[3]), int(resolution[1]) if resolution else None)


def _plain(name: str) -> str:
    """A name without the prefixes by which loaders tell where a model comes from."""
    return re.sub(r"^(open[-_]clip:|hf-hub:|hf://|timm:|timm/)+", "", name.lower()).rstrip("/")


def _identifier(name: str) -> tuple[str, str] | None:
    """Owner and name of a Hugging Face id; None for anything else, such as a path or ViT-B/16."""
    parts = _plain(name).split("/")
    return (parts[0], parts[1]) if len(parts) == 2 and all(parts) and not parts[1][:2].isdigit() else None


def differ(one: str, other: str) -> bool | None:
    """Whether two names mean different models; None if they do not tell."""
    ids = _identifier(one), _identifier(other)
    if _plain(one) == _plain(other):
        return False
    if ids[0] is not None and ids[1] is not None and ids[0][1] == ids[1][1]:
        return False  # a copy by another owner
    traits = _traits(one), _traits(other)
    if any(a is not None and b is not None and a != b for a, b in zip(*traits, strict=True)):
        return True
    if ids[0] is not None and ids[1] is not None and ids[0][0] == ids[1][0]:
        return True
    if "demo" in (one, other):  # that name is nobody else's
        known = ids[one == "demo"] or traits[one == "demo"].size
        return True if known else None
    return None


def telling(clip: str) -> str:
    """The name of the model at an address; for a folder, what its files or its own name tell, or nothing."""
    folder = Path(clip)
    if not folder.is_dir():  # an id, or a folder that was elsewhere
        return published(clip)
    if published(clip) != folder.name:
        return published(clip)
    stated = _stated(folder / "config.json")
    for name in (stated, folder.name):
        if _traits(name).size is not None and not Path(name).exists():
            return name
    return ""


def published(clip: str) -> str:
    """A model's name as others may read it: for a path, the id in the name of a cache's folder, or else the last folder."""
    if not clip.startswith("/") and "://" not in clip:
        return clip
    cached = [part for part in Path(clip).parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else Path(clip).name


def _stated(config: Path) -> str:
    """The name that transformers wrote into a folder's config.json."""
    try:
        content: Any = json.loads(config.read_bytes())
    except (OSError, ValueError):  # whoever loads the model says what is wrong with the file
        return ""
    name = content.get("_name_or_path") if isinstance(content, dict) else None
    return name if isinstance(name, str) else ""


def check_same(trained_on: Model, sae: str, clip: str, model: Model, any_clip: bool) -> str:
    """A remark if it cannot be told whether the SAE belongs to this model, or if `any_clip` lets another pass; else nothing.

    `trained_on` is the model that the SAE was trained on, `clip` says in words what the other one is, and `model` is what is
    known of that. ValueError if the two are different models.
    """
    if not trained_on.name:
        return ""
    known = published(trained_on.name)  # folders that a path leads through are no part of a model's name
    name = known + (f" ({trained_on.sha256})" if trained_on.sha256 else "")
    if trained_on.sha256 and model.sha256:
        other: bool | None = trained_on.sha256 != model.sha256
    else:
        other = differ(known, model.name) if model.name else None
    if other is None:
        return f"model         the SAE was trained on {name}; whether {clip} is that model, their names do not tell"
    if not other:
        return ""
    another = clip + (f" ({model.sha256})" if trained_on.sha256 and model.sha256 else "")
    if any_clip:
        return f"model         the SAE was trained on {name}, and {another} is another model; the job goes on, as asked"
    raise ValueError(f"{sae} was trained on {name}, and {another} is another model")
