"""Paths and addresses on any pyarrow filesystem, and files that appear whole or not at all."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.fs

# s3://bucket/path?endpoint_override=host:9000&scheme=http: settings, where a bare `?` is a wildcard or part of a name.
_ADDRESS = re.compile(r"(?P<root>\w+://[^/?]*)(?P<path>/.*?)?(?P<settings>\?\w+=.*)?", re.DOTALL)


def filesystem_of(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The filesystem that holds `uri`, and the path inside it. Anything without `://` is local and made absolute.

    The path of an address is taken as it stands: pyarrow alone would decode `%20` in it and refuse a blank.
    """
    address = _ADDRESS.fullmatch(uri)
    if address is None:
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(uri)
    root, path, settings = (part or "" for part in address.group("root", "path", "settings"))
    if root == "file://":
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(path)
    filesystem, inside = pyarrow.fs.FileSystem.from_uri(root + settings)
    return filesystem, (inside + path).rstrip("/")


def resolved(uri: str) -> str:
    """An address as it stands, a path made absolute: what may travel to processes that run in another folder."""
    return uri if _ADDRESS.fullmatch(uri) else os.path.abspath(uri)


def join_uri(base: str, *parts: str) -> str:
    """`base/part/...`, for paths and addresses alike; an address keeps its settings at the end."""
    address, settings = split_settings(base)
    return "/".join([address.rstrip("/"), *parts]) + settings


def split_settings(uri: str) -> tuple[str, str]:
    """An address without its settings, and these with their `?`; of a path, the path and nothing."""
    address = _ADDRESS.fullmatch(uri)
    settings = (address and address["settings"]) or ""
    return uri[: len(uri) - len(settings)], settings


def write_atomic(uri: str, data: bytes | pa.Buffer) -> None:
    """Write a file so that it appears under its name whole or not at all, also if the machine goes down.

    Locally: `atomic_file`. Object store: one complete PUT, which is atomic there.
    """
    filesystem, path = filesystem_of(uri)
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        with atomic_file(Path(path)) as file:
            file.write(data)
    else:
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """A local file to write piece by piece: a temporary file beside it, synced and renamed over when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)  # still there only if something above failed
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
