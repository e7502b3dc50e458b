"""What machines see of a run: a line of JSON for each chunk that is committed, and metrics of Ray where the run is on Ray.

    {"time": "2026-11-26T21:03:07.512+00:00", "event": "chunk", "run": "runs/photos", "chunk": 17, "shard": "/data/00003.tar",
     "images": 512, "refused": {"truncated": 1}, "bytes": 812345, "seconds": {"read": 0.2, "decode": 1.9, "explain": 2.4,
     "write": 0.1}, "host": "node-3", "pid": 4711, "done": 9216, "total": 102400, "images_per_second": 187.4}

    ray_relmap_images_total{run}            ray_relmap_chunks_total{run}            ray_relmap_bytes_total{run}
    ray_relmap_refused_total{run, reason}   ray_relmap_seconds_total{run, step}
    ray_relmap_done_images{run}             ray_relmap_planned_images{run}

`host` and `pid` are those of the process that committed the chunk. The driver counts the metrics, so each chunk counts once,
whatever was tried again. In a resumed run the counters begin at 0, and the gauge `done_images` where it was. Ray serves them to
Prometheus at the metrics port of the driver's machine.

Left out: events of the time before the first chunk and after the last; a log on an object store, which cannot be appended to.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from saecore.storage import writing

from .console import Progress

STDOUT = "-"


class Watchers:
    """Who is told of each chunk."""

    def __init__(self, run: str, progress: Progress, log: IO[str] | None, on_ray: bool) -> None:
        self.run, self.progress, self.log = run, progress, log
        self.metrics = Metrics(run, progress) if on_ray else None

    def tell(self, row: Mapping[str, Any]) -> None:
        """A chunk is committed: a row of `saecore.pipeline.steps`, which the progress has counted."""
        event = json.loads(row["event"])
        if self.metrics is not None:
            self.metrics.add(event)
        if self.log is not None:
            head = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "event": "chunk"}
            now = {"done": self.progress.done, "total": self.progress.total}
            rate = {"images_per_second": round(self.progress.rate(), 1)}
            self.write(head | {"run": self.run} | event | now | rate)

    def write(self, event: Mapping[str, Any]) -> None:
        """One line of the log."""
        if self.log is sys.stdout:
            print(json.dumps(event), flush=True)  # a reader that has gone is `commands.run_job`'s
        elif self.log is not None:
            with writing(self.log.name):
                print(json.dumps(event), file=self.log, flush=True)


@contextmanager
def watching(run: str, progress: Progress, log_json: str, on_ray: bool) -> Iterator[Watchers]:
    """Whoever watches a run. `log_json` is a local file to append to, `-` for standard output, or empty."""
    with contextlib.ExitStack() as stack:
        log: IO[str] | None = None
        if log_json == STDOUT:
            log = sys.stdout
        elif log_json:
            with writing(log_json):
                Path(log_json).parent.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(Path(log_json).open("a", encoding="utf-8"))
        yield Watchers(run, progress, log, on_ray)


class Metrics:
    """Ray's, which its agent on this machine serves to Prometheus."""

    def __init__(self, run: str, progress: Progress) -> None:
        from ray.util.metrics import Counter, Gauge

        def counter(name: str, what: str, *tags: str) -> Any:
            made = Counter(f"relmap_{name}", what, ("run", *tags))
            made.set_default_tags({"run": run})
            return made

        def gauge(name: str, what: str) -> Any:
            made = Gauge(f"relmap_{name}", what, ("run",))
            made.set_default_tags({"run": run})
            return made

        self.progress = progress
        self.images = counter("images", "Images of committed chunks, refused ones too.")
        self.refused = counter("refused", "Refused images of committed chunks.", "reason")
        self.chunks = counter("chunks", "Committed chunks.")
        self.bytes = counter("bytes", "Bytes of the files of committed chunks.")
        self.seconds = counter("seconds", "Seconds of work on committed chunks, of all processes.", "step")
        self.done = gauge("done_images", "Images of committed chunks, those of earlier sessions too.")
        gauge("planned_images", "Images of the run.").set(progress.total)
        self.done.set(progress.done)

    def add(self, event: Mapping[str, Any]) -> None:
        """Count a chunk."""
        self.chunks.inc(1)
        # Ray refuses to count nothing.
        for counter, n, tags in [
            (self.images, event["images"], {}),
            (self.bytes, event["bytes"], {}),
            *((self.refused, n, {"reason": reason}) for reason, n in event["refused"].items()),
            *((self.seconds, n, {"step": step}) for step, n in event["seconds"].items()),
        ]:
            if n > 0:
                counter.inc(n, tags)
        self.done.set(self.progress.done)
