"""List the shards under paths, globs and addresses: what there is to explain.

A shard is a tar (`.tar`, `.tar.gz`, `.tgz`; webdataset or any other), a Parquet file with a column of encoded images, or a
group of files of a folder tree, local or on any store that `saecore.stores` knows: s3://, gs://, hf://datasets/, https://.

The ending of a name (`EXTENSIONS`, in any case) tells whether a file is an image. Other files are passed over, and so are
hidden ones, macOS's `._x` and `__MACOSX`. Links are followed, but a folder is listed once, by its own name rather than a
link's.
"""

import fnmatch
import functools
import itertools
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow.fs

from saecore.numbering import MOST_SHARDS
from saecore.storage import Place, StorageError, join_uri, split_settings

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
KINDS = {".tar": "tar", ".tar.gz": "tar.gz", ".tgz": "tar.gz", ".parquet": "parquet"}

FILES_PER_SHARD = 4096
"""How many files of a folder tree make one shard."""


class Shard(NamedTuple):
    """A file or a group of files that is read as one."""

    uri: str
    """The address of the file or folder."""
    kind: str
    """tar, tar.gz, parquet or folder."""
    bytes: int
    mtime_ns: int
    members: list[str] | None
    """The names of a folder shard's files, below `uri`; None for other kinds."""


class _Loose(NamedTuple):
    """An image file of a folder tree."""

    base: str
    name: str
    """The name below `base`."""
    info: pyarrow.fs.FileInfo


class _Top(NamedTuple):
    """A local folder to list, with all below it."""

    folder: str
    """Its absolute path."""
    base: str
    """The folder below which files are named."""
    path: str
    """The path, of those asked for, that led to the folder."""


def list_shards(
    paths: Sequence[str],
    files_per_shard: int = FILES_PER_SHARD,
    say: Callable[[str], object] = lambda _: None,
    may_lack: bool = False,
    groups: Mapping[str, int] | None = None,
) -> list[Shard]:
    """The shards under files, folders, globs and addresses, each once, in an order that depends only on their names.

    A folder gives the tar and Parquet files of its tree and, in groups, its image files. A shard's place in the list is
    its id. `say` is called with a sentence for a person about links that were not followed. ValueError for a path under which
    there is nothing, unless paths `may_lack` what was there before. Image files of a folder tree stay in the `groups` that are
    given for their addresses; all other files make groups of their own.
    """
    shards: dict[str, Shard] = {}
    loose: dict[str, _Loose] = {}
    folders = _Folders()
    fruitful = set[str]()
    for path, base, name, info in _files(paths, folders):
        uri, ending = join_uri(base, name), extension(name)
        if ending in KINDS:
            shards[uri] = Shard(uri, KINDS[ending], info.size, info.mtime_ns or 0, None)
        elif ending in EXTENSIONS:
            # A file that two paths lead to belongs to the shorter one, whichever came first.
            file = _Loose(base, name, info)
            loose[uri] = min(loose.get(uri, file), file, key=lambda one: len(one.base))
        else:
            continue
        fruitful.add(path)
    for path in paths:
        if path not in fruitful and not may_lack and not (fruitful and path in folders.passed):
            raise ValueError(f"{path}: no such file, or no images in it; looked for {', '.join((*KINDS, *EXTENSIONS))}")
    for links, what in ((folders.again, "links to folders that are listed already"), (folders.nowhere, "dead links")):
        if links:
            first = ", ".join(sorted(links)[:3]) + (", .." if len(links) > 3 else "")
            say(f"passed over {what} ({len(links):,}): {first}")
    assert len(shards) + len(loose) < MOST_SHARDS, "more shards than numbers"
    together: dict[tuple[str, int | None], list[_Loose]] = {}
    for uri in sorted(loose):
        together.setdefault((loose[uri].base, (groups or {}).get(uri)), []).append(loose[uri])
    grouped = [
        Shard(
            uri=base,
            kind="folder",
            bytes=sum(file.info.size for file in group),
            mtime_ns=max(file.info.mtime_ns or 0 for file in group),
            members=[file.name for file in group],
        )
        for (base, _), files in together.items()
        for group in (files[start : start + files_per_shard] for start in range(0, len(files), files_per_shard))
    ]
    return sorted([*shards.values(), *grouped], key=lambda shard: (shard.uri, shard.members or []))


