"""A decoder in a process of its own: an image that hangs it, or ends it, costs that process and becomes a row with a reason.

    encoded bytes -> Limited(decode, seconds) -> what decode returns, or ImageError

    timed-out       the decoder worked on the image for longer than the limit
    killed-worker   the decoder's process ended twice with the image, by a fault in native code or by the memory it took

Python cannot interrupt a decoder written in C. A thread that watches it is no help: most decoders hold the lock of the
interpreter, so that the thread does not run either. And a worker that ends itself would end the job, where the job is one
process. So the process that decodes is another one. The system's own timer ends it (SIGALRM, which Python here leaves to the
system), also if its parent is gone meanwhile. The next image gets a new process.

One process decodes for each process that calls, and stays until its caller ends. It answers in JSON and pixels: what it says is
read as data, since it has touched bytes that nobody trusts.

It costs 0.11 to 0.17 ms of CPU for each image (0.45 ms for a scene of the demo, 2.2 ms for a JPEG of 500 x 375), 0.15 s at the
start, and the memory of a Python with Pillow and NumPy.

Left out: a limit on memory; storage that hangs; and a model that hangs on its device.
"""

import dataclasses
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

TIMED_OUT = "timed-out"

IMAGE_SECONDS = 60.0
"""Seconds for one image. The largest picture that is allowed, 178 million pixels, takes 2 to 7 s on one core."""

KILLS = 5
"""SIGKILLs with one image before it is refused: the system sends them where memory runs out, which may be others' fault."""

_START = "import sys; sys.path[:] = sys.argv[2:]; from saecore.pipeline import decoder; decoder.serve(int(sys.argv[1]))"

_KEPT = 16 << 20
"""Bytes of an image above which its place on the paper is given back once it is decoded."""

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
"""For glibc. Without it the heap of so small a process shrinks after each picture and grows with the next: 0.5 ms."""


class _EndedError(Exception):
    """The decoder's process has ended."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code
        """As of subprocess: the negative number of a signal, or an exit code."""


@dataclasses.dataclass(frozen=True)
class Limited:
    """A decoder under a time limit. Small enough to travel to every worker."""

    decode: Callable[[bytes], Any]
    """Encoded bytes -> `saecore.images.decode.Decoded`; can be pickled."""
    seconds: float

    def __call__(self, data: bytes) -> Any:
        """As `decode`, in the other process; ImageError for an image that hangs the decoder or ends its process."""
        from saecore.images.decode import ImageError, blank  # not above: the other process needs neither
        from saecore.pipeline.isolation import DEATHS_ALONE, REASON

        for deaths in itertools.count(1):
            try:
                return self._ask(data)
            except _EndedError as ended:
                is_killed = ended.code == -signal.SIGKILL
                if ended.code == -signal.SIGALRM:
                    refused = ImageError(TIMED_OUT, f"its decoder was not done after {self.seconds:g} s")
                elif deaths >= (KILLS if is_killed else DEATHS_ALONE):
                    refused = ImageError(REASON, f"its decoder ended {deaths} times: {_cause(ended.code)}")
                else:
                    time.sleep(
                        2.0 ** (deaths - 1) if is_killed else 0.0
                    )  # the memory that others take may be free then
                    continue
            try:
                self._ask(blank())
            except _EndedError as ended:
                raise RuntimeError(f"the decoder ends with a blank image too: {_cause(ended.code)}") from None
            raise refused
        raise AssertionError

    def _ask(self, data: bytes) -> Any:
        spec = pickle.dumps((self.decode, self.seconds))
        with _lock:
            return _decoded(*_child(spec).ask(data))


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# ---- The side that asks.


class _Child:
    """The process that decodes, seen from the one that asks."""

    def __init__(self, spec: bytes) -> None:
        self.spec = spec
        self.paper = _paper()
        # -I: the folder in which the command was called must not provide modules.
        words = [sys.executable, "-I", "-c", _START, str(self.paper), *(path or os.getcwd() for path in sys.path)]
        self.process = subprocess.Popen(
            words,
            env=os.environ | _MALLOC,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self.paper],
            bufsize=0,
        )
        try:
            self.ask(spec)
        except _EndedError as ended:
            raise RuntimeError(f"the process that decodes images did not start: {_cause(ended.code)}") from None

    def ask(self, data: bytes) -> tuple[dict[str, Any], bytes]:
        """Hand over bytes and wait for the answer. If that is interrupted the process is ended: its answer would come late."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            os.pwrite(self.paper, data, 0)
            self.process.stdin.write(b"%d\n" % len(data))
            if (said := self.process.stdout.readline()).endswith(b"\n"):
                answer = json.loads(said)
                pixels = os.pread(self.paper, answer["bytes"], 0)
                if len(data) > _KEPT:
                    os.ftruncate(self.paper, 0)
                return answer, pixels
        except BrokenPipeError:
            pass
        except BaseException:
            self.process.kill()
            self.close()
            raise
        self.close()
        if self.process.returncode == os.EX_SOFTWARE:
            raise RuntimeError("the process that decodes images has a bug, which its standard error shows")
        raise _EndedError(self.process.returncode)

    def close(self) -> None:
        """Wait for the end of the process, and forget it."""
        global _running
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        os.close(self.paper)
        _running = None


