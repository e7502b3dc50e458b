"""How good any SAE is, on embeddings: `saecore.evaluation.quality` in one command, for any SAE.

    python -m jobs.measure --sae runs/sae --embeddings runs/photos
    python -m jobs.measure --sae demo --embeddings val.npy --labels val.txt --texts runs/classes --against runs/sae2 --json
    python -m jobs.measure --sae SAE_of_any_format --embeddings runs/photos --save runs/sae    # convert, and calibrate

Figures are honest on embeddings that the SAE was not trained on alone: of the file it was trained on, --rows and --seed of
`jobs.train`'s --held-out and --seed draw just the rows held out there.

Left out: `--against` at n above about 10,000, where the one-to-one matching takes hours and n^2 numbers.
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

from . import commands
from .summaries import measuring_summary

if TYPE_CHECKING:
    from saecore.sae.model import SAE

FIRST_K, LAST_K = 16, 1024
"""Where the recovery curve begins by default, as MSAE's does, and where it ends: beyond, decoding outweighs all else."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How good any SAE is, on embeddings."""

    sae: str
    """demo, a folder, a foreign checkpoint, or hf://OWNER/REPOSITORY."""
    embeddings: str
    """A run of jobs.embed (or of jobs.explain --embeddings), NAME_rows_width.npy, or Parquet with a column of lists."""
    site: str = ""
    """Where the SAE reads, if its files do not say: embedding, or embedding:l2 if it was trained on embeddings of length 1."""
    any_clip: bool = False
    """Measure an SAE whose files name another model than the embeddings'."""
    against: str = ""
    """Another SAE on the same CLIP, to compare atoms with: another seed, say."""
    against_site: str = ""
    """--site of that one."""
    ks: tuple[int, ...] = ()
    """Numbers of latents at which to look at recovery; none is 16, 32, 64.. up to 1,024."""
    labels: str = ""
    """File with one label a line, an integer or a word, for every embedding: adds a linear probe."""
    texts: str = ""
    """Out folder of jobs.embed --text whose words are the classes, in the order of integer labels: adds zero-shot answers."""
    save: str = ""
    """Folder to write the SAE to, in our own format and with its threshold."""
    json: bool = False
    """Print one JSON object and nothing else."""
    rows: int = 16_384
    """Random embeddings to measure on, at most."""
    seed: int = 42
    """Seed of their choice."""
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
    """Check everything, measure, save, say what came of it."""
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "measure")
        if arguments.save:
            check_folder(arguments)
        source = open_embeddings(arguments.embeddings, arguments.column)
        words, classes = list[str](), np.zeros((0, 0), np.float32)
        if arguments.texts:
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
    found: dict[str, Any] = {
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
        found["calibrated"] = bool(torch.isnan(sae.threshold).any())
        if found["calibrated"]:
            with commands.mistakes():
                calibrate(sae, x, sae.config.k)
        found["threshold"] = float(sae.threshold)
    figures = quality.quality(sae, x)._asdict()
    found["figures"] = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    n = sae.config.n_latents
    found["recovery"] = quality.recovery(sae, x, list(arguments.ks or doubled(min(FIRST_K, n), min(LAST_K, n))))
    answers = None if labels is None else torch.from_numpy(labels[numbers]).to(device)
    if arguments.texts:
        found["zero_shot"] = quality.zero_shot(sae, x, torch.from_numpy(classes).to(device), answers)
    if answers is not None:
        # Dense: the probe's classes are those that occur.
        found["linear_probe"] = quality.linear_probe(sae, x, torch.unique(answers, return_inverse=True)[1])
    if other is not None:
        found["alignment"] = {"against": arguments.against, **quality.alignment(sae, other.to(device))}
    if arguments.save:
        save_sae(sae, resolved(arguments.save))
        found["saved"] = arguments.save
    print(json.dumps(found, indent=2) if arguments.json else measuring_summary(found))
    return 0


def load(arguments: Arguments, flag: str, address: str, site: str, source: Embeddings) -> "tuple[SAE, str]":
    """The SAE at `address`, and what remains unsure of its model; ValueError if there is none for these embeddings."""
    from saecore.sae.checkpoints import load_embedding_sae  # this and PyTorch are not loaded for --help

    with commands.given(flag):
        sae = load_embedding_sae(address, site)
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
    """int64, one for every embedding: the number of its word among `words` where there are some, or an integer as it stands."""
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
    """ValueError if --save names a folder in which other files lie, or that cannot be written.

    The SAE's own may be written again, with its threshold, and so may what a full disk left of one.
    """
    commands.check_writable("--save", arguments.save)
    left = names_in(arguments.save) <= {"README.md", "sae.safetensors"}  # its config.json comes last
    if not left and resolved(arguments.save) != resolved(arguments.sae):
        raise ValueError(f"--save {arguments.save} holds other files; name a new or empty folder")


if __name__ == "__main__":
    sys.exit(main())
