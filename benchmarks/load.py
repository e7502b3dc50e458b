"""Whether memory stays flat: the processes of a long run on Ray, one large tar, and the plan of very many shards.

Images and shards are made here, and are small where their number is what counts. Of the processes of a run, memory is what
each holds of its own: pages of Ray's object store, which all share, are not counted. Each step that needs no Ray runs in a
process of its own. Needs Linux, whose /proc tells the memory of other processes.
"""

import io
import itertools
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.query import alone
from saecore.demo.drawing import jpeg
from saecore.demo.scenes import SEED_DEMO, scene_at
from saecore.images.chunks import count_images, plan_chunks
from saecore.images.listing import list_shards
from saecore.images.preprocess import load_preprocess
from saecore.pipeline.isolation import Suspects
from saecore.pipeline.stages import Decode
from saecore.pipeline.steps import decode_chunk

SHARES = (0.1, 0.5, 1.0)
"""Parts of a run at which memory is told. At the first, all processes have warmed up."""

FLAT = 0.05
"""How much more a process may hold at the last of these than at the first, as a share."""

STREAM_BYTES = 1e9
"""Peak bytes of a process that scans or decodes a tar of any size."""

PLAN_BYTES, PLAN_BYTES_EACH = 300e6, 7e3
"""Peak bytes of a process that plans: what it holds whatever it plans, and what it may hold for each shard."""

PLAN_SECONDS, PLAN_SECONDS_EACH = 5.0, 3e-3
"""Seconds that a plan may take: whatever is planned, and for each shard on a local disk."""

EVERY = 0.3
"""Seconds between two looks at the processes of a run."""

DRAWN = 64
"""Different images of a run; they are repeated, since drawing takes longer than explaining."""

TINY = 64
"""Edge of these images, in pixels."""

NOISE = (700, 1000, 3)
"""A large image of the tar: 2.1 MB as BMP, which is decoded in little time."""

LINKS = 20_000
"""Names that one file is given: ext4 allows 65,000."""


# ---- A run on Ray.


class Sample(NamedTuple):
    """One look at the processes of a run."""

    share: float
    """Of the chunks, those that are committed."""
    held: dict[str, int]
    """Bytes of the largest process of each kind."""


def write_images(folder: Path, images: int, shards: int) -> None:
    """Tars of tiny images, of nearly equal length."""
    drawn = [jpeg(scene_at(SEED_DEMO, index), TINY) for index in range(min(DRAWN, images))]
    folder.mkdir(parents=True)
    for shard in range(shards):
        numbers = range(shard * images // shards, (shard + 1) * images // shards)
        write_tar(folder / f"shard-{shard:06d}.tar", (drawn[number % len(drawn)] for number in numbers), "jpg")


def write_tar(path: Path, contents: Iterator[bytes], ending: str) -> None:
    """A tar of images, numbered."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, data in enumerate(contents):
            member = tarfile.TarInfo(f"{number:08d}.{ending}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def run(folder: Path, images: int, shards: int, chunk_size: int) -> dict[str, Any]:
    """The memory of a run of the demo's models over so many images, by kind of process and share of the run."""
    write_images(folder / "images", images, shards)
    chunks = plan_chunks(list_shards([str(folder / "images")]), chunk_size).num_rows
    models = ["--clip", "demo", "--sae", "demo", "--allow-poor-fit"]
    where = ["--images", str(folder / "images"), "--chunk-size", str(chunk_size), "--out", str(folder / "run"), "--ray"]
    started = time.perf_counter()
    with open(folder / "said", "w+b") as said:
        command = [sys.executable, "-m", "jobs.explain", *models, *where]
        with subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT) as process:
            samples = list(watch(process, folder / "run" / "commits", chunks))
        said.seek(0)
        if process.returncode:
            raise RuntimeError(f"the run ended with exit code {process.returncode}: {said.read().decode()[-2000:]}")
    sizes = {"images": images, "shards": shards, "chunks": chunks}
    return sizes | {"seconds": time.perf_counter() - started, "held": at_shares(samples)}


def watch(process: subprocess.Popen[bytes], commits: Path, chunks: int) -> Iterator[Sample]:
    """Looks at a process and all that it started, until it ends."""
    while process.poll() is None:
        done = len(os.listdir(commits)) if commits.exists() else 0
        held = dict[str, int]()
        for pid in descendants(process.pid):
            kind, size = "driver" if pid == process.pid else kind_of(pid), own_bytes(pid)
            held[kind] = max(size, held.get(kind, 0))
        yield Sample(done / chunks, held)
        time.sleep(EVERY)


def descendants(ancestor: int) -> set[int]:
    """A process and all that it started, and these started."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _read(f"/proc/{entry}/stat")):
            parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    found, more = set[int](), {ancestor}
    while more:
        found |= more
        more = {pid for pid, parent in parents.items() if parent in more} - found
    return found


def kind_of(pid: int) -> str:
    """What a process of Ray's is for, by the title that Ray gives it."""
    title = _read(f"/proc/{pid}/cmdline")
    if not title.startswith("ray::"):
        return "Ray itself"
    return "replicas" if "MapWorker" in title else "workers that decode"


def own_bytes(pid: int) -> int:
    """What a process holds besides the memory that it shares with others; 0 if it has ended."""
    lines = (line.partition(":") for line in _read(f"/proc/{pid}/status").splitlines())
    return sum(int(size.split()[0]) for name, _, size in lines if name in ("RssAnon", "RssFile")) * 1024


