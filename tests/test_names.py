"""What prose names exists: every name in docstrings and comments that looks like one of ours (`tests.helpers.names`)."""

from pathlib import Path

import pytest

from tests.helpers import names


def test_names_in_docstrings_and_comments_exist() -> None:
    wrong = [
        f"{path.relative_to(names.ROOT)}:{line} {one}"
        for folder in names.FOLDERS
        for path in sorted((names.ROOT / folder).rglob("*.py"))
        for line, text in names.prose(path)
        for one in names.wrong_names(text)
    ]
    assert wrong == []


PLANTED = {
    "saecore/shapes/square.py": (
        "import torch\nCORNERS = 4\nclass Square(Shape):\n    side: int\n    def area_of(self): self.known = 1"
    ),
    "saecore/shapes/shape.py": "class Shape:\n    def grow(self): ...\ndef load_shape(path_or_none): return {'shape_id': 1}",
    "saecore/shapes/draw.js": "",
    "jobs/draw.py": "from . import pens\nclass Arguments(pens.Arguments):\n    at_once: int",
    "jobs/pens.py": "class Arguments:\n    ink: str\nclass Pen:\n    nib: str",
    "jobs/erase.py": "class Arguments:\n    hard: bool = False",
    "benchmarks/__init__.py": "",
    "benchmarks/__main__.py": "class Speed:\n    rounds: int",
    "docs/draw.md": "",
}
"""A small house."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> names.Code:
    root = tmp_path_factory.mktemp("house")
    for place, text in PLANTED.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text(text)
    return names.Code(root)


@pytest.mark.parametrize(
    "text",
    [
        "`saecore.shapes.square`, saecore.shapes.square.Square.side and `saecore.shapes`.",
        "`square.CORNERS`, `Square.area_of`, `Square.known`, `Square.grow`, `CORNERS`, `Square`",
        "`load_shape`, `load_shape(None)`, `path_or_none`, `shape_id`",
        "`saecore/shapes/square.py`, `square.py`, `shapes/draw.js`, `docs/draw.md`, `jobs/`",
        "`jobs.draw`, `jobs.draw --at-once 3 --ink red`, `relmap draw --help`, `--no-hard`, `python -m jobs.erase --hard`",
        "`python -m benchmarks speed --rounds 3`, `benchmarks`",
        # not meant as ours
        "`run.json`, `x`, `red or blue`, `torch.float`, `mkdir`, `https://example.org/a_b`, `openai/clip`, `*.py`, `p > 0`",
        "```\n`saecore.nothing`\n```",
    ],
)
def test_what_exists_or_is_not_ours_passes(text: str, planted: names.Code) -> None:
    assert names.wrong_names(text, planted) == []


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("saecore.nothing", "saecore defines no nothing"),
        ("saecore.shapes.circle.Circle", "saecore.shapes defines no circle"),
        ("saecore.shapes.square.load_shape", "saecore.shapes.square defines no load_shape"),
        ("saecore.shapes.square.torch", "saecore.shapes.square defines no torch"),  # what is imported is another's
        ("saecore.shapes.square.Square.angle", "class Square has no angle"),
        ("Square.angle()", "class Square has no angle"),
        ("Square.load_shape", "class Square has no load_shape"),
        ("shape.load_square", "no module of ours called shape defines load_square"),
        ("Circle", "the code has no such name"),
        ("MAX_CORNERS", "the code has no such name"),
        ("load_circle(path)", "the code has no such name"),
        ("saecore/shapes/circle.py", "no such file"),
        ("jobs/circle", "no such file"),
        ("shapes/circle.js", "no file shapes/circle.js"),
        ("circle.py", "no file circle.py"),
        ("jobs.draw --hard", "draw has no --hard"),
        ("relmap draw --at-one 3", "draw has no --at-one"),
        ("python -m jobs.draw --nib x", "draw has no --nib"),
        ("--soft", "no command has --soft"),
        ("jobs.circle --hard", "jobs defines no circle"),
    ],
)
def test_a_planted_name_is_told(name: str, wrong: str, planted: names.Code, tmp_path: Path) -> None:
    """In a docstring, in a comment that goes over two lines, and in a page."""
    comment = name.replace(" ", "\n# ", 1)
    file = tmp_path / "planted.py"
    file.write_text(f'"""Head."""\nx = 1\n"""About `{name}`."""\ny = 2  # see\n# `{comment}`\n')
    said = [(line, one) for line, text in names.prose(file) for one in names.wrong_names(text, planted)]
    assert said == [(3, f"`{name}`: {wrong}"), (4, f"`{name}`: {wrong}")]
    assert names.wrong_names(f"# Page\n\nOne `{name}`.", planted) == [f"`{name}`: {wrong}"]
