"""Fit an SAE to embeddings: one loop, the same for one process and for many, that stops anywhere and goes on exactly.

    survey (mean, scale, held-out rows) -> batches -> steps of `saecore.trainer` -> evaluations, checkpoints -> the SAE

    OUT/checkpoint.pt     weights, optimiser, counters, metrics so far
    OUT/metrics.parquet   figures of `saecore.quality` on the held-out rows, one row an evaluation; metrics.csv is the same
    OUT/sae.safetensors, config.json, README.md      the SAE, as `saecore.checkpoints.load_sae` reads it
    OUT/training.json     recipe, embeddings, final figures

Stopped and resumed equals unbroken bit for bit on the CPU with the same number of threads: nothing random is drawn but by
seed and step. Files appear whole or not at all.
"""

import dataclasses
import io
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet as pq
import torch

from saecore.embeddings import Batches, Embeddings, Survey, survey
from saecore.quality import quality, recovery
from saecore.recipe import Recipe, pace
from saecore.sae import SAE
from saecore.storage import filesystem_of, join_uri, write_atomic
from saecore.trainer import Trainer, Worker

MAX_HELD_OUT = 16_384
"""Rows held out by default at most: figures on so many are steady in the third digit."""


@dataclasses.dataclass(frozen=True)
class Course:
    """When to look, when to save, when to stop."""

    held_out: int = -1
    """Rows kept for evaluation; -1 is a tenth, at most 16,384."""
    evaluations: int = 20
    """Evaluations in all, evenly spread."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; there is one at the end too."""


class Progress:
    """Told of every step; `stop` asks for a checkpoint and an early end."""

    def step(self, done: int, total: int, figures: dict[str, Any] | None) -> None:
        """`done` of `total` steps; `figures` are the newest evaluation's, once."""

    def stop(self) -> bool:
        """Asked after every step, in the first process only."""
        return False


