"""What the house promises: which wing may know which, that every file says what it is, that importing does no work.

Each rule is tried on a planted import that breaks it: a rule that cannot fail holds nothing.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

GROUND = [
    "saecore.schema",
    "saecore.methods",
    "saecore.requests",
    "saecore.storage",
    "saecore.stores",
    "saecore.web",
    "saecore.patience",
    "saecore.untrusted",
    "saecore.hub",
    "saecore.spellings",
    "saecore.numbering",
    "saecore.heatmaps",
]
"""What every wing may stand on, and what stands on nothing but itself."""

WINGS = [
    "images", "towers", "sae", "removal", "relevance", "evaluation", "training", "naming", "runs", "pipeline", "query",
    "upkeep", "judging", "report", "demo",
]  # fmt: skip


TOP = ["saecore.notebook"]
"""What stands on all wings, for people who work in Python."""


def wings(*names: str) -> list[str]:
    return [f"saecore.{name}" for name in names]


class Rule(NamedTuple):
    """Files below `who` import nothing below `whom`."""

    who: list[str]
    whom: list[str]
    why: str
    but: tuple[str, ...] = ()
    """Modules of `who` that the rule is not for."""


RULES = [
    Rule(GROUND, wings(*WINGS), "the ground carries the wings"),
    Rule(
        wings("images"),
        wings("towers", "sae", "query", "runs", "relevance"),
        "reading images needs no model and no run",
    ),
    Rule(wings("runs"), wings(*(name for name in WINGS if name != "runs")), "a run folder stands on the ground only"),
    Rule(wings("towers"), wings("sae", "relevance", "runs"), "a tower is what transformers has, run our way"),
    Rule(wings("sae"), wings("towers", "runs", "training"), "an SAE knows embeddings, not what makes them"),
    Rule(wings("relevance"), wings("runs", "query", "images"), "mathematics reads and writes no files"),
    Rule(
        wings("removal"),
        wings(*(name for name in WINGS if name not in ("removal", "towers"))),
        "pictures without patches need a tower, and know no target",
    ),
    Rule(wings("query", "report"), wings("towers", "sae", "relevance"), "questions and pages depend on files only"),
    Rule(wings("pipeline"), wings("query", "report", "training"), "making a run needs nothing that reads one"),
    Rule(
        wings("upkeep"),
        wings(*(name for name in WINGS if name not in ("upkeep", "runs", "query"))),
        "who writes a run, how far it is and whether it is whole: questions to files",
    ),
    Rule(wings("training"), wings("towers", "relevance", "pipeline"), "training sees embeddings only"),
    Rule(
        wings(*(name for name in WINGS if name != "demo")),
        wings("demo"),
        "nothing depends on the demo; `saecore.hub` and the files next to it resolve the address `demo`",
    ),
    Rule(["saecore"], ["ray", "tyro", "rich", "jobs"], "the library is used without jobs and their tools"),
    Rule([*GROUND, *wings(*WINGS)], TOP, "nothing in the house needs what stands on top of it"),
    Rule(["saecore", "jobs"], ["benchmarks", "tests"], "benchmarks measure the others, and are in no wheel"),
    Rule(
        wings("images", "runs", "query", "upkeep"),
        ["torch", "transformers"],
        "workers that decode, and questions, load no PyTorch",
    ),
]


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of ours below a folder, by its dotted name."""
    folders = [root / folder for folder in ("saecore", "jobs", "benchmarks")]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py")) if path.name != "__init__.py"]
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in files}


MODULES = modules_of(ROOT)


