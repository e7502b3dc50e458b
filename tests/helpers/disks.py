"""Places that refuse: a disk that fills, and one that may only be read."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SIZE = 16 << 20
"""Bytes of the small disk."""


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """A disk in memory of `SIZE` bytes at `folder`; skips the test where this user may mount nothing."""
    folder.mkdir(exist_ok=True)
    size = ["-o", f"size={SIZE}"]
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", str(folder)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here to make a small disk with")
    if done.returncode:
        pytest.skip(f"this user may mount no small disk: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, free: int = 0) -> Path:
    """A file that leaves `free` bytes of the disk."""
    filler = disk / "filler"
    room = os.statvfs(disk)
    filler.write_bytes(bytes(room.f_bavail * room.f_frsize - free))
    return filler


def read_only(disk: Path) -> None:
    """From now on nothing can be written there."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
