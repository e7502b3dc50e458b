"""Read files and values that others wrote, without trusting them.

Nothing in them runs, nothing is allocated because a file claims it, and whatever is wrong with them is a ValueError of one
sentence that names the file, what it holds and what was expected.

Left out: what the content means (`saecore.sae.config`, `saecore.sae.formats`, `saecore.towers.model_files`), and whether a
model computes anything (`saecore.sae.soundness`, `saecore.towers.soundness`).
"""

import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MOST = 2**31 - 1
"""The largest size that is accepted: ids of latents are 32-bit integers in every table."""

LARGEST = 1e15
"""The largest weight that is accepted; no trained weight comes near it. Float32 overflows at 3e38, so two such numbers can be
multiplied, and 10^8 of such products added."""

FLOATS = {"torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32", "torch.float64": "F64"}
"""Types that weights may have, as torch and safetensors call them. Integers would be quantised weights without their scales."""


@contextmanager
def about(what: str) -> Iterator[None]:
    """ValueErrors inside begin with `what` and become one line."""
    try:
        yield
    except ValueError as error:
        sentence = " ".join(str(error).split())
        raise ValueError(sentence if sentence.startswith(what) else f"{what}: {sentence}") from error


# ---- Values.


def whole(value: Any, what: str, least: int = 1, most: int = MOST) -> int:
    """`value` if it is an integer from `least` to `most`; ValueError for a boolean, 128.0 or "128"."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{what} is {shown(value)}, expected a whole number from {least:,} to {most:,}")
    return value


def number(value: Any, what: str) -> float:
    """`value` as a finite float: an int, a float, a NumPy scalar or a tensor of one value; ValueError for anything else."""
    value = scalar(value)
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        try:
            as_float = float(value)
        except OverflowError:  # an int of 400 digits
            as_float = math.inf
        if math.isfinite(as_float):
            return as_float
    raise ValueError(f"{what} is {shown(value)}, expected a finite number")


def scalar(value: Any) -> Any:
    """The number in a tensor of one; anything else as it is."""
    return value.item() if hasattr(value, "numel") and value.numel() == 1 else value


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """`value` if it maps names to values; ValueError if it does not."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} is {shown(value)}, expected names with values")
    return value


def shown(value: Any) -> str:
    """`value` in words for a sentence, shortened if it is long."""
    if hasattr(value, "shape"):
        return f"an array of shape {tuple(value.shape)}"
    if isinstance(value, int) and abs(value) > 10**30:  # Python refuses to print more than 4,300 digits
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}.. ({type(value).__name__})"


# ---- Files.


def read_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object; ValueError if `text` is none."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where} is not JSON: it is nested too deeply") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a JSON {type(content).__name__}, expected an object")
    return content


def read_json_file(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
    return read_json(text, path.name)


def read_safetensors(path: Path) -> "dict[str, Tensor]":
    """Named tensors; ValueError if the file is none of safetensors.

    All tensors of one opening lie in one mapping of the file, which stays as long as any of them. So each has an opening of its
    own, and its memory is free again as soon as it is no longer needed.
    """
    import safetensors

    with _safetensors(path):
        with safetensors.safe_open(path, "pt") as file:
            names = list(file.keys())
        return {name: _opened(path, name) for name in names}


def _opened(path: Path, name: str) -> "Tensor":
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def read_torch(path: Path, skip: int = 0, mapped: bool = False) -> dict[str, Any]:
    """`torch.load`, `skip` bytes into a file, that can build nothing but tensors and NumPy float64 scalars.

    mapped: leave the tensors' bytes on disk, where the file's form allows it.
    """
    import torch

    scalar = np.float64(0).__reduce__()[0]  # the constructor, wherever this NumPy keeps it
    allowed: list[Any] = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        type(np.dtype("float64")),
    ]
    with torch.serialization.safe_globals(allowed):
        try:
            data = path.read_bytes()[skip:] if skip else None
            zipped = _check_zip(path if data is None else io.BytesIO(data))
            how = {"mmap": True} if mapped and zipped else {}
            source = path if data is None else io.BytesIO(data)
            content = torch.load(source, map_location="cpu", weights_only=True, **how)
        # torch raises pickle, zip and runtime errors alike for a file it cannot or will not read.
        except Exception as error:
            raise ValueError(f"{path.name} cannot be read as a plain checkpoint: {_why(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, expected a dictionary")
    return content


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the floating-point tensors in a .safetensors file, or in one of torch; the tensors are not read."""
    if path.suffix == ".safetensors":
        import safetensors

        with _safetensors(path), safetensors.safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            return {name: tuple(s.get_shape()) for name, s in slices.items() if s.get_dtype() in FLOATS.values()}
    content = read_torch(path, mapped=True)
    shapes = {name: shape_of(value, f"{path.name}: {name!r}", weights=False) for name, value in content.items()}
    return {name: shape for name, shape in shapes.items() if str(content[name].dtype) in FLOATS}


def shape_of(value: Any, what: str, weights: bool = True) -> tuple[int, ...]:
    """The shape of a plain tensor whose numbers are all stored, of floating point if they are `weights`; ValueError otherwise.

    A tensor of torch can be one stored number that claims to be 10^12 numbers, and a copy would allocate them all.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{what} is {shown(value)}, expected a tensor")
    strided = value.layout == torch.strided and not value.is_nested and not value.is_quantized
    if not strided or value.device.type != "cpu":
        raise ValueError(f"{what} is a sparse, nested, quantised or empty kind of tensor, expected a plain one")
    if weights and str(value.dtype) not in FLOATS:
        raise ValueError(f"{what} holds {str(value.dtype).removeprefix('torch.')}, expected floating-point numbers")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise ValueError(f"{what} claims {value.numel():,} numbers, and fewer are stored")
    return tuple(value.shape)


@contextmanager
def _safetensors(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, KeyError, AttributeError) as error:  # KeyError: a type that this torch lacks
        raise ValueError(f"{path.name} cannot be read as safetensors: {error}") from error


def _check_zip(source: Path | io.BytesIO) -> bool:
    """Whether torch takes a file for a zip; ValueError for a compressed zip, which may hold a thousand times its size."""
    with source.open("rb") if isinstance(source, Path) else source as file:
        if file.read(4) != b"PK\x03\x04":
            return False
        with zipfile.ZipFile(file) as entries:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.infolist()):
                raise ValueError("it is compressed, as torch.save never does")
    return True


def _why(error: Exception) -> str:
    """What is wrong with a file, without torch's own advice, which is to try again without its protection."""
    text = str(error)
    if name := re.search(r"GLOBAL (\S+)", text):
        return f"it holds {name[1]}, which is no tensor, and what could run code is not opened"
    first = "" if "weights_only" in text else text.partition("\n")[0][:120]
    return f"it is damaged, or no file of torch.save ({type(error).__name__}{': ' if first else ''}{first})"


def check_values(tensor: "Tensor", what: str, unknown: bool = False) -> None:
    """ValueError if a tensor holds NaN, an infinity, or numbers that overflow. If `unknown`, all of it may be NaN."""
    if unknown and bool(tensor.isnan().all()):
        return
    least, most = (float(end) for end in tensor.aminmax())  # either is NaN where any number is
    if not max(abs(least), abs(most)) < float("inf"):
        raise ValueError(f"{what} holds values that are not finite")
    if max(abs(least), abs(most)) > LARGEST:
        raise ValueError(
            f"{what} holds values from {least:.3g} to {most:.3g}, whose products overflow; expected at most {LARGEST:g}"
        )
