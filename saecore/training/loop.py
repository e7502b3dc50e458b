"""Train an SAE on embeddings: one loop for one process and for many, which can be stopped anywhere and goes on exactly.

    survey (mean, scale, held-out rows) -> batches -> steps of `saecore.training.trainer` -> evaluations, checkpoints -> the SAE

    OUT/checkpoint.pt     weights, optimiser, counters, metrics so far
    OUT/metrics.parquet   figures of `saecore.evaluation.quality` on held-out rows, a row for each evaluation; also metrics.csv
    OUT/sae.safetensors, config.json, README.md      the SAE, as `saecore.sae.checkpoints.load_sae` reads it
    OUT/training.json     recipe, embeddings, final figures

On the CPU, with the same number of threads, a training that was stopped and resumed equals an unbroken one bit for bit: seed
and step decide everything that is random. Files appear whole or not at all.

Left out: the command line, signals and Ray (`jobs.train`).
"""

import dataclasses
import io
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch

from saecore.evaluation.quality import quality, recovery
from saecore.sae.model import CONFIG_FILE, SAE
from saecore.sae.sites import parse
from saecore.spellings import published
from saecore.storage import exists, join_uri, names_in, read_bytes, read_json, write_atomic
from saecore.training.batches import Batches
from saecore.training.embeddings import open_embeddings
from saecore.training.recipe import Recipe, pace, renamed
from saecore.training.survey import Survey, survey
from saecore.training.trainer import Trainer, Worker

CHECKPOINT_FILE, TRAINING_FILE = "checkpoint.pt", "training.json"

STARTED = {"metrics.parquet", "metrics.csv", "run.log", "ray"}
"""Files that a training may write before its first checkpoint."""

MAX_HELD_OUT = 16_384
"""The largest default number of held-out rows: figures on so many rows are steady in the third digit."""


@dataclasses.dataclass(frozen=True)
class Course:
    """When to look, when to save, when to stop."""

    held_out: int = -1
    """Rows kept for evaluation; -1 is a tenth, at most 16,384."""
    evaluations: int = 20
    """Evaluations in all, evenly spread."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; there is one at the end too."""


class Progress(Protocol):
    """Is told how a training goes, and may stop it."""

    def step(self, done: int, total: int, figures: dict[str, Any] | None) -> None:
        """`done` of `total` steps are done; `figures` are those of an evaluation, if this step had one."""

    def stop(self) -> bool:
        """Whether to save and stop. Only for a training in one process: other processes would wait for this one."""


class Silence:
    """A `Progress` that says nothing and lets it run."""

    def step(self, done: int, total: int, figures: dict[str, Any] | None) -> None:
        """See `Progress`."""

    def stop(self) -> bool:
        """See `Progress`."""
        return False


class Plan(NamedTuple):
    """A checked order to train, which is small and may be sent to other processes."""

    recipe: Recipe
    embeddings: str
    column: str
    out: str
    course: Course
    parts: dict[str, Any]
    """What changes results: recipe, embeddings, held-out rows."""


