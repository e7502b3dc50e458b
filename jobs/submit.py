"""A command to a Ray cluster: check it here, send it, follow its log, end with its exit code.

    python -m jobs.submit --address http://HOST:8265 -- explain --images s3://b/shards --clip CLIP --sae SAE --out s3://b/run
    python -m jobs.submit --address http://HOST:8265 --follow ID

The command after `--` is read by its own parser before anything leaves this machine; then the cluster is found
(`jobs.dashboard`), and places are looked at from here as far as this machine may. The job's process gets the folders `jobs` and
`saecore` of this checkout, or uses the package that is installed there, and the git commit in an environment variable
(`jobs.origin`). What was sent is kept in RUN/submissions.

Left out: packages, which the cluster's machines must have; retries, since the same command again resumes.
"""

import dataclasses
import importlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from saecore.runs.run import SUBMISSIONS
from saecore.storage import WriteError, join_uri, reason, resolved, write_atomic

from . import __main__, commands, dashboard, exits, origin
from .order import Order, placed

CHECKOUT = Path(__file__).parent.parent

SENT = ("jobs", "saecore")
"""Folders of a checkout that a job needs. Nothing else of it leaves this machine."""

LARGEST = 500 << 20
"""Bytes that Ray takes as the files of a job."""

RUNS = dict.fromkeys(("explain", "embed", "run", "train"), "out")
RUNS |= dict.fromkeys(("index", "name", "report", "retry"), "run")
"""Command -> the argument that names the folder which gets the record of a submission."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Take a command to a Ray cluster, and follow it there.

    --address names the cluster. The command comes after `--`, without the word relmap. For a job that is there, give --follow
    or --stop, and no command.
    """

    address: str = ""
    """The cluster's dashboard, http://HOST:8265; else that of RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else of this machine."""
    installed: bool = False
    """Run the relmap that is installed on the cluster, and send no files."""
    shared_disk: bool = False
    """All machines of the cluster see the paths of this one. Without it paths are taken only if this machine is the cluster."""
    env: tuple[str, ...] = ()
    """Environment variables of the job: NAME takes the value that it has here, NAME=VALUE sets one. No value is recorded."""
    no_wait: bool = False
    """Send the job, say how to follow and how to stop it, and end."""
    submission_id: str = ""
    """What the job is called; by default the time and a random number."""
    follow: str = ""
    """Follow the job of this id, from the beginning of its log, and end with its exit code."""
    stop: str = ""
    """Stop the job of this id."""

    def check(self) -> None:
        """See `commands.Checked.check`."""
        if self.follow and self.stop:
            raise ValueError("give either --follow or --stop")
        for name in (self.submission_id, self.follow, self.stop):
            if name and not re.fullmatch(r"[\w.-]{1,100}", name):
                raise ValueError(f"{name}: a job's id has letters, digits, points, _ and -")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: submit(sys.argv[1:] if argv is None else list(argv)))


def submit(argv: list[str]) -> int:
    """Check everything, send the job, follow it."""
    with commands.mistakes():
        end = argv.index("--") if "--" in argv else len(argv)
        arguments = commands.parse(Arguments, argv[:end], "submit")
        is_there = arguments.follow or arguments.stop
        order = None if is_there else read(argv[end + 1 :])
        if is_there and argv[end:]:
            raise ValueError("--follow and --stop take no command")
        values = env_vars(arguments.env)
        address = dashboard.address_of(arguments.address)
        client = dashboard.connect(address)
        if arguments.stop:
            was_running = dashboard.stop(client, arguments.stop)
            print(f"{arguments.stop} {'is stopped' if was_running else 'had ended before'}")
            return 0
        if order is not None:
            words = placed(order, arguments.shared_disk or dashboard.is_here(address))
            job = send(client, arguments, Order(order.name, words, order.arguments), values, address)
        else:
            job = arguments.follow
            dashboard.check_known(client, job)
    again = Again(address, job)
    if arguments.no_wait:
        print(again.text())
        return 0
    return followed(client, again)


# ---- What to send.


def read(words: list[str]) -> Order:
    """The command, read by its own parser: SystemExit 2 or ValueError for what is wrong with it."""
    if not words:
        example = f"{commands.program('submit')} -- explain --demo --out RUN"
        raise ValueError(f"name a command after --, for example: {example}")
    name, *rest = words
    if name == "submit":
        raise ValueError("submit: name the command that is to run on the cluster")
    if name not in __main__.NAMES:
        raise ValueError(__main__.unknown(name).removeprefix("error: "))
    module: ModuleType = importlib.import_module(f".{name}", __package__)
    own = getattr(module, "parse", None)
    return Order(name, rest, own(rest) if own else commands.parse(module.Arguments, rest, name))