def fit(
    recipe: Recipe,
    source: Embeddings,
    out: str,
    course: Course,
    worker: Worker,
    progress: Progress,
    made_by: dict[str, Any],
) -> dict[str, Any] | None:
    """Train to the end and write everything, or resume; returns training.json's content, None if stopped before.

    ValueError, in one sentence, for a recipe that does not fit the embeddings and for an OUT that holds another training.
    """
    rows = int(source.block_rows.sum())
    held_out = min(rows // 10, MAX_HELD_OUT) if course.held_out < 0 else course.held_out
    if held_out < 1:
        raise ValueError(f"--held-out {held_out}: {rows} embeddings, of which at least one must be held out")
    if rows - held_out < recipe.batch_size:
        raise ValueError(f"--batch-size {recipe.batch_size}: only {rows - held_out:,} embeddings to train on")
    if recipe.batch_size % worker.world:
        raise ValueError(f"--batch-size {recipe.batch_size} cannot be shared evenly by {worker.world} workers")
    parts = {
        "recipe": json.loads(json.dumps(dataclasses.asdict(recipe))),
        "embeddings": source.identity,
        "held-out": held_out,
    }
    state = _checkpoint(out, parts)
    seen = survey(source, held_out, recipe.seed)
    batches = Batches(source, seen.held_out, recipe.batch_size, recipe.seed)
    total = math.ceil(recipe.epochs * batches.steps_per_epoch)
    trainer = Trainer(recipe, source.width, seen, worker, rows - held_out, made_by.get("command", ""))
    log = _Log(state["history"], state["loss"], state["seconds"]) if state else _Log([], 0.0, 0.0)
    if state:
        trainer.restore(state["trainer"])
    evaluate_at = {math.ceil(total * (i + 1) / course.evaluations) for i in range(course.evaluations)} | {total}
    saved = mark = time.monotonic()
    figures: dict[str, Any] | None = None
    for batch in batches.start(trainer.step):
        if trainer.step >= total:
            break
        log.loss += trainer.train(batch, total)
        log.seconds, mark = log.seconds + time.monotonic() - mark, time.monotonic()
        if worker.rank:
            continue
        if trainer.step in evaluate_at:
            figures = log.evaluate(trainer, seen, total)
            _write_metrics(out, log.history)
        progress.step(trainer.step, total, figures)
        figures, stop = None, progress.stop()
        if trainer.step == total or stop or time.monotonic() - saved > 60 * course.checkpoint_minutes:
            _save(out, {"parts": parts, "trainer": trainer.state(), **log.state()})
            saved = time.monotonic()
        mark = time.monotonic()  # what evaluation and saving took is not training
        if stop and trainer.step < total:
            return None
    if worker.rank:
        return None
    return _finish(
        trainer, seen, out, log, {**parts, "status": "complete", "steps": total, "workers": worker.world, **made_by}
    )


class _Log:
    """What the metrics are made of."""

    def __init__(self, history: list[dict[str, Any]], loss: float, seconds: float) -> None:
        self.history, self.loss, self.seconds = history, loss, seconds

    def state(self) -> dict[str, Any]:
        return {"history": self.history, "loss": self.loss, "seconds": self.seconds}

    def evaluate(self, trainer: Trainer, seen: Survey, total: int) -> dict[str, Any]:
        """One more row of the metrics."""
        device = trainer.worker.device
        sae = trainer.finished(torch.from_numpy(seen.sample).to(device))
        before = self.history[-1]["step"] if self.history else 0
        embeddings = trainer.step * trainer.recipe.batch_size
        row = {
            "step": trainer.step,
            "embeddings": embeddings,
            "seconds": self.seconds,
            "rate": trainer.recipe.peak_rate() * pace(trainer.recipe, trainer.step - 1, total),
            "loss": self.loss / max(1, trainer.step - before),
            **quality(sae, torch.from_numpy(seen.evaluation).to(device))._asdict(),
            "dead_in_training": float(trainer.dead.double().mean()),
        }
        self.history.append(row)
        self.loss = 0.0
        return row


def _finish(trainer: Trainer, seen: Survey, out: str, log: _Log, record: dict[str, Any]) -> dict[str, Any]:
    device = trainer.worker.device
    sae = trainer.finished(torch.from_numpy(seen.sample).to(device))
    save_sae(sae, out)
    k = trainer.recipe.k
    record |= {
        "rows": seen.rows,
        "figures": log.history[-1],
        "recovery": recovery(sae, torch.from_numpy(seen.evaluation).to(device), [max(1, k // 2), k, 2 * k, 4 * k]),
        "seconds": round(log.seconds, 1),
    }
    write_atomic(join_uri(out, "training.json"), (json.dumps(record, indent=2) + "\n").encode())
    return record


def save_sae(sae: SAE, out: str) -> None:
    """Write an SAE's files into a folder on any pyarrow filesystem, each whole or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        sae.save(folder)
        for path in sorted(Path(folder).iterdir()):
            write_atomic(join_uri(out, path.name), path.read_bytes())


def _save(out: str, state: dict[str, Any]) -> None:
    content = io.BytesIO()
    torch.save(state, content)
    write_atomic(join_uri(out, "checkpoint.pt"), content.getvalue())


def _checkpoint(out: str, parts: dict[str, Any]) -> dict[str, Any] | None:
    """The state to go on from, None if OUT is new; ValueError if it holds something else."""
    filesystem, path = filesystem_of(out)
    names = {info.base_name for info in filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))}
    if "checkpoint.pt" not in names:
        if names - {"metrics.parquet", "metrics.csv", "run.log"}:
            raise ValueError(f"--out {out} holds other files and no training; name a new or empty folder")
        return None
    with filesystem.open_input_stream(f"{path}/checkpoint.pt") as stream:
        state = torch.load(io.BytesIO(stream.read()), weights_only=True, map_location="cpu")
    before, now = _flat(state["parts"]), _flat(parts)
    changed = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(f"--out {out} holds another training ({'; '.join(changed)}); name another folder for this one")
    return state


def _flat(parts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parts.items() if key != "recipe"} | parts["recipe"]


def _write_metrics(out: str, history: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(history)
    for name, write in (("metrics.parquet", pq.write_table), ("metrics.csv", pyarrow.csv.write_csv)):
        sink = pa.BufferOutputStream()
        write(table, sink)
        write_atomic(join_uri(out, name), sink.getvalue())
