"""Decoders that hang or end on some bytes, in the ways that native code has. They run in the process that decodes."""

import ctypes
import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saecore.images.decode import Decoded, blank, decode_image
from saecore.images.preprocess import Preprocess

PREPROCESS = Preprocess(
    resize=32, crop=(32, 32), resample=3, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), rescale_factor=1 / 255
)


def _hold() -> None:
    os.write(2, b"hangs\n")
    ctypes.PyDLL(None).pause()  # PyDLL keeps the interpreter's lock, as most decoders do


def _spin() -> None:
    while True:
        pass


def _die_of(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


WAYS: dict[bytes, Callable[[], None]] = {
    b"pause with the lock": _hold,
    b"pause without it": ctypes.CDLL(None).pause,
    b"sleep": lambda: time.sleep(3600),
    b"spin": _spin,
    b"segmentation fault": lambda: _die_of(signal.SIGSEGV),
    b"abort": os.abort,
    b"exit": lambda: os._exit(3),
}


def decode(data: bytes) -> Decoded:
    """As the real one, unless the bytes are one of `WAYS`."""
    if data in WAYS:
        WAYS[data]()
    print("a library that says something")
    return decode_image(data, PREPROCESS)


def killed_until(data: bytes, marks: Path, kills: int) -> Decoded:
    """Is killed as often as `kills` says, as where memory runs out; never with a blank image."""
    n_marks = len(list(marks.iterdir()))
    if n_marks < kills and data != blank():
        (marks / str(n_marks)).touch()
        _die_of(signal.SIGKILL)
    return decode_image(data, PREPROCESS)


def always_dies(data: bytes) -> Decoded:
    """Ends its process whatever it is given: a library that does not run on this machine."""
    os.abort()


class Unborn:
    """What ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (5,)


def pause_on(data: bytes, sha256: str, decode: Callable[[bytes], Any]) -> Any:
    """As `decode`, but for the image with this hash it hangs with the interpreter's lock."""
    if hashlib.sha256(data).hexdigest() == sha256:
        _hold()
    return decode(data)
