"""Large images: bit for bit what small ones are, in bounded memory, one at a time on a machine."""

import io
import multiprocessing
import signal
import struct
import sys
import threading
import time
import zlib
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.load import own_bytes
from saecore.images import decode, turns
from saecore.images.preprocess import load_preprocess

EDGE = 11_600
"""Pixels: a grey PNG of 135 megapixels, in which Pillow decodes to one byte a pixel and then to four."""

PICTURE = 5 * EDGE**2

PROCESSES, PICTURES = 2, 2


def grey_png(edge: int) -> bytes:
    """A PNG of one grey, written by hand: Pillow would take longer."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", edge, edge, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(edge * (edge + 1)), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def decode_some(data: bytes, start: Barrier) -> None:
    start.wait()
    for _ in range(PICTURES):
        assert not decode.decode_image(data, load_preprocess("demo")).pixels.any()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory of other processes")
@pytest.mark.slow
def test_several_large_pictures_take_the_memory_of_one() -> None:
    """Two processes with two pictures each; without turns the sum reaches two pictures."""
    context = multiprocessing.get_context("spawn")
    start, data = context.Barrier(PROCESSES + 1), grey_png(EDGE)
    processes = [context.Process(target=decode_some, args=(data, start)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    start.wait(60)
    before = most = sum(own_bytes(process.pid or 0) for process in processes)
    while any(process.is_alive() for process in processes):
        most = max(most, sum(own_bytes(process.pid or 0) for process in processes))
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    assert 0.7 * PICTURE < most - before < 1.3 * PICTURE


def test_a_timer_stands_still_while_a_large_picture_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of time is for the decoder's work, not for the work of others."""
    alarms, taken, done = list[int](), threading.Event(), threading.Event()
    before = signal.signal(signal.SIGALRM, lambda number, frame: alarms.append(number))

    def hold() -> None:
        with turns.turn("PNG", 10**8):
            taken.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert taken.wait(60)
        threading.Timer(0.4, done.set).start()
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with turns.turn("PNG", 1000):
            assert not done.is_set()  # a small one does not wait
        with turns.turn("PNG", 10**8):
            left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
            assert done.is_set()
    finally:
        done.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        holder.join()
    assert not alarms
    assert 0 < left <= 0.2


def pictures() -> dict[str, bytes]:
    """One of each mode that is made RGB in strips."""
    random = np.random.default_rng(5)
    palette = Image.fromarray(random.integers(0, 256, (50, 37, 3), np.uint8)).quantize(16)
    colours = palette.convert("RGB")
    deep = Image.fromarray(random.integers(0, 40, (50, 37)).astype(np.uint16) * 1000)
    images: dict[str, tuple[Image.Image, Any]] = {
        "RGBA": (Image.fromarray(random.integers(0, 256, (50, 37, 4), np.uint8), "RGBA"), None),
        "LA": (Image.fromarray(random.integers(0, 256, (50, 37, 2), np.uint8), "LA"), None),
        "P": (palette, 3),
        "RGB": (colours, colours.getpixel((0, 0))),
        "I;16": (deep, None),
        "I;16 clear": (deep, 7000),
    }
    written = {}
    for name, (image, clear) in images.items():
        sink = io.BytesIO()
        image.save(sink, "PNG", **({} if clear is None else {"transparency": clear}))
        written[name] = sink.getvalue()
    return written


@pytest.mark.parametrize("name", list(pictures()))
def test_strips_change_no_pixel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pictures()[name]
    whole = np.asarray(decode.open_rgb(data).image)
    monkeypatch.setattr(decode, "STRIP_PIXELS", 3 * 37 + 1)  # 17 strips, the last of two rows
    assert np.array_equal(np.asarray(decode.open_rgb(data).image), whole)
    assert len(np.unique(whole)) > 10
