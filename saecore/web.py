"""Files of a web server, to read from any position: fsspec's three questions (info, find, open) by the standard library.

fsspec's own filesystem for http takes a server that fails for a server that has no such file, so a shard would count as gone.
One answer is read on as long as what is wanted comes next, so a tar is one request. A server that knows no ranges answers with
the whole file, of which what comes before the wanted position is read and dropped.

Left out: lists of files, which web servers have in no common form; and credentials (`saecore.stores` refuses them).
"""

import email.utils
import io
import re
import urllib.error
import urllib.request
from typing import Any

SECONDS = 20.0
"""Without a byte for so long, the server is asked again."""

SKIPPED_BYTES = 1 << 20
"""Bytes that are read and dropped rather than asked for a new answer."""

_GONE = (404, 410)


class Files:
    """Web servers in the form of an fsspec filesystem."""

    protocol = "https"

    def info(self, url: str) -> dict[str, Any]:
        """Name, size and time of a file; FileNotFoundError if the server has none, ValueError for a wildcard."""
        if "*" in url:
            raise ValueError("a web server does not list its files: name each of them")
        with _answer(url, "bytes=0-0") as answer:
            total = re.fullmatch(r"bytes 0-0/(\d+)", answer.headers.get("Content-Range") or "")
            size = total[1] if answer.status == 206 and total else answer.headers.get("Content-Length")
            changed = (
                email.utils.parsedate_to_datetime(value) if (value := answer.headers.get("Last-Modified")) else None
            )
        if size is None or (answer.status == 206 and not total):
            raise OSError("the server does not say how long the file is")
        return {"name": url, "size": int(size), "type": "file", "mtime": changed}

    def find(self, url: str, **_: Any) -> dict[str, dict[str, Any]]:
        """Nothing: a server is asked for single files."""
        return {}

    def open(self, url: str, mode: str = "rb") -> "WebFile":
        """A file to read."""
        assert mode == "rb", "a web server's files are read"
        return WebFile(url, self.info(url)["size"])


def _answer(url: str, wanted: str) -> Any:
    request = urllib.request.Request(url, headers={"Range": wanted, "Accept-Encoding": "identity"})
    try:
        return urllib.request.urlopen(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in _GONE:
            raise FileNotFoundError(url) from error
        raise


class Positioned(io.RawIOBase):
    """A file of known size that is read from any position; `readinto` is left to be said."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        """As of any file."""
        return True

    def seekable(self) -> bool:
        """As of any file."""
        return True

    def size(self) -> int:
        """Bytes."""
        return self._size

    def tell(self) -> int:
        """As of any file."""
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET, /) -> int:
        """As of any file."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        self._position = max(0, start[whence] + position)
        return self._position


class WebFile(Positioned):
    """One file of a web server."""

    def __init__(self, url: str, size: int) -> None:
        super().__init__(size)
        self._url = url
        self._answer: Any = None
        self._stands = 0
        """The position of the next byte of the answer."""

    def readinto(self, buffer: Any, /) -> int:
        """As of any file."""
        if self._position >= self._size:
            return 0
        try:
            self._go()
            n_bytes = self._answer.readinto(buffer)
            if not n_bytes:
                raise ConnectionError(f"the server ended its answer at byte {self._position:,} of {self._size:,}")
        except BaseException:
            self._drop()
            raise
        self._position += n_bytes
        self._stands += n_bytes
        return n_bytes

    def _go(self) -> None:
        """Let the answer stand at the position."""
        if self._answer is None or not 0 <= self._position - self._stands <= SKIPPED_BYTES:
            self._drop()
            self._answer = _answer(self._url, f"bytes={self._position}-")
            self._stands = self._position if self._answer.status == 206 else 0
        while self._stands < self._position:
            skipped = len(self._answer.read(min(self._position - self._stands, SKIPPED_BYTES)))
            if not skipped:
                raise ConnectionError(f"the server ended its answer at byte {self._stands:,} of {self._size:,}")
            self._stands += skipped

    def _drop(self) -> None:
        if self._answer is not None:
            self._answer.close()
        self._answer = None

    def close(self) -> None:
        """As of any file."""
        self._drop()
        super().close()
