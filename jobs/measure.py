"""Measure how good an SAE is on embeddings: `saecore.evaluation.quality` in one command, for an SAE of any format.

    python -m jobs.measure --sae runs/sae --embeddings runs/photos
    python -m jobs.measure --sae demo --embeddings val.npy --labels val.txt --texts runs/classes --against runs/sae2 --json
    python -m jobs.measure --sae SAE_of_any_format --embeddings runs/photos --save runs/sae    # convert, and calibrate

Figures are honest only on embeddings that the SAE was not trained on. Of the file that it was trained on, --rows and --seed
with the values of --held-out and --seed of `jobs.train` draw exactly the rows that were held out there.

Left out: `--against` for more than about 10,000 latents, where the one-to-one matching takes hours and n^2 numbers.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saecore.naming.vocabulary import read_texts
from saecore.spellings import telling
from saecore.storage import names_in, resolved
from saecore.training.embeddings import Embeddings, open_embeddings
from saecore.training.recipe import doubled
from saecore.training.survey import draw, unit_length
from saecore.untrusted import about

from . import commands
from .summaries import measuring_summary

if TYPE_CHECKING:
    from saecore.sae.model import SAE

FIRST_K, LAST_K = 16, 1024
"""The first and the last k of the default recovery curve. MSAE's begins at 16 too; above 1,024 decoding takes too long."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure how good an SAE is on embeddings."""

    sae: str
    """demo, a folder, another project's checkpoint, hf://OWNER/REPOSITORY, or our own folder on s3:// or gs://."""
    embeddings: str
    """A run of jobs.embed (or of jobs.explain --keep-embeddings), NAME_rows_width.npy, or Parquet with a column of lists."""
    site: str = ""
    """Where the SAE reads, if its files do not say it: embedding, or embedding:l2 (trained on embeddings of length 1)."""
    any_clip: bool = False
    """Accept an SAE whose files name another model than that of the embeddings."""
    against: str = ""
    """Another SAE on the same CLIP whose atoms are compared, for example one with another seed."""
    against_site: str = ""
    """--site of the SAE of --against."""
    ks: tuple[int, ...] = ()
    """Numbers of latents for the recovery curve. The default is 16, 32, 64 and so on up to 1024."""
    labels: str = ""
    """File with a label, an integer or a word, in one line for each embedding. Adds a linear probe."""
    texts: str = ""
    """Folder that jobs.embed --text wrote. Its words are the classes, in the order of integer labels. Adds a zero-shot test."""
    save: str = ""
    """Folder into which the SAE is written, in our own format and with its threshold."""
    json: bool = False
    """Print one JSON object and nothing else."""
    rows: int = 16_384
    """The largest number of random embeddings that are measured on."""
    seed: int = 42
    """Seed that chooses these embeddings."""
    column: str = "embedding"
    """Parquet column that holds the embeddings."""

    def check(self) -> None:
        """See `commands.Checked.check`."""
        if wrong := [k for k in self.ks if k < 1]:
            raise ValueError(f"--ks {wrong[0]}: must be at least 1")
        commands.at_least(self, rows=2, seed=0)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: measure(sys.argv[1:] if argv is None else list(argv)))


