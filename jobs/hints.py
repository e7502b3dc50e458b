"""Command lines that come next: what a job names at its end, and what pages name where a run lacks something."""

import shlex

from saecore.query.results import Results
from saecore.report.holdings import holdings
from saecore.report.pages import EXPLORER
from saecore.runs import latents
from saecore.runs.record import Record
from saecore.storage import join_uri, split_settings

from . import commands

JOBS = {"Names": "name", "Index": "index", "Judgement": "evaluate"}
"""The job that adds to a run, by `Holding.what`."""

SETTINGS = {"Maps of": "--targets", "Methods": "--method", "Embeddings": "--keep-embeddings"}
"""The flag with which another run would hold what is missing."""

RENAMED = {"--embeddings": "--keep-embeddings"}
"""Flags of jobs.explain in the commands of older runs."""


def after_explain(uri: str, record: Record) -> str:
    """What to do with a new run: look at its preview, then three commands; two if words have no place where the SAE reads."""
    clip = record.clip
    vocabulary = () if clip == "demo" else ("--vocabulary", "WORDS")
    pages = ("--out", "report") if "://" in uri else ()
    words = "words for the latents" if clip == "demo" else "words for the latents, from a file with one word a line"
    steps = {commands.line("index", "--run", uri): "questions about one latent become fast"}
    if record.can_be_named:
        steps[commands.line("name", "--run", uri, *vocabulary)] = words
    steps[commands.line("report", "--run", uri, *pages)] = "pages to look at"
    width = max(map(len, steps))
    lines = [f"    {line:<{width}}   # {what}" for line, what in steps.items()]
    return "\n".join([f"preview       {join_uri(uri, 'preview.png')}", "", "Next:", "", *lines])


def after_vectors(uri: str) -> str:
    """What to do with vectors inside the tower: train an SAE on them."""
    words = ("--embeddings", uri, "--latents", "LATENTS", "--out", "SAE")
    return f"next          {commands.line('train', *words)}    # LATENTS: how many latents the SAE is to have"


def after_index(uri: str, record: Record) -> str:
    """What to do with an indexed run: give its latents names, or look at them."""
    table = latents.read(uri)
    named = not record.can_be_named or (table is not None and "name" in table.column_names)
    return f"next          {commands.line('query', 'latents', uri) if named else commands.line('name', '--run', uri)}"


def after_name(uri: str) -> str:
    """What to do with a run whose latents have names."""
    pages = ("--out", "report") if "://" in uri else ()
    return f"next          {commands.line('report', '--run', uri, *pages)}"


def hints(run: Results) -> dict[str, str]:
    """What pages name: by `Holding.what` the command that adds what is missing, by `EXPLORER` the one that shows everything.

    Settings of an address are omitted: they may hold what nobody else should read.
    """
    place = split_settings(run.uri)[0]
    lines = {EXPLORER: commands.called("report", "--run", place, "--serve")}
    for holding in holdings(run):
        if holding.missing and holding.what in JOBS:
            lines[holding.what] = commands.called(JOBS[holding.what], "--run", place)
        elif holding.missing and run.record.command:
            values = [",".join(holding.complete)] if holding.what == "Methods" else holding.complete
            lines[holding.what] = _again(run.record.command, SETTINGS[holding.what], *values)
    return lines


def _again(command: str, flag: str, *values: str) -> str:
    """A run's own command with other values for one flag, into another folder."""
    kept, skipped = list[str](), False
    for word in shlex.split(command):
        if word.startswith("--"):
            skipped = word.partition("=")[0] in ("--out", flag)
        if not skipped:
            kept.append(RENAMED.get(word, word))
    return f"{shlex.join([*kept, flag, *values])} --out NEW_FOLDER"