def env_vars(given: Sequence[str]) -> dict[str, str]:
    """Names and values of environment variables; ValueError, without a value in it, for what names none."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError("--env takes NAME, or NAME=VALUE, and a name has letters, digits and _")
        if not equals and name not in os.environ:
            raise ValueError(f"--env {name}: this environment has no such variable; --env {name}=VALUE sets it")
        found[name] = value if equals else os.environ[name]
    return found


# ---- Send it.


def send(client: Any, arguments: Arguments, order: Order, values: dict[str, str], address: str) -> str:
    """Give the job to the cluster, and keep what was sent; the job's id. ValueError if the cluster refuses."""
    job = arguments.submission_id or f"relmap-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    is_checkout = not (arguments.installed or commands.IS_INSTALLED)
    commit = origin.git_commit() if is_checkout else None  # what is installed there has a commit of its own
    own = {"RAY_JOB_STOP_WAIT_TIME_S": str(dashboard.STOP_SECONDS)} | ({origin.COMMIT: commit} if commit else {})
    start = ["python", "-m", "jobs"] if is_checkout else ["relmap"]
    entrypoint = shlex.join([*start, order.name, *order.words])
    with tempfile.TemporaryDirectory() as folder:
        environment: dict[str, Any] = {"env_vars": own | values}
        if is_checkout:
            environment["working_dir"] = copied(CHECKOUT, Path(folder))
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=environment)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"the cluster does not take the job: {dashboard.reason(error)}") from error
    record = {
        "submission_id": job,
        "command": shlex.join(["relmap", order.name, *order.words]),
        "config": dataclasses.asdict(order.arguments),
        "address": dashboard.without_secrets(address),
        "sent": list(SENT) if is_checkout else [],
        "env": sorted(values),
        "git_commit": commit,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    keep(order, job, record)
    print(f"submitted     {job} to {record['address']}", flush=True)
    return job


def copied(checkout: Path, folder: Path) -> str:
    """The folder with a copy of what a job needs of a checkout; ValueError if Ray would not take so much.

    A copy, since patterns of what Ray is to omit would have to name all that may lie in a checkout, secrets too.
    """
    for name in SENT:
        shutil.copytree(checkout / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST:
        raise ValueError(f"{checkout} holds {size / 1e6:,.0f} MB of code, and Ray takes {LARGEST / 1e6:,.0f} MB")
    print(f"sends         {' and '.join(SENT)} of {checkout}, {size / 1e6:.1f} MB", flush=True)
    return str(folder)


def keep(order: Order, job: str, record: dict[str, Any]) -> None:
    """Write what was sent into the run folder; where that cannot be written from here, say so: the job has been sent."""
    folder = getattr(order.arguments, RUNS.get(order.name, ""), "")
    if not folder or getattr(order.arguments, "dry_run", False):
        return
    data = json.dumps(record, indent=1, default=str).encode()
    try:
        write_atomic(join_uri(resolved(folder), SUBMISSIONS, f"{job}.json"), data)
    except (WriteError, OSError, ValueError) as error:
        print(f"not recorded  {folder}/{SUBMISSIONS}: {reason(error.__cause__ or error)}", flush=True)


# ---- Follow it.


class Again(NamedTuple):
    """Where a job is: enough to come back to it."""

    address: str
    job: str

    def line(self, flag: str) -> str:
        """The command that follows or stops the job."""
        return commands.line("submit", "--address", dashboard.without_secrets(self.address), flag, self.job)

    def text(self) -> str:
        """How to follow and how to stop the job."""
        return f"follow        {self.line('--follow')}\nstop          {self.line('--stop')}"


def followed(client: Any, again: Again) -> int:
    """A job's exit code, once it has ended. Ctrl-C asks at a terminal whether to stop the job; elsewhere the job goes on."""
    try:
        code = dashboard.follow(client, again.job)
    except dashboard.LostError as error:
        print(f"failed: {again.job} can no longer be followed: {error}\n{again.text()}", file=sys.stderr)
        return exits.FAULT
    except KeyboardInterrupt as asked:
        if not wants_stop(asked):
            raise commands.UnfinishedError(f"{again.job} goes on without this command\n{again.text()}") from asked
        try:
            dashboard.stop(client, again.job)
        except ValueError as error:
            raise commands.UnfinishedError(f"{error}\n{again.text()}") from asked
        raise commands.UnfinishedError(f"{again.job} has ended; the same command resumes its run") from asked
    print(f"{again.job} ended with exit code {code}", file=sys.stderr, flush=True)
    return code


def wants_stop(asked: KeyboardInterrupt) -> bool:
    """Whether the person at the terminal wants the job to end; nobody is asked after a signal that is no Ctrl-C."""
    if signal.SIGTERM in asked.args or not sys.stdin.isatty():
        return False
    print("\nStop the job on the cluster too? It goes on otherwise. [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


if __name__ == "__main__":
    sys.exit(main())