def _read(path: str) -> str:
    """A file of /proc; "" if its process has ended."""
    try:
        return Path(path).read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def at_shares(samples: list[Sample]) -> dict[str, list[int]]:
    """By kind of process: the most bytes that one held until each of `SHARES` of the run was done, and until its end."""
    until = [next((place for place, one in enumerate(samples) if one.share >= share), -1) for share in SHARES]
    kinds = list(dict.fromkeys(itertools.chain.from_iterable(sample.held for sample in samples)))
    ends = [place + 1 if place >= 0 else len(samples) for place in until] + [len(samples)]
    return {kind: [max(sample.held.get(kind, 0) for sample in samples[:end]) for end in ends] for kind in kinds}


# ---- One large tar.


def write_large(path: Path, size: int) -> int:
    """A tar of about `size` bytes; returns how many images it holds."""
    random, large = np.random.default_rng(0), []
    for _ in range(4):
        sink = io.BytesIO()
        Image.fromarray(random.integers(0, 256, NOISE, np.uint8)).save(sink, "BMP")
        large.append(sink.getvalue())
    images = max(1, size // len(large[0]))
    write_tar(path, (large[number % len(large)] for number in range(images)), "bmp")
    return images


def stream(folder: Path, size: int) -> dict[str, Any]:
    """A tar of so many bytes: its scan, and the decoding of all its chunks one after the other."""
    path = folder / "large.tar"
    images = write_large(path, size)
    steps = {"scan": alone(scan, str(path), images), "decode": alone(decode, str(path), images)}
    return {"images": images, "bytes": path.stat().st_size, "steps": steps}


def scan(path: str, images: int) -> None:
    """The plan of one tar, as a run makes it."""
    assert count_images(plan_chunks(list_shards([path]))) == images


def decode(path: str, images: int) -> None:
    """Every chunk of one tar, as a worker decodes it."""
    step, witness, decoded = Decode(load_preprocess("demo")), Suspects(), 0
    plan = plan_chunks(list_shards([path]))
    for place in range(plan.num_rows):
        decoded += len(decode_chunk(plan.slice(place, 1), step, witness))
    assert (decoded, count_images(plan)) == (plan.num_rows, images)


# ---- Very many shards.


def plan(folder: Path, shards: int) -> dict[str, Any]:
    """The plan of so many tars of one tiny image each, in folders of a thousand: names of few files."""
    one = jpeg(scene_at(SEED_DEMO, 0), TINY)
    for number in range(shards):
        place = folder / f"{number // 1000:06d}" / f"{number:08d}.tar"
        if number % LINKS == 0:
            first = place
        if number % 1000 == 0:
            place.parent.mkdir(parents=True)
        if place == first:
            write_tar(place, iter([one]), "jpg")
        else:
            place.hardlink_to(first)
    return {"shards": shards, **alone(make_plan, str(folder), shards)}


def make_plan(folder: str, shards: int) -> None:
    """List and scan, as a run does before its first chunk."""
    assert plan_chunks(list_shards([folder])).num_rows == shards


# ---- What is told.


def told(figures: dict[str, Any]) -> str:
    """The figures as a person reads them: what was measured of them, and whether the aims are met."""
    parts: list[tuple[str, Callable[[dict[str, Any]], list[str]]]] = [
        ("run", _run_told),
        ("stream", _stream_told),
        ("plan", _plan_told),
    ]
    return "\n\n".join("\n".join(tell(figures[name])) for name, tell in parts if name in figures)


def _run_told(run: dict[str, Any]) -> list[str]:
    shares = "".join(f"{f'at {share:.0%}':>12}" for share in SHARES)
    lines = [f"{run['images']:,} images in {run['shards']:,} shards, {run['chunks']:,} chunks: {run['seconds']:,.0f} s"]
    lines.append(f"{'the largest process':26}{shares}{'at the end':>12}")
    lines += [f"{kind:26}" + "".join(f"{size / 1e9:>9.3f} GB" for size in held) for kind, held in run["held"].items()]
    for kind, (first, *_, last, _) in run["held"].items():
        more = last / first - 1
        lines.append(f"{kind}: {more:.1%} more at 100% than at 10%, aim {FLAT:.0%}: {_held(more, FLAT)}")
    return lines


def _stream_told(stream: dict[str, Any]) -> list[str]:
    return [f"a tar of {stream['bytes'] / 1e9:.2f} GB, {stream['images']:,} images"] + [
        f"{name}: {step['seconds']:,.1f} s, {step['peak_bytes'] / 1e9:.2f} GB, aim {STREAM_BYTES / 1e9:g}: "
        + _held(step["peak_bytes"], STREAM_BYTES)
        for name, step in stream["steps"].items()
    ]


def _plan_told(plan: dict[str, Any]) -> list[str]:
    size, seconds = (
        whatever + each * plan["shards"]
        for whatever, each in ((PLAN_BYTES, PLAN_BYTES_EACH), (PLAN_SECONDS, PLAN_SECONDS_EACH))
    )
    return [
        f"a plan of {plan['shards']:,} shards",
        f"time: {plan['seconds']:,.1f} s, aim {seconds:,.0f}: {_held(plan['seconds'], seconds)}",
        f"memory: {plan['peak_bytes'] / 1e9:.2f} GB, aim {size / 1e9:.2f}: {_held(plan['peak_bytes'], size)}",
    ]


def _held(value: float, aim: float) -> str:
    return "yes" if value <= aim else "NO"