_running: _Child | None = None
_lock = threading.Lock()


def _forget() -> None:
    """For a copy of this process (`os.fork`), which must not read the answers to the original's questions."""
    global _running, _lock
    _running, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _child(spec: bytes) -> _Child:
    """The process that decodes as `spec` says: the one that is there, or a new one."""
    global _running
    if _running is not None and _running.spec != spec:
        _running.close()
    if _running is None:
        _running = _Child(spec)
    return _running


def _decoded(answer: dict[str, Any], pixels: bytes) -> Any:
    """The answer to an image as `decode` gives it; raises what `decode` raised."""
    import numpy as np

    from saecore.images.decode import Decoded, ImageError

    if refused := answer.get("refused"):
        raise ImageError(*refused)
    if "memory" in answer:
        raise MemoryError(answer["memory"])
    if "raised" in answer:
        raise RuntimeError(answer["raised"])
    shown = np.frombuffer(pixels, np.uint8).reshape(answer["shape"])
    return Decoded(shown, answer["width"], answer["height"], answer["format"], tuple(answer["crop"]))


def _paper() -> int:
    """A file without a name, in memory where the system can: on it both processes write what is long."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("decoder")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


# ---- The side that decodes.


def serve(paper: int) -> None:
    """Decode what is written on the paper, each time that its length comes on standard input, until that is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides: Ctrl-C reaches every process of a terminal
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])  # a mask is inherited
    sink: Any = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        _serve(paper, sink)
    except BaseException:
        traceback.print_exc()
        os._exit(os.EX_SOFTWARE)  # an image that ends the decoder ends it in other ways


def _serve(paper: int, sink: BinaryIO) -> None:
    decode, seconds = None, 0.0
    for length in sys.stdin.buffer:
        data = os.pread(paper, int(length), 0)
        if decode is None:
            decode, seconds = pickle.loads(data)
            answer, pixels = dict[str, Any](), b""
        else:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            answer, pixels = _answer(decode, data)
            signal.setitimer(signal.ITIMER_REAL, 0)
        os.pwrite(paper, pixels, 0)
        sink.write(json.dumps(answer | {"bytes": len(pixels)}).encode() + b"\n")


def _answer(decode: Callable[[bytes], Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """What `decode` makes of an image: the words, and the pixels."""
    from saecore.images.decode import ImageError

    try:
        decoded = decode(data)
    except ImageError as error:
        return {"refused": [error.reason, error.detail]}, b""
    except MemoryError as error:
        return {"memory": str(error)}, b""
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}, b""
    said = {name: getattr(decoded, name) for name in ("width", "height", "format", "crop")}
    return said | {"shape": decoded.pixels.shape}, decoded.pixels.tobytes()