def measure(argv: list[str]) -> int:
    """Check everything, measure, save, and print the results."""
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "measure")
        if arguments.save:
            check_folder(arguments)
        with commands.given("--embeddings"):
            source = open_embeddings(arguments.embeddings, arguments.column)
        words, classes = list[str](), np.zeros((0, 0), np.float32)
        if arguments.texts:
            if source.site != "embedding":
                raise ValueError(f"--texts {arguments.texts}: words have no place in vectors of {source.site}")
            with commands.given("--texts"):
                words, classes, _ = read_texts(arguments.texts)
        labels = read_labels(arguments.labels, source, words) if arguments.labels else None
        sae, remark = load(arguments, "--sae", arguments.sae, arguments.site, source)
        other = None
        if arguments.against:
            other, _ = load(arguments, "--against", arguments.against, arguments.against_site, source)
        if arguments.texts and classes.shape[1] != source.width:
            raise ValueError(f"--texts {arguments.texts} has width {classes.shape[1]}, the embeddings {source.width}")
        numbers, rows = draw(source, arguments.rows, arguments.seed)
        if (rows == rows[0]).all():
            raise ValueError(
                f"--embeddings {arguments.embeddings}: all {len(rows)} are the same: nothing to measure on"
            )
    import torch

    from saecore.evaluation import quality
    from saecore.sae.calibration import calibrate
    from saecore.training.loop import save_sae

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, sae = torch.from_numpy(rows).to(device), sae.to(device)
    measured: dict[str, Any] = {
        "sae": arguments.sae,
        **dataclasses.asdict(sae.config),
        "embeddings": arguments.embeddings,
        "rows": len(rows),
        "of": int(source.block_rows.sum()),
        "unit_norm": unit_length(rows),
        "calibrated": False,
        "remark": remark,
    }
    if sae.config.architecture == "batchtopk":
        assert sae.threshold is not None
        measured["calibrated"] = bool(torch.isnan(sae.threshold).any())
        if measured["calibrated"]:
            with commands.mistakes():
                calibrate(sae, x, sae.config.k)
        measured["threshold"] = float(sae.threshold)
    figures = quality.quality(sae, x)._asdict()
    measured["figures"] = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    n = sae.config.n_latents
    measured["recovery"] = quality.recovery(sae, x, list(arguments.ks or doubled(min(FIRST_K, n), min(LAST_K, n))))
    answers = None if labels is None else torch.from_numpy(labels[numbers]).to(device)
    if arguments.texts:
        measured["zero_shot"] = quality.zero_shot(sae, x, torch.from_numpy(classes).to(device), answers)
    if answers is not None:
        # The classes of the probe are only those that occur, numbered without gaps.
        measured["linear_probe"] = quality.linear_probe(sae, x, torch.unique(answers, return_inverse=True)[1])
    if other is not None:
        measured["alignment"] = {"against": arguments.against, **quality.alignment(sae, other.to(device))}
    if arguments.save:
        save_sae(sae, resolved(arguments.save))
        measured["saved"] = arguments.save
    print(json.dumps(measured, indent=2) if arguments.json else measuring_summary(measured))
    return 0


def load(arguments: Arguments, flag: str, address: str, site: str, source: Embeddings) -> "tuple[SAE, str]":
    """The SAE at `address`, and what remains unsure of its model; ValueError if there is none for these embeddings."""
    from saecore.sae.checkpoints import load_sae  # slow: PyTorch comes with it
    from saecore.sae.sites import check_reads

    with commands.given(flag):
        sae = load_sae(address, site)
        with about(address):
            check_reads(sae.config.site, sae.config.model, source.site)
    embeddings = f"--embeddings {arguments.embeddings}"
    if sae.config.n_inputs != source.width:
        raise ValueError(
            f"{flag} {address} is for embeddings of width {sae.config.n_inputs}, and {embeddings} is {source.width} wide: they "
            "are not of one CLIP"
        )
    model = source.model._replace(name=telling(source.model.name))
    clip = f"{source.model.name} of {embeddings}" if source.model.name else embeddings
    return sae, commands.check_same_model(flag, address, sae.config.trained_on, clip, model, arguments.any_clip)


def read_labels(path: str, source: Embeddings, words: list[str]) -> np.ndarray:
    """int64, one for each embedding: the number of its word among `words` if there are words, or the integer in the file."""
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--labels {path} cannot be read: {error}") from error
    if len(lines) != (total := int(source.block_rows.sum())):
        raise ValueError(f"--labels {path} has {len(lines):,} lines for {total:,} embeddings: one each is needed")
    known = set(lines)
    if "" in known:
        raise ValueError(f"--labels {path}: line {lines.index('') + 1} is empty")
    if len(known) < 2:
        raise ValueError(f"--labels {path}: all labels are {lines[0]!r}, so there is nothing to tell apart")
    integers = all(label.isascii() and label.removeprefix("-").isdigit() for label in known)
    if words and known <= set(words):
        place = {word: number for number, word in enumerate(words)}
    elif integers:
        place = {label: int(label) for label in known}
        if words and (wrong := [label for label in lines if not 0 <= place[label] < len(words)]):
            raise ValueError(f"--labels {path}: {wrong[0]} is no number of one of the {len(words)} words of --texts")
    elif words:
        raise ValueError(f"--labels {path}: {min(known - set(words))!r} is not among the words of --texts")
    else:
        place = {label: number for number, label in enumerate(sorted(known))}
    return np.array([place[label] for label in lines], np.int64)


def check_folder(arguments: Arguments) -> None:
    """ValueError if --save names a folder that has other files, or that cannot be written.

    The SAE's own folder may be written again, with its threshold, and so may the folder that a full disk left incomplete.
    """
    commands.check_writable("--save", arguments.save)
    left = names_in(arguments.save) <= {"README.md", "sae.safetensors"}  # its config.json comes last
    if not left and resolved(arguments.save) != resolved(arguments.sae):
        raise ValueError(f"--save {arguments.save} holds other files; name a new or empty folder")


if __name__ == "__main__":
    sys.exit(main())
