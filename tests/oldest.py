"""The lowest versions that pyproject.toml allows, as pip takes them: `make check-oldest` installs and tries them.

    python tests/oldest.py                       # duckdb==1.5 huggingface_hub==0.34 ..
    python tests/oldest.py torch==2.13.0+cpu     # with another version of one of them

PyPI has PyTorch 2.9 for Linux on x86 with CUDA only, 3 GB; the second form takes a build for the CPU that one has.
"""

import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lowest(text: str) -> list[str]:
    """`name[extras]==version` of every dependency, those for tests included, that has a lower bound."""
    dependencies = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    tests = re.search(r"^test = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert dependencies
    assert tests
    found = re.findall(r'^ *"([\w-]+(?:\[[\w,]+\])?)>=([\w.]+)(?:;[^"]*)?"', dependencies[1] + tests[1], re.MULTILINE)
    return [f"{name}=={version}" for name, version in found]


def main() -> None:
    """Print them in one line."""
    other = {pin.partition("==")[0]: pin for pin in sys.argv[1:]}
    print(*(other.get(pin.partition("==")[0], pin) for pin in lowest(PYPROJECT.read_text())))


if __name__ == "__main__":
    main()
