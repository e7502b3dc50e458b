"""What every command is: arguments that are checked, mistakes told in one sentence, an end in good order."""

import dataclasses
import inspect
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import tyro

from saecore import storage
from saecore.spellings import Model, check_same
from saecore.storage import StorageError, check_address
from saecore.stores import check_holds_no_secret

from . import exits, signals

DEFAULTS = dict.fromkeys(("", "''", "False", "None"), "") | {"True": "(default: on)"}
"""Defaults -> what help says of them, where that is not the value."""

HIDDEN = ("--address", "--env")
"""Flags whose values are written nowhere and shown without passwords: they may hold some."""

E = TypeVar("E", bound=BaseException)


class MistakeError(ValueError):
    """Something the user can mend: told in one sentence, exit code 2, no traceback."""


@contextmanager
def mistakes() -> Iterator[None]:
    """ValueErrors inside are the user's to mend. Wrap the checks before the work, never the work: a bug must stay loud."""
    try:
        yield
    except ValueError as error:
        if (failure := behind(error, StorageError)) and failure.is_down:
            raise failure from failure.__cause__  # a store that is down is nobody's mistake, and may be asked again later
        raise MistakeError(str(error)) from error


class UnfinishedError(Exception):
    """Work that ended before its end. str() is what is done, and what the same command does next; `__cause__` is why."""


RESUMES = "the same command resumes from here"


def run_job(job: Callable[[], int]) -> int:
    """A job's exit code (`jobs.exits`): its own; 2 with one sentence for a mistake, 1 for a place that refuses, or is down.

    Asked to end by Ctrl-C or SIGTERM it is 130 or 143, with one line that says what the same command does next; 141, without a
    word, where nobody reads on, as after `| head`. A bug is loud.
    """
    with signals.listening() as asked:
        try:
            code = job()
            sys.stdout.flush()  # not while Python ends: a reader that has gone is an exception that nobody catches there
            return code
        except MistakeError as mistake:
            print(f"error: {mistake}", file=sys.stderr)
            return exits.MISTAKE
        except (Exception, KeyboardInterrupt) as error:
            then = str(error) if isinstance(error, UnfinishedError) else signals.AGAIN
            if asked.number is not None or behind(error, KeyboardInterrupt):
                print(f"stopped: {then}", file=sys.stderr, flush=True)
                if asked.number is not None and "ray" in sys.modules:
                    os._exit(asked.exit_code)  # Ray Data's threads would go on while Python ends, and complain
                return asked.exit_code
            if behind(error, BrokenPipeError) and signals.nobody_reads():
                return signals.unread()
            if refused := behind(error, StorageError):
                said = str(refused).splitlines()[0]  # Ray Data adds advice about its own retries
                print(f"error: {said}; {then}", file=sys.stderr)
                return exits.FAULT
            if isinstance(error, UnfinishedError):
                print(f"failed: {then}", file=sys.stderr)
            raise


def behind(error: BaseException | None, kind: type[E]) -> E | None:
    """The exception of a kind that made another: Ray brings what a worker raised as the `cause` of its own."""
    while error is not None:
        if (cause := getattr(error, "cause", None)) is not None:
            error = cause  # before Ray's own, which is of the same kind too and says a traceback
        elif isinstance(error, kind):
            return error
        else:
            error = error.__cause__
    return None


# ---- What a command is called.


IS_INSTALLED = __name__.startswith("relmap.")
"""Whether this folder was imported as the package `relmap`, and not as `jobs` of a checkout."""


CHECKOUT = "python -m jobs."
"""Begins what a command is called in a checkout."""


def program(name: str) -> str:
    """What a command is called: `relmap explain`, or `python -m jobs.explain` where that was called."""
    return f"relmap {name}" if IS_INSTALLED else f"{CHECKOUT}{name}"


def called(name: str, *words: str) -> str:
    """A command line as files keep it, for whoever reads them."""
    return f"{program(name)} {shlex.join(words)}"


def line(name: str, *words: str) -> str:
    """A command to run next, for the shell that this one was called from."""
    return shlex.join([*_start(name), *words])


