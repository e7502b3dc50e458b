"""Ask a store again that fails for a moment: a bounded number of times, after longer and longer waits, each said in the log.

    retried(uri, ask)     what `ask` returns, once the store answers
    PatientFile           a file of a store, each of whose reads is `retried`

What passes by itself is asked again: a connection that breaks, no answer in time, HTTP 408, 429 and 5xx. What does not (no such
file, no right to read it) is raised at once. pyarrow's client for S3 asks three times by itself, within two seconds and without
a word (`saecore.stores`); what is said and counted here comes after that.

A line is a warning of Python's logging, which reaches standard error: run.log, or the log of a worker of Ray.
"""

import logging
import random
import re
import threading
import time
import urllib.error
from collections.abc import Callable
from http.client import HTTPException
from typing import Any, TypeVar

from saecore.stores import without_secrets
from saecore.web import Positioned

ATTEMPTS = 5
"""How often a store is asked before it counts as down."""

FEWER_ATTEMPTS = {"hf": 2, "gs": 2, "gcs": 2}
"""The same for stores whose clients ask again and again by themselves, for 20 s each time."""

FIRST_WAIT = 1.0
"""Seconds before the second attempt, at most; each wait is twice the one before, and shortened by chance so that workers do not
come back together."""

DOWN_SECONDS = 60.0
"""After a store has counted as down, each question to it has one attempt for so long: many threads, or the many pictures of a
page, do not wait each time."""

LINE_SECONDS = 2.0
"""Between two lines of one process at least. What is not said is counted."""

_PASSING = re.compile(
    # pyarrow's names for answers of S3, in the way it writes them; curl gives up (`curlCode`) when nothing moves.
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|INTERNAL_SERVER_ERROR|THROTTLING"
    r"|REQUEST_TIMEOUT|REQUEST_EXPIRED)|HTTP status (5\d\d|408|429)|curlCode"
    # Those of Google's client, which has asked for `saecore.stores.GS_SECONDS` itself.
    r"|\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED)\b",
)

_CLIENTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
"""Packages whose exceptions huggingface_hub lets through; not all of them are OSErrors."""

_log = logging.getLogger(__name__)

T = TypeVar("T")


class StoreDownError(OSError):
    """A store failed as often as it was asked. The message is what it said last, and how often it was asked."""


def passes(error: BaseException) -> bool:
    """Whether a failure may pass by itself."""
    status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    if type(error).__name__ == "OfflineModeIsEnabled":  # huggingface_hub's, with HF_HUB_OFFLINE=1
        return False
    if isinstance(error, ConnectionError | TimeoutError | HTTPException | urllib.error.URLError):
        return True
    return _of_client(error) or (isinstance(error, OSError) and _PASSING.search(str(error)) is not None)


def _of_client(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _CLIENTS


def retried(uri: str, ask: Callable[[], T]) -> T:
    """What `ask` returns; `StoreDownError` once it has failed `ATTEMPTS` times by what may pass."""
    store, started = uri.partition("?")[0].split("/", 3)[:3], time.monotonic()
    attempts = 1 if _down.is_down(tuple(store)) else FEWER_ATTEMPTS.get(uri.partition("://")[0], ATTEMPTS)
    for attempt in range(1, attempts + 1):
        try:
            return ask()
        except Exception as error:
            if not passes(error):
                raise
            if attempt == attempts:
                _down.note(tuple(store))
                times = (
                    f"asked {attempts} times in {time.monotonic() - started:.0f} s" if attempts > 1 else "asked once"
                )
                raise StoreDownError(f"{said(error)} ({times})") from error
            wait = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
            _lines.say(f"{uri}: {said(error)}; asking again in {wait:.1f} s ({attempt + 1} of {attempts})")
            time.sleep(wait)
    raise AssertionError("attempts is at least 1")


def said(error: BaseException) -> str:
    """What a store or the system says, in one line without secrets. In pyarrow's sentences that is the part after `Detail:`."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        error = error.reason
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return without_secrets(" ".join(text.rsplit("Detail: ", 1)[-1].split()))


class _Down:
    """Which stores have counted as down, and when."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, ...], float] = {}

    def is_down(self, store: tuple[str, ...]) -> bool:
        return time.monotonic() - self._since.get(store, -DOWN_SECONDS) < DOWN_SECONDS

    def note(self, store: tuple[str, ...]) -> None:
        self._since[store] = time.monotonic()

    def forget(self) -> None:
        self._since.clear()


class _Lines:
    """Says what is asked again, not more often than a reader can follow."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last, self._unsaid = -LINE_SECONDS, 0

    def say(self, line: str) -> None:
        with self._lock:
            if time.monotonic() - self._last < LINE_SECONDS:
                self._unsaid += 1
                return
            more = f" (and {self._unsaid} other retries since the last line)" if self._unsaid else ""
            self._last, self._unsaid = time.monotonic(), 0
        _log.warning("%s%s", line, more)


_down, _lines = _Down(), _Lines()


class PatientFile(Positioned):
    """A file of a store to read from any position. A read that fails is asked for again, from the position where it began."""

    def __init__(self, file: Any, size: int, patiently: Callable[[Callable[[], int]], int]) -> None:
        super().__init__(size)
        self._file, self._patiently = file, patiently

    def readinto(self, buffer: Any, /) -> int:
        """As of any file."""
        if self._position >= self._size:  # stores refuse to seek there
            return 0

        def ask() -> int:
            self._file.seek(self._position)
            return self._file.readinto(buffer)

        n_bytes = self._patiently(ask)
        self._position += n_bytes
        return n_bytes

    def close(self) -> None:
        """As of any file."""
        if not self.closed:
            self._file.close()
        super().close()
