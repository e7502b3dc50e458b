"""What the code promises about itself: imports go one way, the library knows no Ray, importing does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module imports from the lines above its own only.
ORDER = [
    ["fit", "sites", "spellings", "untrusted", "hub", "effort", "columns", "terminal", "durations"],
    ["hooks", "storage", "schema", "spec", "methods", "kernels", "display", "localisation", "maps", "search"],
    ["card", "demo.scenes"],
    ["listing", "images", "isolation", "runs", "recipe", "soundness", "model_files", "histograms"],
    ["shards", "tower", "sae", "memmaps", "embeddings", "latents", "contrast", "by_latent"],
    ["changes", "formats", "cls_path", "tangent", "targets", "quality", "objectives", "naming", "tables", "synthetic"],
    ["embedding_formats"],
    ["checkpoints", "mean_token", "siglip", "trainer", "naive", "naive_maps", "results", "indexing"],
    ["clip"],
    ["text"],
    ["relevance", "training", "statistics", "pictures", "overview", "holdings", "finding"],
    ["reruns", "query_speed", "views"],
    ["inference", "training_speed", "captions"],
    ["stages", "timing", "pages"],
    ["report", "static", "explorer", "demo.lessons"],
    ["demo.figures"],
    ["demo.truth"],
    ["demo.build"],
]
MODULES = [path for path in sorted((ROOT / "saecore").rglob("*.py")) if path.name != "__init__.py"]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "saecore").with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it; those for type checkers alone aside."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    place = {name: line for line, names in enumerate(ORDER) for name in names}
    own = name_of(path)
    ours = {name.removeprefix("saecore.") for name in imported(path) if name.startswith("saecore.")} & place.keys()
    assert own in place, f"{own} has no place in the order"
    assert {name for name in ours if place[name] >= place[own]} == set()
    assert not any(name == "ray" or name.startswith(("ray.", "jobs")) for name in imported(path))


def test_no_job_imports_another() -> None:
    for path in (ROOT / "jobs").glob("*.py"):
        others = {name for name in imported(path) if name.startswith("jobs.")}
        assert others <= {"jobs.session", "jobs.signals", "jobs.cluster", "jobs.pipeline"}, path


@pytest.mark.parametrize(
    "job", ["explain", "embed", "train", "measure", "name", "benchmark", "index", "query", "report"]
)
def test_the_command_line_loads_neither_pytorch_nor_ray(job: str) -> None:
    """So that --help and a wrong argument answer at once, and workers that decode start in a second."""
    code = f"import sys, jobs.{job}; print(sorted({{'torch', 'transformers', 'ray'}} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
    assert said.stderr == ""


def test_packages_re_export_nothing() -> None:
    for path in ROOT.glob("*/**/__init__.py"):
        if ".venv" not in path.parts:
            assert path.read_text().strip() == "", path
