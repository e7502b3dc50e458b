"""Questions to a finished run on the command line: `saecore.query.results`, one sub-command a question.

    python -m jobs.query top runs/photos 53                         the images for which latent 53 fires most strongly
    python -m jobs.query image runs/photos 000036.jpg               the latents that fire for an image
    python -m jobs.query maps runs/photos 000036.jpg                where in the image they come from
    python -m jobs.query target runs/photos "text:a red square"     the images that a text, or a concept, fits best
    python -m jobs.query find runs/photos red                       latents by name
    python -m jobs.query cofiring runs/photos 53                    which others fire for its images
    python -m jobs.query histogram runs/photos 53                   how strongly it fires
    python -m jobs.query compare runs/photos "width > height"       what sets some images apart from the others
    python -m jobs.query latents runs/photos                        all of them, commonest first
    python -m jobs.query sql runs/photos "SELECT count(*) FROM images"

A table fits the terminal, or 80 columns where there is none; `--json` has every column. Without by_latent/, which jobs.index
makes, answers are the same and take longer.
"""

import dataclasses
import inspect
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union

import pyarrow as pa
import tyro

from saecore.query import results

from . import commands
from .questions import QUESTIONS, Question
from .terminal import plain, printable, show

MOST = {"n": results.LARGEST, "bins": 10_000}
"""The largest value of each count: nobody reads a table of more bins."""

PROGRAM = commands.program("query")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: query(sys.argv[1:] if argv is None else list(argv)))


def query(argv: list[str]) -> int:
    """Ask, and print the answer."""
    with commands.mistakes():
        question = parse(argv)
        answer = asked(question)
    if question.json:
        print(json.dumps(plain(answer.to_pylist()), indent=1))
    else:
        show(question.drawn(answer), question.columns)
    return 0


def parse(argv: list[str]) -> Question:
    """The question; SystemExit 2 for one that does not exist. --help of a question has an example, the list of all has none."""
    commands.check_words(argv)
    kinds = []
    for name, kind in QUESTIONS.items():
        head, _, rest = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
        more = [rest, f"Example: {PROGRAM} {kind.example}"] if argv[:1] == [name] else []
        description = "\n\n".join([head, *filter(None, more)])
        kinds.append(Annotated[kind, tyro.conf.subcommand(name, description=description)])
    every: Any = Union[tuple(kinds)]  # noqa: UP007 - made while the program runs
    question: Question = tyro.cli(
        every,
        args=argv,
        prog=PROGRAM,
        description="Ask a finished run.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        registry=commands.help_rules(),
    )
    return question


def asked(question: Question) -> pa.Table:
    """The answer; ValueError in one printable line if there is none, or the run cannot be read."""
    try:
        for name, most in MOST.items():
            if not 1 <= (given := getattr(question, name, 1)) <= most:
                raise ValueError(f"--{name} {given}: must be {'at least 1' if given < 1 else f'at most {most:,}'}")
        for given in dataclasses.astuple(question):
            if isinstance(given, str) and not _is_unicode(given):
                raise ValueError(f"{given}: is not UTF-8, and no name in a run is anything else")
        return question.ask(results.open(question.run))
    except OSError as error:
        raise ValueError(printable(f"{question.run} cannot be read: {error}")) from error
    except ValueError as error:
        raise ValueError(printable(str(error))) from error


def _is_unicode(text: str) -> bool:
    """Whether a text can be looked for: bytes of a command line that are no UTF-8 reach Python as surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


if __name__ == "__main__":
    sys.exit(main())
