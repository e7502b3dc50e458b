"""The wheel: it holds what the commands need and nothing more, and runs the demo where there is no checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.helpers.reading import check_links

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a folder build/, from which it would fill the next wheel too."""
    source = tmp_path_factory.mktemp("source") / "house"
    for folder in ("jobs", "saecore"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("tests", "benchmarks"):  # what a checkout has besides
        (source / folder).mkdir()
        (source / folder / "__init__.py").touch()
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    out = tmp_path_factory.mktemp("wheel")
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def kept(folder: Path, package: str) -> set[str]:
    """What of a folder belongs in the wheel, as the wheel names it."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {f"{package}/{path.relative_to(folder).as_posix()}" for path in files}


def test_the_wheel_holds_the_library_and_the_commands(wheel: Path) -> None:
    """Every file of the two folders, data included; no tests, no benchmarks, no pages for readers, no package `jobs`."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == kept(ROOT / "saecore", "saecore") | kept(ROOT / "jobs", "relmap")
    data = [
        "demo/clip/model.safetensors",
        "demo/sae/config.json",
        "demo/vocabulary.txt",
        "py.typed",
        "report/site/base.html",
    ]
    assert names >= {f"saecore/{name}" for name in [*data, "report/site/static/style.css"]}


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A fresh environment with the wheel, and this one's packages after it; a home and a folder of its own."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")], check=True)
    python = place / "venv" / "bin" / "python"
    words = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, cwd=place)
    (packages,) = (place / "venv" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    (place / "home").mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    return kept | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(place / "home")}


def said_by(words: list[str], environment: dict[str, str], folder: Path) -> str:
    """Standard output of a command of the wheel, which must succeed; in an empty folder no checkout can be imported."""
    ended = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_relmap_runs_the_demo_from_an_empty_folder(environment: dict[str, str], tmp_path: Path) -> None:
    said = said_by(["relmap", "run", "--demo", "--local", "--out", "demo"], environment, tmp_path)
    address = re.search(r"^open +(file://\S+)$", said, re.MULTILINE)
    assert address, said
    page = Path(unquote(urlsplit(address[1]).path))
    assert page == (tmp_path / "demo" / "report" / "index.html").resolve()
    assert "purple" in page.read_text()
    check_links(page.parent)
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "demo-images"}
    # What comes next is named as this command was, and can be pasted.
    proposed = re.search(r"^next +(relmap query find demo) WORD$", said, re.MULTILINE)
    assert proposed, said
    assert "green" in said_by([*proposed[1].split(), "green"], environment, tmp_path)
    record = json.loads((tmp_path / "demo" / "run.json").read_text())
    assert record["command"] == "relmap explain --out demo --local --keep-embeddings --demo"
    assert record["git_commit"] is None


def test_rays_workers_find_the_package(environment: dict[str, str], tmp_path: Path) -> None:
    """What they are sent are functions of `relmap.pipeline`, by that name."""
    said = said_by(["relmap", "explain", "--demo", "--ray", "--limit", "32", "--out", "demo"], environment, tmp_path)
    assert "32 of 32 images" in said


def test_the_package_itself_can_be_called(environment: dict[str, str], tmp_path: Path) -> None:
    """`python -m relmap` is the same, and names itself as people call it; there is no package `jobs`."""
    said = said_by(["python", "-m", "relmap", "explain", "--help"], environment, tmp_path)
    assert said.startswith("usage: relmap explain ")
    assert "    relmap explain --demo --out runs/demo\n" in said
    assert "relmap name" in said
    assert "jobs." not in said
    assert said_by(["relmap", "--version"], environment, tmp_path) == "relmap 0.2.0\n"
    code = "import importlib.util; print(*map(importlib.util.find_spec, ['jobs', 'tests', 'benchmarks']))"
    assert (
        said_by(["python", "-P" if sys.version_info >= (3, 11) else "-s", "-c", code], environment, tmp_path)
        == "None None None\n"
    )