def imported(path: Path, root: Path = ROOT) -> set[str]:
    """Dotted names that a file imports, anywhere in it, except those for type checkers only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    package = path.relative_to(root).parent.parts
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {source(node, package)} | {f"{source(node, package)}.{alias.name}" for alias in node.names}
    return names


def source(node: ast.ImportFrom, package: tuple[str, ...]) -> str:
    """The dotted name between `from` and `import`, in full, as a module of that package means it."""
    above = package[: len(package) - node.level + 1] if node.level else ()
    return ".".join([*above, *([node.module] if node.module else [])])


def below(name: str, places: list[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def broken(rule: Rule, modules: dict[str, Path], root: Path = ROOT) -> list[str]:
    """`module imports module` for every import against a rule."""
    return [
        f"{name} imports {other}"
        for name, path in modules.items()
        if below(name, rule.who) and name not in rule.but
        for other in sorted(imported(path, root))
        if below(other, rule.whom)
    ]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.why)
def test_who_may_not_know_whom(rule: Rule) -> None:
    assert broken(rule, MODULES) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.why)
def test_a_planted_import_breaks_its_rule(rule: Rule, tmp_path: Path) -> None:
    """One against the rule in every place that it is for, in every form that Python has for an import."""
    planted: dict[str, Path] = {}
    expected = set[tuple[str, str]]()
    for who in rule.who:
        folder = tmp_path.joinpath(*who.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        for whom in rule.whom:
            for form in forms(who, whom):
                name = f"{who}.planted{len(planted)}"
                planted[name] = folder / f"{name.rpartition('.')[2]}.py"
                planted[name].write_text(form)
                expected.add((name, whom))
    told = {tuple(line.split(" imports ")) for line in broken(rule, planted, tmp_path)}
    assert expected <= {(name, place) for name, whom in told for place in (whom, whom.removesuffix(".something"))}
    assert {name for name, _ in told} == planted.keys()


def forms(who: str, whom: str) -> list[str]:
    """Every way in which a module of package `who` can import `whom`."""
    package, _, module = whom.rpartition(".")
    written = [f"import {whom}", f"from {whom} import something", f"def late():\n    import {whom} as other"]
    if package:
        written.append(f"from {package} import {module}")
    if whom.split(".")[0] == who.split(".")[0]:
        dots = "." * len(who.split("."))
        written += [
            f"from {dots}{whom.partition('.')[2]} import something",
            f"from {dots} import {whom.partition('.')[2]}",
        ]
    return written


def aliases(path: Path, known: Collection[str], root: Path = ROOT) -> list[str]:
    """`module as name` for every module of ours that a file imports under another name; classes and functions may have one."""
    package = path.relative_to(root).parent.parts
    renamed = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            renamed += [(alias.name, alias.asname) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            renamed += [(f"{source(node, package)}.{alias.name}", alias.asname) for alias in node.names]
    return [f"{name} as {other}" for name, other in renamed if other and name in known]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_one_name(name: str) -> None:
    assert aliases(MODULES[name], MODULES) == []


def test_a_planted_alias_is_told(tmp_path: Path) -> None:
    file = tmp_path / "saecore" / "report" / "planted.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import saecore.runs.run as runs\nfrom saecore.runs import run as runs\nfrom ..runs import run as runs\n"
        "from saecore.runs.run import open_run as opened\nimport numpy as np\nfrom saecore.runs import run\n"
    )
    assert aliases(file, {"saecore.runs.run"}, tmp_path) == ["saecore.runs.run as runs"] * 3


def test_imports_for_type_checkers_and_to_outsiders_break_nothing(tmp_path: Path) -> None:
    file = tmp_path / "saecore" / "runs" / "planted.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from saecore.sae import model\nimport raylib\n"
    )
    assert [line for rule in RULES for line in broken(rule, {"saecore.runs.planted": file}, tmp_path)] == []


def test_no_job_imports_another() -> None:
    """Only `run` calls other commands: it is what they come to together. `submit` asks a command for its parser."""
    shared = {f"jobs.{name}" for name in SHARED}
    for path in set((ROOT / "jobs").glob("*.py")) - {ROOT / "jobs" / "run.py", ROOT / "jobs" / "submit.py"}:
        others = {".".join(name.split(".")[:2]) for name in imported(path) if name.startswith("jobs.")}
        assert others <= shared, path


SHARED = [
    "cluster",
    "collection",
    "commands",
    "console",
    "dashboard",
    "decoding",
    "events",
    "exits",
    "head",
    "hints",
    "locks",
    "order",
    "origin",
    "pipeline",
    "pool",
    "questions",
    "remade",
    "signals",
    "summaries",
    "terminal",
]
"""What jobs share; the other files of jobs/ are commands."""

JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("[a-z]*.py") if path.stem not in SHARED)


def test_the_command_line_loads_neither_pytorch_nor_ray() -> None:
    """So that --help and a wrong argument answer at once, and workers that decode start in a second."""
    code = f"""
import importlib, sys
for job in {JOBS}:
    importlib.import_module(f"jobs.{{job}}")
    for heavy in {{"torch", "transformers", "ray"}} & set(sys.modules):
        sys.exit(f"jobs.{{job}} loads {{heavy}}")
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


def test_the_house_can_be_seen_at_a_glance() -> None:
    folders = {path.name for path in (ROOT / "saecore").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(WINGS)
    assert {path.stem for path in (ROOT / "saecore").glob("[a-z]*.py")} == {
        name.split(".")[1] for name in [*GROUND, *TOP]
    }
    for wing in WINGS:
        files = [path for path in (ROOT / "saecore" / wing).glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 10, wing


@pytest.mark.parametrize("name", MODULES)
def test_a_file_says_what_it_is_and_is_short(name: str) -> None:
    text = MODULES[name].read_text()
    head = ast.get_docstring(ast.parse(text))
    assert head, f"{name} has no head"
    assert head.splitlines()[0].endswith((".", "?", ":")), f"{name}: its head's first line is a sentence"
    assert len(text.splitlines()) <= 350


def test_packages_re_export_nothing() -> None:
    for folder in ("saecore", "jobs", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("__init__.py"):
            assert path.read_text().strip() == "", path


FLAG = re.compile(r"(?<![\w<!-])--[a-z][a-z-]*")


def flags_in(path: Path) -> list[str]:
    """Flags in the texts of a file: strings and docstrings of a module, all of a template or script."""
    if path.suffix != ".py":
        return FLAG.findall(path.read_text())
    nodes = ast.walk(ast.parse(path.read_text()))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [flag for text in texts for flag in FLAG.findall(text)]


ALLOWED = {"saecore/runs/card.py"}
"""Files of the library that still name flags."""


def test_the_library_knows_no_flags() -> None:
    """It names the thing that is wrong or missing; jobs know by which flag it was given."""
    files = [path for ending in ("*.py", "*.html", "*.js") for path in (ROOT / "saecore").rglob(ending)]
    speaking = {path.relative_to(ROOT).as_posix(): flags for path in files if (flags := flags_in(path))}
    assert {file: flags for file, flags in speaking.items() if file not in ALLOWED} == {}


def test_a_planted_flag_is_seen(tmp_path: Path) -> None:
    python, page = tmp_path / "planted.py", tmp_path / "planted.html"
    python.write_text(
        "'''Made by --chunk-size.'''\nx = -1 - -2  # --not-this\nraise ValueError(f\"--out {x} is full\")\n"
    )
    page.write_text("<!-- a remark -->\n<code>--serve</code>\n")
    assert flags_in(python) == ["--chunk-size", "--out"]
    assert flags_in(page) == ["--serve"]