def _start(name: str) -> list[str]:
    """The words that start a command in the environment of this process."""
    if not IS_INSTALLED:
        return [_typed(Path(sys.executable)), "-m", f"jobs.{name}"]
    script = Path(sys.executable).with_name("relmap")
    if shutil.which("relmap") == str(script):
        return ["relmap", name]
    return [_typed(script), name] if script.exists() else [_typed(Path(sys.executable)), "-m", "relmap", name]


def _typed(path: Path) -> str:
    """A path as one would type it in the folder where this process was started."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


@contextmanager
def followed() -> Iterator[None]:
    """Commands that are called inside propose no command that comes next: their caller calls it."""
    token = _is_followed.set(True)
    try:
        yield
    finally:
        _is_followed.reset(token)


_is_followed = ContextVar("is_followed", default=False)


def propose(text: str) -> None:
    """Print what to do next, unless the caller does that."""
    if not _is_followed.get():
        print(text)


class Checked(Protocol):
    """A job's arguments."""

    def check(self) -> None:
        """ValueError for what contradicts itself. Not at construction: tyro would draw a box around the sentence."""


A = TypeVar("A", bound=Checked)


def flag(field: str) -> str:
    """The flag that tyro makes of a field: `batch_size` is `--batch-size`."""
    return "--" + field.replace("_", "-")


