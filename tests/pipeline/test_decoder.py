"""A decoder in a process of its own: what hangs it or ends it is refused, and the next image is decoded as ever."""

import functools
import io
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from saecore.images.decode import Decoded, ImageError, decode_image
from saecore.pipeline import decoder
from saecore.pipeline.decoder import Limited
from tests.helpers import decoders
from tests.helpers.decoders import PREPROCESS

ROOT = Path(__file__).parent.parent.parent

SECONDS = 0.5
"""The limit in these tests: a thousand times what their images take."""


def picture(number: int, side: int = 40) -> bytes:
    """A PNG of noise."""
    sink = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (side, side + number, 3), dtype=np.uint8)
    Image.fromarray(noise).save(sink, "PNG")
    return sink.getvalue()


def outcome(decode: Callable[[bytes], Any], data: bytes) -> tuple[Any, ...]:
    """Everything that a decoder says of an image."""
    try:
        decoded = decode(data)
    except ImageError as error:
        return error.reason, error.detail
    assert isinstance(decoded, Decoded)
    return decoded.pixels.shape, decoded.pixels.tobytes(), *decoded[1:]


def test_what_is_decoded_apart_is_what_is_decoded_here() -> None:
    """Pixels to the last bit, reasons to the last word; large images and small ones, in turn."""
    here = functools.partial(decode_image, preprocess=PREPROCESS)
    apart = Limited(here, 60.0)
    whole = picture(3)
    for data in (whole, picture(7, 2400), b"", b"no image", whole[:-30], picture(5), whole[:60], picture(1)):
        assert outcome(apart, data) == outcome(here, data)


@pytest.mark.parametrize("way", decoders.WAYS, ids=bytes.decode)
def test_what_hangs_or_ends_a_decoder_is_refused(way: bytes) -> None:
    limited = Limited(decoders.decode, SECONDS)
    expected = outcome(decoders.decode, picture(2))
    assert outcome(limited, picture(2)) == expected
    began = time.monotonic()
    reason, detail = outcome(limited, way)
    dies = way in (b"segmentation fault", b"abort", b"exit")
    assert reason == ("killed-worker" if dies else "timed-out")
    assert ("ended 2 times: " if dies else f"not done after {SECONDS:g} s") in detail
    assert dies or time.monotonic() - began >= SECONDS
    assert outcome(limited, picture(2)) == expected


def test_images_are_not_blamed_for_memory_that_runs_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system kills the process twice, and lets it live then; one that it kills always is refused."""
    pauses = list[float]()
    monkeypatch.setattr(decoder, "time", types.SimpleNamespace(sleep=pauses.append))  # threads of others sleep too
    decode = functools.partial(decoders.killed_until, marks=tmp_path, kills=2)
    expected = outcome(functools.partial(decode_image, preprocess=PREPROCESS), picture(4))
    assert outcome(Limited(decode, 60.0), picture(4)) == expected
    assert pauses == [1.0, 2.0]
    decode = functools.partial(decoders.killed_until, marks=tmp_path, kills=100)
    assert outcome(Limited(decode, 60.0), picture(4)) == ("killed-worker", "its decoder ended 5 times: SIGKILL")


def test_an_interrupted_answer_is_nobody_elses() -> None:
    """Ctrl-C while an image is decoded: what the decoder would have said is not taken for the next image."""
    limited = Limited(decoders.decode, 60.0)
    expected = [outcome(decoders.decode, picture(number)) for number in (1, 2)]
    assert outcome(limited, picture(1)) == expected[0]
    main = threading.main_thread().ident
    assert main is not None
    caught = threading.Event()

    def interrupt() -> None:
        time.sleep(0.3)
        signal.pthread_kill(main, signal.SIGINT)
        while not caught.wait(
            5
        ):  # Python does not see one that comes just before it begins to wait: a person asks again
            signal.pthread_kill(main, signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        limited(b"sleep")
    caught.set()
    sender.join()
    assert [outcome(limited, picture(number)) for number in (2, 1)] == expected[::-1]


@pytest.mark.parametrize(
    ("decode", "seconds", "sentence"),
    [
        (decoders.Unborn(), 60.0, "did not start: exit code 5"),
        (decoders.always_dies, 60.0, "ends with a blank image too: SIGABRT"),
        (decoders.decode, "60", "has a bug"),
    ],
    ids=["start", "every image", "bug"],
)
def test_a_decoder_that_decodes_nothing_refuses_no_image(decode: Any, seconds: Any, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        Limited(decode, seconds)(picture(1))


ORPHAN = """
import os, threading, time
from saecore.pipeline import decoder
from tests.helpers import decoders

limited = decoder.Limited(decoders.decode, 1.5)
try:
    limited(b"")
except Exception:
    pass
print(decoder._running.process.pid, flush=True)
limited(b"pause with the lock")
"""


def test_no_decoder_outlives_its_worker() -> None:
    """Also if it hangs when its worker is killed."""
    words = [sys.executable, "-c", ORPHAN]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as worker:
        assert worker.stdout is not None
        child = int(next(line for line in worker.stdout if line.strip().isdigit()))
        assert "hangs\n" in worker.stdout
        assert os.path.exists(f"/proc/{child}")
        worker.kill()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_copy_of_the_process_asks_a_decoder_of_its_own() -> None:
    limited = Limited(decoders.decode, 60.0)
    expected = outcome(decoders.decode, picture(1))
    assert outcome(limited, picture(1)) == expected
    assert decoder._running is not None
    original = decoder._running.process.pid
    copy = os.fork()
    if not copy:
        same = outcome(limited, picture(1)) == expected and decoder._running.process.pid != original
        os._exit(0 if same else 1)
    assert os.waitpid(copy, 0)[1] == 0
    assert decoder._running.process.pid == original
    assert outcome(limited, picture(1)) == expected