def make_plan(recipe: Recipe, embeddings: str, column: str, out: str, course: Course, workers: int = 1) -> Plan:
    """A plan to train. ValueError if recipe and embeddings do not fit, or if `out` holds another training or other files.

    Its sentence begins with the name of what is wrong: embeddings, held_out, batch_size or out.
    """
    try:
        source = open_embeddings(embeddings, column)
    except ValueError as error:
        raise ValueError(f"embeddings {error}") from error
    rows = int(source.block_rows.sum())
    held_out = min(rows // 10, MAX_HELD_OUT) if course.held_out < 0 else course.held_out
    if held_out < 1:
        raise ValueError(f"held_out {held_out}: of {rows:,} embeddings at least one must be held out")
    if rows - held_out < recipe.batch_size:
        raise ValueError(
            f"batch_size {recipe.batch_size}: there are {max(0, rows - held_out):,} embeddings to train on"
        )
    if recipe.batch_size % workers:
        raise ValueError(f"batch_size {recipe.batch_size} cannot be shared evenly by {workers} workers")
    parts = {"recipe": dataclasses.asdict(recipe), "embeddings": source.identity, "held-out": held_out}
    # As JSON gives it back: lists, not tuples.
    plan = Plan(recipe, embeddings, column, out, course, json.loads(json.dumps(parts)))
    _saved(plan)
    return plan


def completed(plan: Plan) -> dict[str, Any] | None:
    """The record of a training that has ended; None if it has not."""
    record = join_uri(plan.out, TRAINING_FILE)
    return read_json(record) if exists(record) else None


class Training:
    """A plan at work in one process."""

    def __init__(self, plan: Plan, worker: Worker) -> None:
        """Read all embeddings once; ValueError if nothing can be learnt from them."""
        self.plan, self.worker = plan, worker
        recipe, held_out = plan.recipe, plan.parts["held-out"]
        source = open_embeddings(plan.embeddings, plan.column)
        self.seen, self.model, self.site = survey(source, held_out, recipe.seed), source.model, parse(source.site)
        self.batches = Batches(source, self.seen.held_out, recipe.batch_size, recipe.seed)
        self.total = math.ceil(recipe.epochs * self.batches.steps_per_epoch)
        self.trainer = Trainer(recipe, source.width, self.seen, worker)
        state = _saved(plan)
        self.log = _Log(state["history"], state["loss"], state["seconds"]) if state else _Log([], 0.0, 0.0)
        if state:
            self.trainer.restore(state["trainer"])

    def run(self, progress: Progress, made_by: dict[str, Any]) -> dict[str, Any] | None:
        """Train to the end and write everything. Returns the record, or None if it was stopped or is not the first process."""
        course, log, trainer = self.plan.course, self.log, self.trainer
        evaluate_at = {math.ceil(self.total * (i + 1) / course.evaluations) for i in range(course.evaluations)}
        saved = mark = time.monotonic()
        for batch in self.batches.start(trainer.step):
            if trainer.step >= self.total:
                break
            log.loss += trainer.train(batch, self.total)
            log.seconds += time.monotonic() - mark
            if not self.worker.rank:
                figures = None
                if trainer.step in evaluate_at:
                    figures = log.evaluate(trainer, self.seen, self.total)
                    _write_metrics(self.plan.out, log.history)
                progress.step(trainer.step, self.total, figures)
                stop = progress.stop()
                if stop or trainer.step == self.total or time.monotonic() - saved > 60 * course.checkpoint_minutes:
                    state = {"parts": self.plan.parts, "trainer": trainer.state(), **log.state()}
                    _save(self.plan.out, state)
                    saved = time.monotonic()
                if stop and trainer.step < self.total:
                    return None
            mark = time.monotonic()  # the time of evaluations and of saving is not counted as training
        return None if self.worker.rank else self._finish(made_by)

    def _finish(self, made_by: dict[str, Any]) -> dict[str, Any]:
        sample, evaluation = (
            torch.from_numpy(rows).to(self.worker.device) for rows in (self.seen.sample, self.seen.evaluation)
        )
        sae, k = self.trainer.finished(sample, made_by.get("command", "")), self.plan.recipe.k
        # If all embeddings have length 1, the SAE has to bring others to length 1 too.
        site = dataclasses.replace(self.site, first="l2") if self.seen.unit_norm else self.site
        name, digest = published(self.model.name), self.model.sha256
        sae.config = dataclasses.replace(sae.config, site=str(site), model=name, model_sha256=digest)
        save_sae(sae, self.plan.out)
        record = {
            **self.plan.parts,
            "rows": self.seen.rows,
            "width": sae.config.n_inputs,
            "site": sae.config.site,
            "model": sae.config.model,
            "unit_norm": self.seen.unit_norm,
            "steps": self.total,
            "workers": self.worker.world,
            "seconds": round(self.log.seconds, 1),
            "figures": self.log.history[-1],
            "recovery": recovery(sae, evaluation, [max(1, k // 2), k, 2 * k, 4 * k]),
            **made_by,
        }
        write_atomic(join_uri(self.plan.out, TRAINING_FILE), (json.dumps(record, indent=2) + "\n").encode())
        return record


class _Log:
    """The evaluations so far, and the loss and the time since the last of them."""

    def __init__(self, history: list[dict[str, Any]], loss: float, seconds: float) -> None:
        self.history, self.loss, self.seconds = history, loss, seconds

    def state(self) -> dict[str, Any]:
        return {"history": self.history, "loss": self.loss, "seconds": self.seconds}

    def evaluate(self, trainer: Trainer, seen: Survey, total: int) -> dict[str, Any]:
        """Evaluate, and add a row to the metrics; returns the row."""
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


def save_sae(sae: SAE, out: str) -> None:
    """Write an SAE's files into a folder on any pyarrow filesystem, each whole or not at all; its config.json last."""
    with tempfile.TemporaryDirectory() as folder:
        sae.save(folder)
        for path in sorted(Path(folder).iterdir(), key=lambda path: (path.name == CONFIG_FILE, path.name)):
            write_atomic(join_uri(out, path.name), path.read_bytes())


def _save(out: str, state: dict[str, Any]) -> None:
    content = io.BytesIO()
    torch.save(state, content)
    write_atomic(join_uri(out, CHECKPOINT_FILE), content.getvalue())


def _saved(plan: Plan) -> dict[str, Any] | None:
    """The state to go on from, None if OUT is new; ValueError if OUT holds something else."""
    names = names_in(plan.out)
    if CHECKPOINT_FILE not in names:
        if names - STARTED:
            raise ValueError(f"out {plan.out} holds other files and no training; name a new or empty folder")
        return None
    content = read_bytes(join_uri(plan.out, CHECKPOINT_FILE))
    state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    before, now = _flat(state["parts"]), _flat(plan.parts)
    changed = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"out {plan.out} holds another training ({'; '.join(changed)}); name another folder for this one"
        )
    return state


def _flat(parts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parts.items() if key != "recipe"} | renamed(parts["recipe"])


def _write_metrics(out: str, history: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(history)
    for name, write in (("metrics.parquet", pq.write_table), ("metrics.csv", pyarrow.csv.write_csv)):
        sink = pa.BufferOutputStream()
        write(table, sink)
        write_atomic(join_uri(out, name), sink.getvalue())
