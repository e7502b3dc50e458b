"""Train a sparse autoencoder on embeddings.

    python -m jobs.train --embeddings runs/cc3m --architecture matryoshka --latents 6144 --out runs/sae
    python -m jobs.train --embeddings s3://bucket/cc3m --latents 24576 --workers 8 --out s3://bucket/sae

It trains in this process or, with --workers, on Ray Train: the same loop (`saecore.training.loop`), data parallel, with the
same result for one worker. The same command again resumes from the last checkpoint. Ctrl-C finishes the step, saves and stops.

Left out: sweeps (run the command several times); embeddings that are made in training (`jobs.embed` writes them once).
"""

import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import tyro

from saecore import storage
from saecore.storage import exists, join_uri, read_parquet, resolved, write_atomic
from saecore.training.plot import training_plot
from saecore.training.recipe import Recipe

from . import cluster, commands, console, origin, signals
from .summaries import training_header, training_line, training_summary

LINES_EVERY = 10.0
"""Seconds between progress lines while there is no evaluation."""

PLOT_FILE = "training.png"

MAX_FAILURES = 3
"""How often Ray Train starts again from the last checkpoint after a worker is lost."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a sparse autoencoder on embeddings."""

    embeddings: str
    """A run of jobs.embed, or of jobs.explain --keep-embeddings; NAME_rows_width.npy; or Parquet with a column of lists."""
    out: str
    """Folder for the SAE, local or s3:// or gs://, which all workers can reach. The same command again resumes."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    """How to train."""
    column: str = "embedding"
    """Parquet column that holds the embeddings."""
    held_out: int = -1
    """Embeddings held out for evaluation; -1 stands for a tenth of them, but at most 16384."""
    evaluations: int = 20
    """Evaluations on the held-out embeddings, evenly spread over the training."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints."""
    workers: int = 0
    """Workers of Ray Train, each with one GPU if there are GPUs; 0 trains in this process, without Ray."""

    def check(self) -> None:
        """See `commands.Checked.check`."""
        with commands.given_fields(self.recipe):
            self.recipe.check()
        commands.at_least(self, held_out=-1, evaluations=1, workers=0, checkpoint_minutes=0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: train(sys.argv[1:] if argv is None else list(argv)))