def words(arguments: Any, kind: Any) -> list[str]:
    """The command line that gives the fields of one class their values; `parse` turns it back. Defaults are omitted."""
    line: list[str] = []
    for field in dataclasses.fields(kind):
        value = getattr(arguments, field.name)
        if dataclasses.is_dataclass(value):
            line += words(value, value)
        elif isinstance(value, bool):
            line += [flag(field.name if value else f"no_{field.name}")] if value != field.default else []
        elif value != field.default:
            line += [flag(field.name), *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return line


def at_least(arguments: Any, **least: float) -> None:
    """ValueError for the first argument below its least value."""
    for name, value in least.items():
        if getattr(arguments, name) < value:
            raise ValueError(f"{flag(name)} {getattr(arguments, name)}: must be at least {value}")


def parse(kind: type[A], argv: list[str], name: str) -> A:
    """The command line's arguments; SystemExit 2 for one that does not exist, ValueError for one that cannot be.

    --help shows the first lines of the class, the examples in the head of its module, and what the fields say.
    """
    check_words(argv)
    arguments = tyro.cli(
        kind,
        args=argv,
        prog=program(name),
        description="\n\n".join([as_called(inspect.getdoc(kind)) or "", *examples(kind), exits.in_words()]),
        config=(tyro.conf.HelptextFromCommentsOff,),
        registry=help_rules(),
    )
    check_addresses(arguments)
    arguments.check()
    return arguments


def examples(kind: type) -> list[str]:
    """The command lines in the head of the module of a class, under one title; none if there are none."""
    head = sys.modules[kind.__module__].__doc__ or ""
    lines = [line for line in head.splitlines() if line.startswith(f"    {CHECKOUT}")]
    if IS_INSTALLED:
        lines = [line.replace(CHECKOUT, "relmap ", 1) for line in lines]
    return ["\n".join(["Examples:", *lines])] if lines else []


def as_called(text: str | Callable[[], str | None] | None) -> str | None:
    """A text of help, or what gives one, with commands as they are called here: `jobs.name` may be `relmap name`."""
    words = text() if callable(text) else text
    return re.sub(r"\bjobs\.", "relmap ", words) if words and IS_INSTALLED else words


def help_rules() -> tyro.constructors.ConstructorRegistry:
    """tyro's rules, and three of our own.

    Flags that the first lines of a class name come first, in their order there. Help omits a default that says nothing, such as
    `(default: '')`. A switch that is off has one flag, `--tied`; one that is on has two, `--centre, --no-centre`: a single
    setting of tyro's would give both one, or both two.
    """
    registry = tyro.constructors.ConstructorRegistry()
    inside = False

    def shown(default: str) -> str:
        return DEFAULTS.get(default, f"(default: {default})")

    @registry.struct_rule
    def rule(
        info: tyro.constructors.StructTypeInfo,
    ) -> tyro.constructors.StructConstructorSpec | None:
        nonlocal inside
        if inside or not dataclasses.is_dataclass(info.type):
            return None
        inside = True  # so that tyro's own rule is the one that answers
        try:
            spec = registry.get_struct_spec(info)
        finally:
            inside = False
        if not isinstance(spec, tyro.constructors.StructConstructorSpec):
            return None
        quiet = tyro.conf.arg(help_behavior_hint=shown)

        def told(field: tyro.constructors.StructFieldSpec) -> tyro.constructors.StructFieldSpec:
            one_flag: Any = tyro.conf.FlagCreatePairsOff
            kind: Any = Annotated[field.type, quiet]
            kind = one_flag[kind] if field.default is False else kind
            return dataclasses.replace(field, type=kind, helptext=as_called(field.helptext))

        named = re.findall(r"--[a-z-]+", info.type.__doc__ or "")
        order = sorted(spec.fields, key=lambda field: [*named, flag(field.name)].index(flag(field.name)))
        return dataclasses.replace(spec, fields=tuple(map(told, order)))

    return registry


def check_words(words: Sequence[str]) -> None:
    """ValueError for an address that holds a credential, before tyro repeats a word that it does not know."""
    before = ""
    for word in words:
        if word.startswith("--"):
            before, _, word = word.partition("=")
        if before not in HIDDEN:
            with given(f"{before}:") if before else nullcontext():
                check_holds_no_secret(word)


def check_addresses(arguments: Any) -> None:
    """ValueError for an argument that is almost an address, or empty where something has to be named."""
    for field in dataclasses.fields(arguments):
        value, name = getattr(arguments, field.name), flag(field.name)
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        for text in value if isinstance(value, tuple) else (value,):
            is_place = isinstance(text, str) and (text or required or isinstance(value, tuple))
            if is_place and not (name in HIDDEN and "://" in text):
                with given(f"{name}:"):
                    check_address(text)


@contextmanager
def given(flag: str) -> Iterator[None]:
    """ValueErrors inside begin with what the user gave; the flag by which it was given goes before it.

    The library does not know flags: it says `photos/x is no folder`, and the user reads `--images photos/x is no folder`.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error


@contextmanager
def given_fields(*owners: Any) -> Iterator[None]:
    """ValueErrors inside that begin with the name of a field of one of the owners (dataclasses) begin with its flag instead.

    The library says `batch_size 0: must be at least 1`, and the user reads `--batch-size 0: must be at least 1`.
    """
    names = {field.name for owner in owners for field in dataclasses.fields(owner)}
    try:
        yield
    except ValueError as error:
        first = re.split(r"\W", str(error), maxsplit=1)[0]
        if first not in names:
            raise
        raise ValueError(flag(first) + str(error)[len(first) :]) from error


def check_same_model(flag: str, sae: str, trained_on: Model, clip: str, model: Model, any_clip: bool) -> str:
    """A remark on whether an SAE belongs to a model, or nothing; ValueError, naming the flag, if it does not."""
    try:
        return check_same(trained_on, sae, clip, model, any_clip)
    except ValueError as error:
        raise ValueError(f"{flag} {error}; --any-clip runs it all the same") from error


def check_writable(flag: str, folder: str) -> None:
    """ValueError, naming the flag, if no file can be written into the folder."""
    with given(flag):
        storage.check_writable(folder)


def check_file(flag: str, file: str) -> None:
    """ValueError, naming the flag, if the file cannot be written."""
    check_writable(flag, storage.parent(file))
    if storage.is_folder(file):
        raise ValueError(f"{flag} {file} is a folder; name a file")


def check_templates(templates: Sequence[str]) -> None:
    """ValueError if a word cannot be put into one of them, or there is none."""
    if wrong := [template for template in templates if "{}" not in template]:
        raise ValueError(f"--templates {wrong[0]!r}: must hold {{}} where the word goes")
    if not templates:
        raise ValueError("--templates: give at least one")
