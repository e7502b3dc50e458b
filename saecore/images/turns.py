"""Large images are decoded one at a time on each machine: several at once could take more memory than it has.

A picture takes up to 16 bytes a pixel while it is decoded, so that the largest which is allowed takes 2.9 GB (`BYTES`). Whoever
decodes a picture of more than `LARGE_BYTES` holds a lock on a file meanwhile. The file is the user's own and in the folder for
temporary files. The lock ends with its process, however that ends. So N processes that decode take at most
N x `LARGE_BYTES` and one picture more.

Left out: several users of one machine, and containers that do not share that folder.
"""

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

BYTES = {"WEBP": 16}
"""Bytes of memory for each pixel of a format, at most, measured: libwebp holds the picture in three copies besides Pillow's."""

OTHER_BYTES = 8
"""The same for all other formats: two copies of four bytes, where a picture is rotated or composed on white."""

LARGE_BYTES = 512 << 20
"""Memory above which a picture is large: 67 million pixels, of WebP 33 million. Few cameras make more."""

PATIENCE = 300.0
"""Seconds to wait for a turn at most: a process that was stopped (Ctrl-Z) must not stop others for ever."""

_EVERY = 0.02
"""Seconds between two attempts to take a turn."""


@contextlib.contextmanager
def turn(form: str, pixels: int) -> Iterator[None]:
    """Decode a picture of so many pixels inside: a large one waits here until no other is decoded on this machine.

    A timer that the system has been asked for (SIGALRM) stands still while it waits.
    """
    if fcntl is None or pixels * BYTES.get(form, OTHER_BYTES) <= LARGE_BYTES:
        yield
        return
    # Not by name of the process: every process of this user must find the same file.
    path = os.path.join(tempfile.gettempdir(), f"relevance-map-sae-{os.getuid()}.large-image")
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        left, again = signal.setitimer(signal.ITIMER_REAL, 0)
        _wait(lock)
        signal.setitimer(signal.ITIMER_REAL, left, again)
        yield
    finally:
        os.close(lock)


def _wait(lock: int) -> None:
    """Lock the open file; go on without if that takes longer than `PATIENCE`."""
    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(_EVERY)