def _files(paths: Sequence[str], folders: "_Folders") -> Iterator[tuple[str, str, str, pyarrow.fs.FileInfo]]:
    """(path, base, name below the base, info) of every visible file at the paths, in their trees, or in what globs match."""
    tops: list[_Top] = []
    for path in paths:
        with _about(path):
            base, patterns = path, []
            place = Place(base)
            if place.info().type == pyarrow.fs.FileType.NotFound:
                # A path is a glob only if nothing has that name: names may hold brackets.
                address, settings = split_settings(path)
                parts = address.split("/")
                fixed = len(list(itertools.takewhile(lambda part: not set("*?[") & set(part), parts)))
                patterns = [part for part in parts[fixed:] if part]
                base = ("/".join(parts[:fixed]) or ("/" if address.startswith("/") else ".")) + settings
                place = Place(base)
            if place.is_local:
                base = place.path  # absolute, so that ids do not depend on the current folder
            for top in _expand(place, place.path, patterns, folders):
                if top.is_file and place.is_local:
                    folders.list_file(top.path)
                if top.is_file and not patterns:
                    address, settings = split_settings(base)
                    yield path, posixpath.dirname(address) + settings, top.base_name, top
                elif top.is_file:
                    yield path, base, _below(place.path, top.path), top
                elif place.is_local and top.type == pyarrow.fs.FileType.Directory:
                    tops.append(_Top(top.path, base, path))
                elif not place.is_local:
                    for info in place.entries(top.path, below=True):
                        if info.is_file and not is_hidden(_below(top.path, info.path)):
                            yield path, base, _below(place.path, info.path), info
    for top, entries in folders.below(tops):
        with _about(top.path):
            for entry in entries:
                if extension(entry.name) in (*KINDS, *EXTENSIONS) and os.path.isfile(entry.path):
                    status = entry.stat()
                    info = pyarrow.fs.FileInfo(entry.path, size=status.st_size, mtime_ns=status.st_mtime_ns)
                    yield top.path, top.base, _below(top.base, entry.path), info


@contextmanager
def _about(path: str) -> Iterator[None]:
    """What goes wrong inside is a ValueError that names the path that was asked for."""
    try:
        yield
    except StorageError as error:  # it names the place itself
        raise ValueError(str(error)) from error
    except (OSError, ValueError) as error:  # ValueError: an unknown kind of address, a name that is not UTF-8
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _below(root: str, path: str) -> str:
    """The part of a path that comes after its root."""
    return path[len(root.rstrip("/")) :].lstrip("/")


