"""What made a run, besides its models: versions of packages, and the commit of the checkout."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

COMMIT = "RELMAP_GIT_COMMIT"
"""The environment variable that names the commit where there is no checkout: `jobs.submit` and the container image set it."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages on which results may depend."""
    names = ("relevance-map-sae", "torch", "transformers", "ray", "pyarrow", "numpy", "pillow")
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    # This project is not installed where a checkout is shipped as a working_dir: the commit tells its version there.
    return {"python": platform.python_version(), **{name: installed[name] for name in names if name in installed}}


def git_commit() -> str | None:
    """The checkout's commit, with a + if files have changed since; where this file is in no checkout, what `COMMIT` says.

    An installed file may lie inside somebody else's checkout, which does not track it. None if nothing is known.
    """
    told = os.environ.get(COMMIT) or None
    here = Path(__file__).parent
    try:
        answers = [
            subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
            for words in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
                ["ls-files", "--error-unmatch", Path(__file__).name],
            )
        ]
    except FileNotFoundError:  # a container without git
        return told
    if any(answer.returncode for answer in answers):
        return told
    return answers[0].stdout.strip() + ("+" if answers[1].stdout else "")
