"""How a run's images are decoded: what a command asks for, what the run has, and what this machine can."""

from collections.abc import Mapping
from typing import Any, Protocol

from saecore.images.preprocess import Preprocess, Resize, can_be_fast, default_resize
from saecore.pipeline.stages import Decode
from saecore.runs.run import Run

ASKED = ("auto", "fast", "exact")
"""What --resize takes. A text, and not a `Literal`, of which tyro would draw a box around its sentence."""

PACKAGE = "the package cykooz.resizer, which is not installed here"


class Arguments(Protocol):
    """What a command says of decoding, see `jobs.collection.Arguments`."""

    @property
    def max_pixels(self) -> int: ...
    @property
    def image_seconds(self) -> float: ...
    @property
    def resize(self) -> str: ...


def decoder(arguments: Arguments, preprocess: Preprocess, run: Run | None) -> Decode:
    """The step that decodes, for a command whose --out holds this run."""
    return Decode(preprocess, arguments.max_pixels, arguments.image_seconds, chosen(arguments.resize, run))


def check(asked: str) -> None:
    """ValueError if this machine cannot do what is asked for, or nothing can."""
    if asked not in ASKED:
        raise ValueError(f"--resize {asked!r}: must be one of {', '.join(ASKED)}")
    if asked == "fast" and not can_be_fast():
        raise ValueError(f"--resize fast needs {PACKAGE}; --resize exact does not")


def chosen(asked: str, run: Run | None) -> Resize:
    """How images are resized: as asked for, else as the run has it, else fast if this machine can."""
    match asked:
        case "fast" | "exact":
            return asked
    if run is not None:
        return held(run.parts)
    return default_resize()


def part(resize: Resize) -> dict[str, Resize]:
    """What the fingerprint says of it. Runs of before `fast` have no such part."""
    return {} if resize == "exact" else {"resize": resize}


def held(parts: Mapping[str, Any]) -> Resize:
    """How a run with such parts resizes; ValueError if this machine cannot."""
    if "resize" not in parts:
        return "exact"
    if not can_be_fast():
        raise ValueError(f"the run resizes its images with {PACKAGE}; install it, or name another folder for a new run")
    return "fast"
