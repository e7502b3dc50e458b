"""Resolve the addresses of models to local folders: `demo`, a folder, or a repository on the Hugging Face Hub.

A repository is looked up once, with a deadline, and then taken from huggingface_hub's cache or downloaded into it. Without a
network, the functions of huggingface_hub and transformers try for half a minute before they look into the cache. The deadline
is only for the question: a download takes as long as it takes, with huggingface_hub's own retries.

This is the only file that knows what `demo` stands for. Left out: where the cache is and who may read a repository, which
huggingface_hub decides (HF_HOME, HF_TOKEN).
"""

import os
import queue
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_DEMO = Path(__file__).parent / "demo"

DEMO_CLIP, DEMO_SAE, DEMO_VOCABULARY = _DEMO / "clip", _DEMO / "sae", _DEMO / "vocabulary.txt"
"""What the address `demo` stands for: a model, an SAE for it, and the words of the drawn world that both know."""

DEMO_PATCHES = _DEMO / "patches"
"""What the address `demo-patches` stands for: an SAE for patch tokens of the same model."""

DEMO_REMOVAL = _DEMO / "removal"
"""What the address `demo` stands for, where a head of removal is asked for."""

PATIENCE = 8.0
"""Seconds to wait for the Hub's answer, which is a few kilobytes. With the second or two in which Python loads its modules, a
command without a network ends within ten."""

_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


class UnreachableError(Exception):
    """The Hub gave no answer; the message says why, as the end of a sentence."""


def embedded(address: str, path: Path) -> str:
    """`address`, or, if it is `demo`, the path of what the library brings along."""
    return str(path) if address == "demo" else address


def model_folder(address: str, revision: str | None = None) -> Path:
    """The folder of a CLIP or SigLIP model in transformers' format; ValueError, in one sentence, if it cannot be had."""
    address = embedded(address, DEMO_CLIP)
    if os.path.isdir(address):  # not Path's, which raises for a name that is too long
        return Path(address)
    if os.path.exists(address) or not _REPOSITORY.fullmatch(address):
        raise ValueError(f"{address} is no folder; a model on the Hugging Face Hub is OWNER/NAME")
    return snapshot(address, revision, model_files)


def model_files(files: Sequence[str]) -> list[str]:
    """The files of a repository from which one model in transformers' format is read: settings, tokenizer, and weights.

    Many repositories hold the weights two or three times, also for other libraries.
    """
    settings = [file for file in files if re.fullmatch(r"[^/]+\.(json|txt|model)", file) and ".index." not in file]
    for weights in WEIGHTS:
        if weights in files:
            return [*settings, weights]
        if f"{weights}.index.json" in files:
            stem, _, suffix = weights.partition(".")
            parts = [file for file in files if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", file)]
            return [*settings, f"{weights}.index.json", *parts]
    return settings


WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files of weights as transformers names them; the first one is preferred."""


def snapshot(repository: str, revision: str | None, wanted: Callable[[Sequence[str]], Sequence[str]]) -> Path:
    """The local folder with the files of a repository whose names `wanted` selects from the names of all its files.

    If the Hub gives no answer, or HF_HUB_OFFLINE is set, the folder holds what the cache has. ValueError, in one sentence, if
    there is no such repository, or if it can be neither downloaded nor found in the cache.
    """
    try:
        files = listing(repository, revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(_refused(repository, revision, error)) from error
    except (UnreachableError, HfHubHTTPError) as error:
        cached = _cached(repository, revision)
        if cached is None:
            raise ValueError(
                f"{repository}{f' at {revision}' if revision else ''} is not in the local cache, and the Hugging Face Hub "
                f"{_reason(error)}: load it once with a network, or give the folder of a copy"
            ) from error
        return cached
    try:
        return Path(
            huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(wanted(files)))
        )
    except Exception as error:  # of the network, the Hub or the disk, each with kinds of its own
        raise ValueError(
            f"{repository} could not be downloaded ({type(error).__name__}: {_line(error)}): the same command goes on"
        ) from error


def listing(repository: str, revision: str | None) -> list[str]:
    """The names of a repository's files, from the Hub; UnreachableError if it does not answer within PATIENCE seconds."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UnreachableError("is not asked, since HF_HUB_OFFLINE is set")
    patience = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PATIENCE)
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            info = huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=patience)
            answers.put([file.rfilename for file in info.siblings or ()])
        except Exception as error:  # handed over, and judged where the answer is awaited
            answers.put(error)

    # A thread, since a socket's timeout counts for each address of a host, and the look-up of its name has none.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=patience)
    except queue.Empty as error:
        raise UnreachableError(f"did not answer within {patience:g} s (HF_HUB_ETAG_TIMEOUT sets how long)") from error
    if isinstance(answer, HfHubHTTPError | HFValidationError):
        raise answer
    if isinstance(answer, Exception):  # of the network; its type differs between versions of huggingface_hub
        raise UnreachableError(f"cannot be reached ({_line(answer)})") from answer
    return answer


def _cached(repository: str, revision: str | None) -> Path | None:
    try:
        # Without a listing it is not known which files are needed; whoever reads the folder says what it lacks.
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        incomplete = getattr(error, "snapshot_path", None)  # since huggingface_hub 2, if other files were listed
        return Path(incomplete) if incomplete else None


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UnreachableError) else f"answers with an error ({_line(error)})"


def _line(error: Exception) -> str:
    return " ".join(str(error).partition("\nFor more information")[0].split())[:200]


def _refused(repository: str, revision: str | None, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return f"{repository} is gated on the Hugging Face Hub: ask for access there, then log in (hf auth login)"
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} on the Hugging Face Hub has no revision {revision}"
    return f"{repository} is no model on the Hugging Face Hub, or a private one: then log in (hf auth login)"
