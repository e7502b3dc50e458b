"""Paths and addresses on any pyarrow filesystem: ask, list, read, and write files that appear whole or not at all.

    s3://bucket/path?region=..      an address; settings after `?` stay at its end
    photos/x, file:///photos/x      a local path

This is the only file that asks a filesystem, so a test that puts another one in its place replaces `filesystem_of`.
"""

import json
import os
import posixpath
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq

# s3://bucket/path?endpoint_override=host:9000&scheme=http has settings; a bare `?` is a wildcard or part of a name.
_ADDRESS = re.compile(r"(?P<root>\w+://[^/?]*)(?P<path>/.*?)?(?P<settings>\?\w+=.*)?", re.DOTALL)

# What begins like an address and is none would be taken for a folder called `s3:`.
_ALMOST = re.compile(r"(?P<scheme>file|s3|gs|gcs|hf|https?|hdfs|abfss?):(?!//)/?(?P<rest>.*)", re.DOTALL)


class WriteError(OSError):
    """Something could not be written, for a reason outside of the program: a full disk, a missing right, a store that
    refuses."""


@contextmanager
def writing(uri: str) -> Iterator[None]:
    """An OSError inside, while `uri` is written, becomes a `WriteError` that names `uri`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"{uri} cannot be written: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What the system says, in one line. In pyarrow's sentences the reason is the part after `Detail:`."""
    said = getattr(error, "strerror", None) or str(error)
    return " ".join(said.rsplit("Detail: ", 1)[-1].split())


def check_address(uri: str) -> None:
    """ValueError for an address that lacks a slash, and for an empty one, which would be the current folder."""
    if not uri.strip():
        raise ValueError("nothing is named; name a folder or an address")
    if almost := _ALMOST.fullmatch(uri):
        meant = f"{almost['scheme']}://{'/' if almost['scheme'] == 'file' else ''}{almost['rest']}"
        raise ValueError(
            f"{uri} has too few slashes for an address: write {meant}, or ./{uri} for a folder of that name"
        )


def check_writable(uri: str) -> None:
    """ValueError if no file can be written into the folder `uri`, which need not exist. Writes a file there and removes it.

    On an object store that lets nothing be deleted, that file of one byte stays.
    """
    check_address(uri)
    filesystem, path = filesystem_of(uri)
    local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
    missing = [folder for folder in (Path(path), *Path(path).parents) if local and not folder.exists()]
    name = f".tried-{uuid.uuid4().hex}"
    try:
        write_atomic(join_uri(uri, name), b"1")  # one byte, since a full disk takes empty files
    except WriteError as error:
        raise ValueError(f"{uri} cannot be written: {reason(error.__cause__ or error)}") from error
    else:
        with suppress(OSError):
            filesystem.delete_file(f"{path}/{name}")
    finally:
        for folder in missing:
            with suppress(OSError):  # never made, or another process has put something there
                folder.rmdir()


