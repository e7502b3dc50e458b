"""Paths and addresses on any pyarrow filesystem: ask, list, read, and write files that appear whole or not at all.

    s3://bucket/path?region=..      an address; settings after `?` stay at its end
    photos/x, file:///photos/x      a local path

This is the only file that asks a filesystem, so a test that puts another one in its place replaces `filesystem_of`. Which
stores there are is said in `saecore.stores`; how often a store that fails is asked, in `saecore.patience`.
"""

import io
import json
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq

from saecore.patience import PatientFile, StoreDownError, retried, said
from saecore.stores import ADDRESS, check_holds_no_secret, connect

T = TypeVar("T")

PARQUET_AHEAD = 1 << 20
"""Bytes of a Parquet file on a store that are fetched at once: of small tables, all columns."""

# What begins like an address and is none would be taken for a folder called `s3:`.
_ALMOST = re.compile(r"(?P<scheme>file|s3|gs|gcs|hf|https?|hdfs|abfss?):(?!//)/?(?P<rest>.*)", re.DOTALL)


class StorageError(OSError):
    """A place refuses, or fails, for a reason outside of the program; the message is a sentence that names the place."""

    @property
    def is_down(self) -> bool:
        """Whether the place is a store that has failed as often as it was asked, so that a later attempt may succeed."""
        return isinstance(self.__cause__, StoreDownError)


class WriteError(StorageError):
    """Something could not be written: a full disk, a missing right, a store that refuses."""


class ReadError(StorageError):
    """Something on a store could not be read: the store is down, or refuses."""


@contextmanager
def writing(uri: str) -> Iterator[None]:
    """An OSError inside, while `uri` is written, becomes a `WriteError` that names `uri`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"{uri} cannot be written: {reason(error)}") from error


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """An OSError inside, while `uri` is read from a store, becomes a `ReadError` that names `uri`.

    What is not there, or is another kind of thing, stays what it is: whoever asked knows what that means.
    """
    try:
        yield
    except (StorageError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise
    except OSError as error:
        raise ReadError(f"{uri} cannot be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What the system says, in one line and without secrets; of a `StorageError`, what the system said before."""
    return said(error.__cause__ or error if isinstance(error, StorageError) else error)


def check_address(uri: str) -> None:
    """ValueError for an address that lacks a slash or holds a credential, and for an empty one, which would be this folder."""
    check_holds_no_secret(uri)
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
        raise ValueError(f"{uri} cannot be written: {reason(error)}") from error
    else:
        with suppress(OSError):
            Place(uri).remove(f"{path}/{name}")
    finally:
        for folder in missing:
            with suppress(OSError):  # never made, or another process has put something there
                folder.rmdir()


