"""Command lines that come next: what a job names at its end, and what pages name where a run lacks something."""

import shlex

import pyarrow as pa

from saecore.query.results import Results
from saecore.report.holdings import holdings
from saecore.report.pages import EXPLORER
from saecore.runs import latents
from saecore.storage import join_uri, split_settings

JOBS = {"Names": "name", "Index": "index"}
"""The job that adds to a run, by `Holding.what`."""

SETTINGS = {"Maps of": "--targets", "Methods": "--method", "Embeddings": "--keep-embeddings"}
"""The flag with which another run would hold what is missing."""

RENAMED = {"--embeddings": "--keep-embeddings"}
"""Flags of jobs.explain in the commands of older runs."""


def about(uri: str, job: str) -> str:
    """A command about the run at `uri`. Pages of one at an address need a local folder."""
    more = " --out report" if job == "report" and "://" in uri else ""
    return f"python -m jobs.{job} --run {shlex.quote(uri)}{more}"


def after_explain(uri: str, clip: str) -> str:
    """What to do with a new run: its preview, and three commands."""
    vocabulary = "" if clip == "demo" else " --vocabulary WORDS"
    steps = {
        about(uri, "index"): "questions about one latent become fast",
        about(uri, "name") + vocabulary: "words for the latents"
        + (", out of a file with one word a line" if vocabulary else ""),
        about(uri, "report"): "pages to look at",
    }
    width = max(map(len, steps))
    lines = [f"    {line:<{width}}   # {what}" for line, what in steps.items()]
    return "\n".join([f"preview       {join_uri(uri, 'preview.png')}", "", "Next:", "", *lines])


def after_index(uri: str) -> str:
    """What to do with an indexed run: give its latents names, or ask for one by its name."""
    named = "name" in (latents.read(uri) or pa.table({})).column_names
    return f"next          {f'python -m jobs.query latents {shlex.quote(uri)}' if named else about(uri, 'name')}"


def after_name(uri: str) -> str:
    """What to do with a run whose latents have names."""
    return f"next          {about(uri, 'report')}"


def hints(run: Results) -> dict[str, str]:
    """What pages name: by `Holding.what` the command that adds what is missing, by `EXPLORER` the one that shows everything.

    Settings of an address are omitted: they may hold what nobody else should read.
    """
    place = split_settings(run.uri)[0]
    lines = {EXPLORER: f"python -m jobs.report --run {shlex.quote(place)} --serve"}
    for one in holdings(run):
        if one.missing and one.what in JOBS:
            lines[one.what] = about(place, JOBS[one.what])
        elif one.missing and run.record.command:
            values = [",".join(one.complete)] if one.what == "Methods" else one.complete
            lines[one.what] = _again(run.record.command, SETTINGS[one.what], *values)
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