class Place:
    """What an address leads to, for many questions over one connection. Paths are those inside its filesystem."""

    def __init__(self, uri: str) -> None:
        self._filesystem, self.path = filesystem_of(uri)
        self.is_local = isinstance(self._filesystem, pyarrow.fs.LocalFileSystem)

    def info(self, path: str | None = None) -> pyarrow.fs.FileInfo:
        """Type, size and time of a file or folder; of the place itself if no path is named."""
        return self._filesystem.get_file_info(self.path if path is None else path)

    def entries(self, path: str | None = None, below: bool = False) -> list[pyarrow.fs.FileInfo]:
        """What lies directly in a folder, or anywhere `below` it; empty if there is no such folder."""
        folder = self.path if path is None else path
        return self._filesystem.get_file_info(pyarrow.fs.FileSelector(folder, recursive=below, allow_not_found=True))

    def open(self, path: str | None = None) -> pa.NativeFile:
        """A file to read from any position."""
        return self._filesystem.open_input_file(self.path if path is None else path)

    def open_parquet(self, path: str | None = None, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
        """A Parquet file to read piece by piece; its footer is not read again if it is given."""
        return pq.ParquetFile(self.path if path is None else path, filesystem=self._filesystem, metadata=footer)

    def dataset(self, paths: Sequence[str] | None = None) -> pyarrow.dataset.Dataset:
        """Parquet files as one data set: those at `paths`, or all in the folder."""
        files = self.path if paths is None else list(paths)
        return pyarrow.dataset.dataset(files, filesystem=self._filesystem, format="parquet")

    def remove(self, path: str | None = None) -> None:
        """Delete a file."""
        self._filesystem.delete_file(self.path if path is None else path)


def exists(uri: str) -> bool:
    """Whether there is a file or a folder."""
    return Place(uri).info().type != pyarrow.fs.FileType.NotFound


def is_file(uri: str) -> bool:
    """Whether there is a file."""
    return Place(uri).info().type == pyarrow.fs.FileType.File


def is_folder(uri: str) -> bool:
    """Whether there is a folder."""
    return Place(uri).info().type == pyarrow.fs.FileType.Directory


def is_local(uri: str) -> bool:
    """Whether `uri` names a place on this machine's own disks."""
    return Place(uri).is_local


def names_in(uri: str) -> set[str]:
    """The names of what lies directly in a folder; empty if there is no such folder."""
    return {info.base_name for info in Place(uri).entries()}


def read_bytes(uri: str) -> bytes:
    """All of a file."""
    filesystem, path = filesystem_of(uri)
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def read_json(uri: str) -> Any:
    """The content of a JSON file that this project wrote. For files of others: `saecore.untrusted`."""
    return json.loads(read_bytes(uri))


def read_parquet(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or some columns of it, in memory."""
    filesystem, path = filesystem_of(uri)
    return pq.read_table(path, filesystem=filesystem, columns=columns if columns is None else list(columns))


def parent(uri: str) -> str:
    """The folder of a file or folder; an address keeps its settings."""
    address, settings = split_settings(uri)
    return f"{posixpath.dirname(address.rstrip('/')) or '.'}{settings}"


def filesystem_of(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The filesystem that holds `uri`, and the path inside it. Anything without `://` is local and made absolute.

    The path of an address is taken as it stands: pyarrow's own parser would decode `%20` in it and refuse a blank. ValueError
    for what is almost an address.
    """
    if _ALMOST.fullmatch(uri):
        check_address(uri)
    address = _ADDRESS.fullmatch(uri)
    if address is None:
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(uri)
    root, path, settings = (part or "" for part in address.group("root", "path", "settings"))
    if root == "file://":
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(path)
    filesystem, inside = pyarrow.fs.FileSystem.from_uri(root + settings)
    return filesystem, (inside + path).rstrip("/")


def resolved(uri: str) -> str:
    """An address as it stands, or a path made absolute, for processes that run in another folder."""
    return uri if _ADDRESS.fullmatch(uri) else os.path.abspath(uri)


def join_uri(base: str, *parts: str) -> str:
    """`base/part/...`, for paths and addresses alike; an address keeps its settings at the end."""
    address, settings = split_settings(base)
    return "/".join([address.rstrip("/"), *parts]) + settings


def split_settings(uri: str) -> tuple[str, str]:
    """An address without its settings, and the settings with their `?`; for a path, the path and an empty string."""
    address = _ADDRESS.fullmatch(uri)
    settings = (address and address["settings"]) or ""
    return uri[: len(uri) - len(settings)], settings


def write_atomic(uri: str, data: bytes | pa.Buffer) -> None:
    """Write a file so that it appears under its name whole or not at all, also if the machine goes down.

    A local file is an `atomic_file`; an object store gets one complete PUT, which is atomic there. `WriteError` if it cannot be
    written.
    """
    filesystem, path = filesystem_of(uri)
    with writing(uri):
        if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
            with atomic_file(Path(path)) as file:
                file.write(data)
        else:
            with filesystem.open_output_stream(path) as stream:
                stream.write(data)


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """A local file to write piece by piece: a temporary file, which is synced and renamed when the block ends without error.

    `WriteError` if the system refuses; the block puts its own writes under `writing`.
    """
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
    with writing(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("wb")
    try:
        yield file
        with writing(str(target)):
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(target)
    finally:
        # After a write that failed, closing tries it again; after one that did not, all is synced.
        with suppress(OSError):
            file.close()
        temporary.unlink(missing_ok=True)  # still there only if something above failed
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
