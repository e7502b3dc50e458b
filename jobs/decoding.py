"""How a run's images are decoded: what a command asks for, what the run has, and what this machine can."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from saecore.images.preprocess import Preprocess, Resize, can_be_fast
from saecore.pipeline.stages import Decode
from saecore.runs.run import Run

Asked = Literal["auto", "fast", "exact"]
"""What --resize takes."""

PACKAGE = "the package cykooz.resizer, which is not installed here"


class Arguments(Protocol):
    """What a command says of decoding, see `jobs.collection.Arguments`."""

    @property
    def max_pixels(self) -> int: ...
    @property
    def image_seconds(self) -> float: ...
    @property
    def resize(self) -> Asked: ...


def decoder(arguments: Arguments, preprocess: Preprocess, run: Run | None) -> Decode:
    """The step that decodes, for a command whose --out holds this run."""
    return Decode(preprocess, arguments.max_pixels, arguments.image_seconds, chosen(arguments.resize, run))


def check(asked: Asked) -> None:
    """ValueError if this machine cannot do what is asked for."""
    if asked == "fast" and not can_be_fast():
        raise ValueError(f"--resize fast needs {PACKAGE}; --resize exact does not")


def chosen(asked: Asked, run: Run | None) -> Resize:
    """How images are resized: as asked for, else as the run has it, else fast if this machine can."""
    if asked != "auto":
        return asked
    if run is not None:
        return held(run.parts)
    return "fast" if can_be_fast() else "exact"


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
