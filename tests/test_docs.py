"""What the pages for readers promise is true: trees, tables, links, names, and every block of code that a test can run.

A block of code is run unless a comment just above it says why not: `<!-- not run: needs the Hugging Face Hub -->`. The blocks
of one page run in their order, in a folder of the page's own. README makes the run of the demo; the other pages have a copy.
"""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saecore import schema
from saecore.query import by_latent
from saecore.runs.commits import Commit
from saecore.runs.files import MANIFEST
from saecore.runs.record import Record
from tests.helpers import names

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

REASONS = (
    "needs the Hugging Face Hub",
    "needs a data set",
    "needs a cluster",
    "needs the package",
    "takes",
    "serves",
    "installs",
)
"""How a reason begins for which a block is not run."""

FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+) -->\n)?^```(?P<language>.*)\n(?P<text>(?:.*\n)*?)^```$", re.MULTILINE
)


class Block(NamedTuple):
    """A block of code of a page."""

    reason: str
    """Why it is not run; empty if it is."""
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [
        Block(found["reason"] or "", found["language"], found["text"]) for found in FENCE.finditer(page.read_text())
    ]


def section(page: Path, title: str) -> str:
    """The text from a heading to the next one that is not below it."""
    found = re.search(rf"^(#+) {re.escape(title)}\n((?:(?!#{{1,2}} ).*\n)*)", page.read_text(), re.MULTILINE)
    assert found, f"{page.name} has no section {title}"
    return found[2]


def rows(text: str, *head: str) -> list[list[str]]:
    """The cells of all tables of a text that have this head, one after the other."""
    found, inside = list[list[str]](), False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split(" | ")]
        if cells == list(head):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not set(line) <= set("-| "):
            found.append(cells)
    return found


# ---- The first page.


def test_readme_is_one_page() -> None:
    assert len(README.read_text().splitlines()) <= 200


def tree() -> dict[str, str]:
    """README's tree: each folder and file, with what is said of it."""
    (text,) = [block.text for block in blocks(README) if block.text.startswith("saecore/")]
    said, folder = {}, ""
    for line in text.splitlines():
        found = re.fullmatch(r"( *)(\S+) +(\S.*)", line)
        assert found, f"nothing is said of {line.strip()}"
        folder = found[2] if not found[1] else folder
        said[found[2] if not found[1] else folder + found[2]] = found[3]
    return said


def test_the_tree_of_readme_equals_the_folders() -> None:
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()} | {"build", "dist"}
    top = {
        f"{path.name}/"
        for path in ROOT.iterdir()
        if path.is_dir() and path.name not in ignored and not path.name.endswith(".egg-info") and path.name[0] != "."
    }
    inside = {
        f"saecore/{path.name}/" if path.is_dir() else f"saecore/{path.name}"
        for path in (ROOT / "saecore").iterdir()
        if not path.name.startswith("__") and path.name != "py.typed"
    }
    assert tree().keys() == top | inside


def test_the_files_of_each_wing_stand_in_architecture() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    said = dict(re.findall(r"^\| `([a-z/]+)/` \| (.+?) \|", page, re.MULTILINE))
    wings = [path for path in (ROOT / "saecore").iterdir() if path.is_dir() and path.name != "__pycache__"]
    for folder in (*wings, ROOT / "jobs", ROOT / "benchmarks"):
        place = folder.relative_to(ROOT).as_posix()
        files = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
        assert set(re.findall(r"`(\w+)`", said[place])) == files, place


# ---- What a run leaves, word for word.

FOLDER = ROOT / "docs" / "run-folder.md"

TOKENS_MORE = pa.schema([field for field in schema.TOKEN_LATENTS if field.name not in schema.LATENTS.names])

SCHEMAS = {
    "images": [schema.TOKEN_IMAGES],
    "activations": [schema.activations_schema(reads_tokens=True)],
    "maps": [schema.maps_schema(64, reads_tokens=True, samples=True)],
    "latents.parquet": [schema.LATENTS, TOKENS_MORE, schema.NAMES],
    "by_latent and top_images": [
        by_latent.top_schema(
            {"images": schema.IMAGES, "activations": schema.ACTIVATIONS, "maps": schema.maps_schema(64)}
        )
    ],
    "texts.parquet": [schema.TEXTS],
    "plan.parquet": [schema.PLAN],
    "manifest.parquet": [MANIFEST],
}


def spelled(kind: pa.DataType) -> str:
    """A type as the page has it."""
    if pa.types.is_list(kind):
        return f"list<{spelled(kind.value_type)}>"
    ours = {"float": "float32", "double": "float64", "fixed_size_binary[64]": "fixed_size_binary[P]"}
    return ours.get(str(kind), str(kind))


@pytest.mark.parametrize("title", SCHEMAS)
def test_tables_are_described_column_by_column(title: str) -> None:
    said = [tuple(cells[:3]) for cells in rows(section(FOLDER, title), "column", "type", "null", "meaning")]
    held = [
        (field.name, spelled(field.type), "yes" if field.nullable else "no") for one in SCHEMAS[title] for field in one
    ]
    assert said == held


