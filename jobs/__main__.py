"""One program for all commands: `relmap explain ...` is `python -m jobs.explain ...` of a checkout.

    relmap --help              what there is to do
    relmap explain --help      what one command takes

The command's module is imported when it is called, by its name: help and a wrong name are answered at once, without PyTorch and
without Ray. Signals are listened to before that import, which takes a second: Ctrl-C is answered with one line then too.
"""

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from . import exits, signals

PROGRAM = "relmap" if __package__ == "relmap" else f"python -m {__package__}"

DISTRIBUTION = "relevance-map-sae"

COMMANDS = {
    "See what is in your images": {
        "run": "the whole way in one: explain, index, name, report",
        "explain": "images to latents and relevance maps; also of a text or a concept of your own",
        "retry": "read again what a run refused since it was missing or could not be read",
    },
    "Ask, and look": {
        "query": "questions in the terminal: the images of a latent, the latents of an image, SQL",
        "report": "pages of a run, as files or served to a browser",
        "index": "sort a run by latent: questions and pages become fast",
    },
    "Judge maps": {
        "evaluate": "whether a run's maps are faithful, with intervals, beside chance and untrained models",
    },
    "Look after a run": {
        "status": "how far a run is, who writes into it, what is left; from any machine",
        "verify": "whether a run's files are whole, and what mends them",
    },
    "Give latents names": {
        "name": "words of a vocabulary for the latents of a run or of an SAE",
    },
    "Bring or train an SAE": {
        "embed": "images, or words, to CLIP embeddings",
        "train": "embeddings to an SAE",
        "distill": "images to a head, which tells from one forward what each patch is worth",
        "measure": "how good an SAE is; convert one of another format, calibrate its threshold",
    },
    "Work on a cluster": {
        "submit": "take one of these commands to a Ray cluster, and follow it there",
    },
}
"""What a person wants to do -> command -> what it does."""

EXAMPLES = {
    "run --demo --out runs/demo": "drawn scenes; models included",
    "run --images photos/ --clip MODEL --sae SAE --out runs/photos": "images of your own",
    "query find runs/demo green": "which latent stands for green?",
    "report --run runs/demo --serve": "everything, in a browser",
}
"""Command lines -> why one calls them."""

NAMES = [name for group in COMMANDS.values() for name in group]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    with signals.ending_at_once(f"stopped: {signals.AGAIN}"):
        if not words or words[0] in ("-h", "--help", "help"):
            return say(overview())
        if words[0] in ("-V", "--version"):
            return say(f"relmap {version()}")
        if words[0] not in NAMES:
            print(unknown(words[0]), file=sys.stderr)
            return exits.MISTAKE
        command = importlib.import_module(f".{words[0]}", __package__)
    code: int = command.main(words[1:])
    return code


def say(text: str) -> int:
    """Print, and return the exit code: a reader may have gone, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        return signals.unread()
    return 0


def overview() -> str:
    """All commands, by what a person wants to do."""
    width = max(map(len, NAMES))
    lines = [
        f"usage: {PROGRAM} COMMAND ...",
        "",
        "What a CLIP model sees in an image collection, and where in each picture.",
    ]
    for title, group in COMMANDS.items():
        lines += ["", title, *(f"  {name:<{width}}  {text}" for name, text in group.items())]
    width = max(map(len, EXAMPLES))
    lines += ["", "Examples", *(f"  {PROGRAM} {words:<{width}}  # {reason}" for words, reason in EXAMPLES.items())]
    return "\n".join([*lines, "", f"{PROGRAM} COMMAND --help says what a command takes."])


def version() -> str:
    """The installed version; words for a checkout that is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "of a checkout that is not installed"


def unknown(name: str) -> str:
    """One sentence for a command that does not exist, with the nearest one."""
    nearest = difflib.get_close_matches(name, NAMES, 1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"{PROGRAM} --help lists them"
    return f"error: {name}: no such command; {hint}"


if __name__ == "__main__":
    sys.exit(main())