def train(argv: list[str]) -> int:
    """Check everything, train, and print the results."""
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "train")
    made_by = {
        "command": commands.called("train", *argv),
        "versions": origin.versions(),
        "git_commit": origin.git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    out = resolved(arguments.out)  # the workers of Ray Train run elsewhere
    with console.quiet() as log:
        from saecore.training.loop import TRAINING_FILE, Course, completed, make_plan  # slow: PyTorch comes with it

        course = Course(arguments.held_out, arguments.evaluations, arguments.checkpoint_minutes)
        with commands.mistakes():
            if arguments.workers:
                cluster.check_answers()
            if not storage.exists(join_uri(out, TRAINING_FILE)):
                commands.check_writable("--out", out)
            embeddings, n_workers = resolved(arguments.embeddings), max(1, arguments.workers)
            with commands.given_fields(arguments, arguments.recipe):
                plan = make_plan(arguments.recipe, embeddings, arguments.column, out, course, n_workers)
        log.run = out
        record = completed(plan)
        if record is not None:
            print(f"{arguments.out} is complete: nothing to do")
        else:
            record = work(plan, made_by, arguments.workers)
        write_atomic(join_uri(out, PLOT_FILE), training_plot(read_metrics(out)))
    print(training_summary(record, arguments.out))
    return 0


def work(plan: Any, made_by: dict[str, Any], workers: int) -> dict[str, Any]:
    """Train to the end; `commands.UnfinishedError` if the training is stopped, or fails, before."""
    try:
        return on_ray(plan, made_by, workers) if workers else in_process(plan, made_by)
    except commands.MistakeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        raise commands.UnfinishedError("the same command resumes from the last checkpoint") from error


class Lines:
    """A `saecore.training.loop.Progress` that prints a line at times, and every evaluation. Ctrl-C stops it."""

    def __init__(self) -> None:
        self.asked: int | None = None
        """The signal that asked to stop."""
        self._began: tuple[float, int] | None = None
        self._last = 0.0

    def step(self, done: int, total: int, figures: dict[str, Any] | None) -> None:
        now = time.perf_counter()
        if self._began is None:
            self._began, self._last = (now, done), now
            print(training_header(), flush=True)
        if figures is not None:
            print(training_line(figures), flush=True)
            self._last = now
        elif now - self._last >= LINES_EVERY:
            self._last = now
            pace = (done - self._began[1]) / max(now - self._began[0], 1e-9)
            left = (total - done) / pace if pace else 0.0
            print(
                f"{done:>9,} of {total:,} steps, {pace:,.1f} a second, {int(left // 60)}:{int(left % 60):02d} left",
                flush=True,
            )

    def stop(self) -> bool:
        return self.asked is not None


@contextmanager
def stopping_on_signals(lines: Lines) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for a checkpoint; a second one ends the process at once."""

    def ask(number: int, frame: Any) -> None:
        lines.asked = number
        for each in signals.SIGNALS:
            signal.signal(each, signals.end_at_once)

    with signals.kept():
        if threading.current_thread() is threading.main_thread():
            for each in signals.SIGNALS:
                signal.signal(each, ask)
        yield


def in_process(plan: Any, made_by: dict[str, Any]) -> dict[str, Any]:
    """Train in this process. If a signal asks to stop, the training saves, and the process then ends as every job does."""
    import torch

    from saecore.training.loop import Training
    from saecore.training.trainer import Worker

    lines = Lines()
    with commands.mistakes():
        training = Training(plan, Worker(device="cuda" if torch.cuda.is_available() else "cpu"))
    with stopping_on_signals(lines):
        record = training.run(lines, made_by)
    if lines.asked is not None and record is None:
        signal.raise_signal(lines.asked)
    assert record is not None
    return record


def on_ray(plan: Any, made_by: dict[str, Any], workers: int) -> dict[str, Any]:
    """Train on Ray Train, data parallel. If a worker is lost, the training starts again from the last checkpoint."""
    with commands.mistakes():
        has_gpus = connect(workers)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from saecore.training.loop import completed

    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={"plan": plan, "made_by": made_by},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=has_gpus),
        run_config=RunConfig(
            name="train",
            storage_path=join_uri(plan.out, "ray"),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    finished = threading.Event()
    watch = threading.Thread(target=print_evaluations, args=(plan.out, finished), daemon=True)
    watch.start()
    try:
        trainer.fit()
    finally:
        finished.set()
        watch.join()
    record = completed(plan)
    assert record is not None
    return record


def connect(workers: int) -> bool:
    """Join or start Ray; returns whether each worker gets a GPU. ValueError for workers that would wait for CPUs for ever."""
    cluster.connect(workers)
    nodes = cluster.nodes()
    if sum(int(node.gpus) for node in nodes) >= workers:
        return True
    if (cpus := sum(node.cpus for node in nodes)) < workers:
        raise ValueError(f"--workers {workers}: each takes a CPU, and this cluster has {cpus}")
    return False


def train_on_worker(config: dict[str, Any]) -> None:
    """The part of one worker."""
    import ray.train
    import ray.train.torch

    from saecore.training.loop import Silence, Training
    from saecore.training.trainer import Worker

    context = ray.train.get_context()
    device = str(ray.train.torch.get_device())
    worker = Worker(context.get_world_rank(), context.get_world_size(), device)
    Training(config["plan"], worker).run(Silence(), config["made_by"])


def print_evaluations(out: str, finished: threading.Event) -> None:
    """Print the evaluations in OUT's metrics as they are written: what workers print does not reach this terminal."""
    printed = 0
    while True:
        last = finished.wait(1.0)
        rows = read_metrics(out)
        if rows and not printed:
            print(training_header(), flush=True)
        for row in rows[printed:]:
            print(training_line(row), flush=True)
        printed = len(rows)
        if last:
            return


def read_metrics(out: str) -> list[dict[str, Any]]:
    """The evaluations so far."""
    metrics = join_uri(out, "metrics.parquet")
    return read_parquet(metrics).to_pylist() if exists(metrics) else []


if __name__ == "__main__":
    sys.exit(main())
