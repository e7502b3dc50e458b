"""A job one of whose steps takes a minute, in a process of its own: a test that sends a signal cannot hit a moment.

    python -m tests.helpers.slow jobs.name saecore.sae.checkpoints.load_sae MARK [the job's arguments]

MARK is made when the step is reached. The step does not heed a first Ctrl-C, and makes MARK.heard, where MARK ends in `deaf`.
"""

import importlib
import sys
import time
from pathlib import Path


def main() -> int:
    """The job, with its step replaced."""
    job, step, mark, *argv = sys.argv[1:]

    def wait(*given: object, **more: object) -> None:
        Path(mark).touch()
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            if not mark.endswith("deaf"):
                raise
            Path(f"{mark}.heard").touch()
            time.sleep(60)

    module, _, name = step.rpartition(".")
    setattr(importlib.import_module(module), name, wait)
    return importlib.import_module(job).main(argv)


if __name__ == "__main__":
    sys.exit(main())