class _Folders:
    """Lists local trees folder by folder, each folder once, even if links lead to it twice or in circles."""

    def __init__(self) -> None:
        self.again = set[str]()
        """Links to folders that are listed already, or that hold the link."""
        self.nowhere = set[str]()
        """Links to nothing."""
        self.passed = set[str]()
        """The paths asked for under which a link or file was passed over because it is listed already."""
        self._listed: dict[str, str] = {}
        """The real path of each folder that is listed, and the path under which it is listed."""
        self._files: dict[str, str] = {}
        """The same for files that were asked for by name."""
        self._real = functools.lru_cache(1024)(os.path.realpath)

    def list_file(self, path: str) -> None:
        """Note a file that was asked for by name, so that a link to its folder does not list it again."""
        folder, name = posixpath.split(path)
        self._files[posixpath.join(self._real(folder), name)] = path

    def below(self, tops: Sequence[_Top]) -> Iterator[tuple[_Top, list[os.DirEntry[str]]]]:
        """The folders and all visible folders in their trees, each with its entries that are not hidden.

        Folders that are reached without a link come first, then links in the order of their names: so the order of paths does
        not decide under which of two names a folder is listed.
        """
        linked = {top for top in tops if os.path.realpath(top.folder) != top.folder}
        asked = {top for top in linked if Place(top.path).path == top.folder}  # by its own name, not by a glob
        fresh = [top for top in tops if top not in linked]
        while fresh or linked:
            yield from self._trees(fresh, linked)
            fresh = []
            for top in sorted(linked):
                real, around = os.path.realpath(top.folder), os.path.realpath(posixpath.dirname(top.folder))
                is_circle = f"{around}/".startswith(f"{real.rstrip('/')}/") and top not in asked
                if is_circle or self._listed.setdefault(real, top.folder) != top.folder:
                    self._pass(top)
                else:
                    fresh.append(top)
            linked = set()

    def _pass(self, top: _Top) -> None:
        self.again.add(top.folder)
        self.passed.add(top.path)

    def _trees(self, tops: Sequence[_Top], linked: set[_Top]) -> Iterator[tuple[_Top, list[os.DirEntry[str]]]]:
        """The folders of trees that are reached without a link; links to folders are added to `linked`."""
        for top in sorted(tops):
            waiting = [(top.folder, os.path.realpath(top.folder))]
            while waiting:
                folder, real = waiting.pop()
                if self._listed.setdefault(real, folder) != folder:
                    continue
                with _about(top.path), os.scandir(folder) as entries:
                    visible = [entry for entry in entries if not is_hidden(entry.name)]
                fresh = [
                    entry for entry in visible if self._files.get(f"{real}/{entry.name}", entry.path) == entry.path
                ]
                if len(fresh) < len(visible):
                    self._pass(top)
                yield top._replace(folder=folder), fresh
                for entry in visible:
                    if entry.is_symlink():
                        if os.path.isdir(entry.path):
                            linked.add(top._replace(folder=entry.path))
                        elif not os.path.exists(entry.path):
                            self.nowhere.add(entry.path)
                    elif entry.is_dir():
                        waiting.append((entry.path, f"{real.rstrip('/')}/{entry.name}"))


def _tree(place: Place, folder: str, folders: _Folders) -> Iterator[str]:
    """A folder and all visible folders below it."""
    if place.is_local:
        inner = _Folders()
        yield from (top.folder for top, _ in inner.below([_Top(folder, folder, folder)]))
        folders.again |= inner.again
        folders.nowhere |= inner.nowhere
        return
    yield folder
    for info in place.entries(folder, below=True):
        if info.type == pyarrow.fs.FileType.Directory and not is_hidden(_below(folder, info.path)):
            yield info.path


def _expand(place: Place, folder: str, patterns: list[str], folders: _Folders) -> Iterator[pyarrow.fs.FileInfo]:
    """Files and folders below `folder` that match shell patterns, one for each level; `**` is any number of levels."""
    if not patterns or patterns == ["**"]:
        yield place.info(folder)
        return
    first, *rest = patterns
    if first == "**":
        for inner in _tree(place, folder, folders):
            yield from _expand(place, inner, rest, folders)
        return
    for info in place.entries(folder):
        if fnmatch.fnmatchcase(info.base_name, first) and (not is_hidden(info.base_name) or first.startswith(".")):
            if not rest:
                yield info
            elif info.type == pyarrow.fs.FileType.Directory:
                yield from _expand(place, info.path, rest, folders)


def is_hidden(name: str) -> bool:
    """Whether any part of a path is hidden."""
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in name.split("/"))


def extension(name: str) -> str:
    """The ending of a name in lower case, with its dot."""
    lower = name.lower()
    return ".tar.gz" if lower.endswith(".tar.gz") else posixpath.splitext(lower)[1]
