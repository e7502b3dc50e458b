"""What there is to explain: paths, globs and addresses -> shards.

A shard is a tar (`.tar`, `.tar.gz`, `.tgz`; webdataset or any other), a Parquet file with a column of encoded images, or a
group of files of a folder tree, on any pyarrow filesystem: local, s3://, gs://.

What is an image goes by the name's ending (`EXTENSIONS`, any case). Whatever lies beside it is passed over, as are hidden
files, macOS's `._x` and `__MACOSX`.
"""

import fnmatch
import itertools
import posixpath
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow.fs

from saecore.storage import filesystem_of, join_uri, split_settings

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
KINDS = {".tar": "tar", ".tar.gz": "tar.gz", ".tgz": "tar.gz", ".parquet": "parquet"}

FILES_PER_SHARD = 4096
"""Files of a folder tree that make one shard."""


class Shard(NamedTuple):
    """A unit of input."""

    uri: str
    """Of the file, or of the folder."""
    kind: str
    """tar, tar.gz, parquet or folder."""
    bytes: int
    mtime_ns: int
    members: list[str] | None
    """The files of a folder shard, below `uri`."""


class _Loose(NamedTuple):
    """An image file of a folder tree."""

    base: str
    name: str
    """Below `base`."""
    info: pyarrow.fs.FileInfo


def list_shards(paths: Sequence[str], files_per_shard: int = FILES_PER_SHARD) -> list[Shard]:
    """The shards under files, folders, globs and addresses, each once, in an order that depends on their names alone.

    A folder gives the tar and Parquet files of its tree and, in groups, its image files. A shard's place in the list is
    its id. ValueError names the path under which there is nothing.
    """
    shards: dict[str, Shard] = {}
    loose: dict[str, _Loose] = {}
    for path in paths:
        found = 0
        for base, name, info in _files(path):
            uri, ending = join_uri(base, name), extension(name)
            if ending in KINDS:
                shards[uri] = Shard(uri, KINDS[ending], info.size, info.mtime_ns or 0, None)
            elif ending in EXTENSIONS:
                # Found by two paths, a file belongs to the shorter: not to the one that came first.
                file = _Loose(base, name, info)
                loose[uri] = min(loose.get(uri, file), file, key=lambda held: len(held.base))
            else:
                continue
            found += 1
        if not found:
            raise ValueError(
                f"--images {path}: no such file, or no images in it; looked for {', '.join((*KINDS, *EXTENSIONS))}"
            )
    assert len(shards) + len(loose) < 1 << 31, "shard ids take 31 bits"
    folders: dict[str, list[_Loose]] = {}
    for uri in sorted(loose):
        folders.setdefault(loose[uri].base, []).append(loose[uri])
    grouped = [
        Shard(
            uri=base,
            kind="folder",
            bytes=sum(file.info.size for file in group),
            mtime_ns=max(file.info.mtime_ns or 0 for file in group),
            members=[file.name for file in group],
        )
        for base, files in folders.items()
        for group in (files[start : start + files_per_shard] for start in range(0, len(files), files_per_shard))
    ]
    return sorted([*shards.values(), *grouped], key=lambda shard: (shard.uri, shard.members or []))


def _files(path: str) -> Iterator[tuple[str, str, pyarrow.fs.FileInfo]]:
    """(base, name below it, info) of every visible file at a path, in its tree, or in what a glob matches."""
    base, patterns = path, []
    try:
        filesystem, root = filesystem_of(base)
        if filesystem.get_file_info(root).type == pyarrow.fs.FileType.NotFound:
            # A glob only where nothing is called that: a name may hold brackets.
            address, settings = split_settings(path)
            parts = address.split("/")
            fixed = len(list(itertools.takewhile(lambda part: not set("*?[") & set(part), parts)))
            patterns = [part for part in parts[fixed:] if part]
            base = ("/".join(parts[:fixed]) or ("/" if address.startswith("/") else ".")) + settings
            filesystem, root = filesystem_of(base)
        if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
            base = root  # absolute, so that ids do not depend on where the command was given
        for top in _expand(filesystem, root, patterns):
            if top.is_file and not patterns:
                address, settings = split_settings(base)
                yield posixpath.dirname(address) + settings, top.base_name, top
                continue
            tree = pyarrow.fs.FileSelector(top.path, recursive=True, allow_not_found=True)
            for info in [top] if top.is_file else filesystem.get_file_info(tree):
                if info.is_file and not is_hidden(info.path[len(top.path.rstrip("/")) :]):
                    yield base, info.path[len(root.rstrip("/")) :].lstrip("/"), info
    except (OSError, ValueError) as error:  # the latter: an unknown kind of address, a name that is not UTF-8
        raise ValueError(f"--images {path}: {' '.join(str(error).split())}") from error


def _expand(filesystem: pyarrow.fs.FileSystem, folder: str, patterns: list[str]) -> Iterator[pyarrow.fs.FileInfo]:
    """Files and folders below `folder` that match shell patterns, one a level; `**` is any number of levels."""
    if not patterns or patterns == ["**"]:
        yield filesystem.get_file_info(folder)
        return
    first, *rest = patterns
    if first == "**":
        yield from _expand(filesystem, folder, rest)
    selector = pyarrow.fs.FileSelector(folder, recursive=first == "**", allow_not_found=True)
    for info in filesystem.get_file_info(selector):
        is_folder = info.type == pyarrow.fs.FileType.Directory
        if first == "**":
            if is_folder and not is_hidden(info.path[len(folder) :]):
                yield from _expand(filesystem, info.path, rest)
        elif fnmatch.fnmatchcase(info.base_name, first) and (not is_hidden(info.base_name) or first.startswith(".")):
            if not rest:
                yield info
            elif is_folder:
                yield from _expand(filesystem, info.path, rest)


def is_hidden(name: str) -> bool:
    """Whether any part of the path is one that people do not see."""
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in name.split("/"))


def extension(name: str) -> str:
    """The ending of a name in lower case, with its dot."""
    lower = name.lower()
    return ".tar.gz" if lower.endswith(".tar.gz") else posixpath.splitext(lower)[1]