@pytest.mark.parametrize(("title", "kind"), [("run.json", Record), ("commits", Commit)])
def test_records_are_described_key_by_key(title: str, kind: type) -> None:
    said = [cells[0].strip("`") for cells in rows(section(FOLDER, title), "key", "meaning")]
    assert said == [field.name for field in dataclasses.fields(kind) if field.name != "more"]


def test_the_metadata_of_files_is_named(local_run: Path) -> None:
    said = set(re.findall(r"`([a-z_0-9]+)`", section(FOLDER, "Metadata of these files").replace("`images`", "")))
    held = pq.read_schema(next((local_run / "maps").glob("*.parquet"))).metadata
    others = {"activations", "maps", "by_latent", "top_images", "pool", "head", "head_sha256"}
    assert said - others == {key.decode() for key in held}


def test_the_glossary_of_the_page_is_that_of_the_code() -> None:
    head = ast.get_docstring(ast.parse((ROOT / "saecore" / "schema.py").read_text()))
    assert head is not None
    glossary = head.split("pages:\n\n")[1].split("\n\n")[0]
    terms = dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in glossary.splitlines())
    assert dict(rows(section(FOLDER, "Words"), "word", "meaning")) == terms


# ---- Links and names.


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = FENCE.sub("", page.read_text())
    heads = [re.sub(r"[^\w\- ]", "", head.lower()) for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {head.replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", FENCE.sub("", page.read_text()))
    for link in links:
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = (page.parent / parts.path).resolve() if parts.path else page
        assert target.exists(), link
        assert not parts.fragment or parts.fragment in anchors(target), link


def test_every_page_can_be_reached_from_readme() -> None:
    said = {(ROOT / link).resolve() for link in re.findall(r"\]\(([^)#:]+)", README.read_text())}
    assert said >= set(PAGES) - {README}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_backticks_exist(page: Path) -> None:
    assert names.wrong_names(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_of_commands_that_are_not_run_exist(page: Path) -> None:
    for block in blocks(page):
        text = block.text.replace("\\\n", " ").replace(" -- ", "\nrelmap ")  # what `relmap submit` takes to a cluster
        for line in text.splitlines() if block.reason and block.language == "bash" else ():
            if found := re.match(r"(relmap \w+|python -m \w+(?:\.\w+)?)(.*)", line):
                flags = re.findall(r"(?<=\s)--[a-z-]+", found[2].split("#")[0])
                assert names.code().complaint(" ".join([found[1], *flags])) is None, line


# ---- The blocks of code.


def test_few_blocks_are_not_run_and_say_why() -> None:
    held = {page: blocks(page) for page in PAGES}
    for page, found in held.items():
        assert {block.language for block in found} <= {"bash", "python", "text"}, page
        assert all(block.reason.startswith(REASONS) for block in found if block.reason), page
        assert page.read_text().count("<!-- not run") == sum(bool(block.reason) for block in found), page
    code = [block for found in held.values() for block in found if block.language != "text"]
    assert len([block for block in code if block.reason]) < len(code) / 2


COMMANDS = {
    "relmap": 'exec "{python}" -m jobs "$@"',
    "python": 'exec "{python}" "$@"',
    # What `pip install .` gives is tried by the test of the wheel.
    "pip": 'test "$*" = "install ."',
}
"""What the pages call, in a checkout."""


def data_of(table: str) -> list[str]:
    """The rows of a table of DuckDB's below its head."""
    return [line for line in table.splitlines() if line.startswith("│") and re.search(r"\d \│|\d\.\d", line)]


def run_page(page: Path, folder: Path) -> None:
    """Run all blocks of a page in a folder."""
    tools = folder / ".tools"
    tools.mkdir(parents=True)
    for name, line in COMMANDS.items():
        (tools / name).write_text(f"#!/bin/sh\n{line.format(python=sys.executable)}\n")
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "Agg",
    }
    said = ""
    for block in blocks(page):
        if block.language == "text" and block.text.startswith("┌"):
            assert data_of(block.text) == data_of(said), said
        if block.language == "text" or block.reason:
            continue
        words = ["bash", "-eu", "-c"] if block.language == "bash" else [sys.executable, "-W", "error", "-c"]
        ended = subprocess.run([*words, block.text], cwd=folder, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, f"{page.name}:\n{block.text}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
        said = ended.stdout


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the blocks of README were run."""
    folder = tmp_path_factory.mktemp("readme")
    run_page(README, folder)
    return folder


@pytest.mark.slow
def test_the_demo_leaves_what_the_page_says(demo: Path) -> None:
    (text,) = [block.text for block in blocks(FOLDER) if block.text.startswith("RUN/")]
    said = {line.split()[0].rstrip("/") for line in text.splitlines()[1:]}
    held = {path.name for path in (demo / "runs" / "demo").iterdir()}
    assert said - held <= {"run.log", "submissions", "evaluation"}
    assert held <= said


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES[1:] if any(block.language != "text" and not block.reason for block in blocks(page))],
    ids=lambda page: page.name,
)
def test_the_blocks_of_a_page_run(page: Path, demo: Path, tmp_path: Path) -> None:
    for name in ("demo", "demo-images"):
        shutil.copytree(demo / "runs" / name, tmp_path / "runs" / name)
    run_page(page, tmp_path)