class Place:
    """What an address leads to, for many questions over one connection. Paths are those inside its filesystem."""

    def __init__(self, uri: str) -> None:
        with reading(uri):
            self._filesystem, self.path = retried(uri, lambda: filesystem_of(uri))
        self._uri = uri
        self.is_local = isinstance(self._filesystem, pyarrow.fs.LocalFileSystem)

    def _ask(self, ask: Callable[[], T]) -> T:
        """What `ask` returns; a store is asked again if it fails for a moment."""
        if self.is_local:
            return ask()
        with reading(self._uri):
            return retried(self._uri, ask)

    def info(self, path: str | None = None) -> pyarrow.fs.FileInfo:
        """Type, size and time of a file or folder; of the place itself if no path is named."""
        return self._ask(lambda: self._filesystem.get_file_info(self.path if path is None else path))

    def entries(self, path: str | None = None, below: bool = False) -> list[pyarrow.fs.FileInfo]:
        """What lies directly in a folder, or anywhere `below` it; empty if there is no such folder."""
        folder = self.path if path is None else path
        selector = pyarrow.fs.FileSelector(folder, recursive=below, allow_not_found=True)
        return self._ask(lambda: self._filesystem.get_file_info(selector))

    def open(self, path: str | None = None) -> pa.NativeFile | PatientFile:
        """A file to read from any position."""
        file = self._ask(lambda: self._filesystem.open_input_file(self.path if path is None else path))
        return file if self.is_local else PatientFile(file, self._ask(file.size), self._ask)

    def open_parquet(self, path: str | None = None, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
        """A Parquet file to read piece by piece; its footer is not read again if it is given."""
        where = self.path if path is None else path
        return self._ask(lambda: pq.ParquetFile(where, filesystem=self._filesystem, metadata=footer))

    def dataset(self, paths: Sequence[str] | None = None) -> pyarrow.dataset.Dataset:
        """Parquet files as one data set: those at `paths`, or all in the folder."""
        files = self.path if paths is None else list(paths)
        return self._ask(lambda: pyarrow.dataset.dataset(files, filesystem=self._filesystem, format="parquet"))

    def remove(self, path: str | None = None) -> None:
        """Delete a file."""
        self._ask(lambda: self._filesystem.delete_file(self.path if path is None else path))


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
    with Place(uri).open() as file:
        return file.read()


def read_json(uri: str) -> Any:
    """The content of a JSON file that this project wrote. For files of others: `saecore.untrusted`."""
    return json.loads(read_bytes(uri))


def read_parquet(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or some columns of it, in memory."""
    place, names = Place(uri), columns if columns is None else list(columns)
    if place.is_local:
        return pq.read_table(place.path, filesystem=pyarrow.fs.LocalFileSystem(), columns=names)
    with place.open() as file:
        try:
            return table_of(io.BufferedReader(file, PARQUET_AHEAD), names)
        except pa.ArrowInvalid as error:  # which does not know what the file is called
            raise pa.ArrowInvalid(f"{uri}: {error}") from error


def table_of(file: Any, columns: list[str] | None = None) -> pa.Table:
    """The table in a Parquet file that Python reads, or that lies in Python's memory, by this thread alone.

    Threads of pyarrow 26 let go of Python's buffers some time later. If Python ends by then, the process is aborted: every
    third `verify` of a run on a store was.
    """
    return pq.ParquetFile(file, pre_buffer=False).read(columns=columns, use_threads=False)


def parent(uri: str) -> str:
    """The folder of a file or folder; an address keeps its settings."""
    address, settings = split_settings(uri)
    return f"{posixpath.dirname(address.rstrip('/')) or '.'}{settings}"


def filesystem_of(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The filesystem that holds `uri`, and the path inside it. Anything without `://` is local and made absolute.

    The path of an address is taken as it stands: pyarrow's own parser would decode `%20` in it and refuse a blank. ValueError
    as in `check_address`.
    """
    check_address(uri)
    address = ADDRESS.fullmatch(uri)
    if address is None:
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(uri)
    root, path, settings = (part or "" for part in address.group("root", "path", "settings"))
    if root == "file://":
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(path)
    filesystem, inside = connect(root, path, settings)
    return filesystem, inside.rstrip("/")


def resolved(uri: str) -> str:
    """An address as it stands, or a path made absolute, for processes that run in another folder."""
    return uri if ADDRESS.fullmatch(uri) else os.path.abspath(uri)


def join_uri(base: str, *parts: str) -> str:
    """`base/part/...`, for paths and addresses alike; an address keeps its settings at the end."""
    address, settings = split_settings(base)
    return "/".join([address.rstrip("/"), *parts]) + settings


def split_settings(uri: str) -> tuple[str, str]:
    """An address without its settings, and the settings with their `?`; for a path, the path and an empty string."""
    address = ADDRESS.fullmatch(uri)
    settings = (address and address["settings"]) or ""
    return uri[: len(uri) - len(settings)], settings


def write_atomic(uri: str, data: bytes | pa.Buffer) -> None:
    """Write a file so that it appears under its name whole or not at all, also if the machine goes down.

    A local file is an `atomic_file`; an object store gets one complete PUT, which is atomic there, and is asked again if it
    fails for a moment. `WriteError` if it cannot be written.
    """
    with writing(uri):
        filesystem, path = retried(uri, lambda: filesystem_of(uri))
        if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
            with atomic_file(Path(path)) as file:
                file.write(data)
        else:
            retried(uri, lambda: _put(filesystem, path, data))


def _put(filesystem: pyarrow.fs.FileSystem, path: str, data: bytes | pa.Buffer) -> None:
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
