"""What a run was made by, besides its models: versions of packages, and the commit of the checkout."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path


def versions() -> dict[str, str]:
    """What results may depend on, beside the models."""
    names = ("relevance-map-sae", "torch", "transformers", "ray", "pyarrow", "numpy", "pillow")
    found = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    # Ours is not installed where a checkout is shipped as a working_dir: there the commit says it.
    return {"python": platform.python_version(), **{name: found[name] for name in names if name in found}}


def git_commit() -> str | None:
    """The checkout's commit, with a + if it was changed since; None where this is no checkout (a shipped working_dir)."""
    here = Path(__file__).parent
    answers = [
        subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    ]
    if any(answer.returncode for answer in answers):
        return None
    return answers[0].stdout.strip() + ("+" if answers[1].stdout else "")
