"""How good an SAE is on embeddings: any SAE that the project reads, on any embeddings of its CLIP.

    python -m jobs.measure --sae runs/msae --embeddings runs/imagenet --ks 16 32 64
    python -m jobs.measure --sae FILE.pth --embeddings runs/cc3m --save converted

Figures, their formulas and papers: `saecore.quality`. A BatchTopK SAE without a threshold gets one from these embeddings;
--save writes the SAE in the project's own form, threshold included, and so converts other people's files.

Left out: how true names and maps are.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from jobs import session
from saecore.storage import filesystem_of, join_uri

if TYPE_CHECKING:
    import torch

    from saecore.embeddings import Survey
    from saecore.sae import SAE


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How good an SAE is on embeddings."""

    sae: str
    """SAE: a folder, an MSAE .pth file, another project's, hf://OWNER/REPOSITORY[/PATH][@REVISION], or `demo`."""
    embeddings: str
    """A run of jobs.embed (or of jobs.explain --embeddings), NAME_rows_width.npy, or Parquet with a column of lists."""
    column: str = "embedding"
    """Parquet column that holds the embeddings."""
    rows: int = 16_384
    """Measure on so many embeddings, chosen at random; all of them where there are fewer."""
    ks: tuple[int, ...] = ()
    """Reconstruct by the k strongest latents, for each of these; none is 8, 16, 32.. up to 512."""
    against: str = ""
    """Another SAE, of another seed say: how well do the latents of the two agree."""
    labels: str = ""
    """A file with a class for every embedding, one a line: what a linear probe sees in the reconstruction."""
    texts: str = ""
    """A folder of jobs.embed --text whose words are the classes: what CLIP's zero-shot classifier sees."""
    save: str = ""
    """Folder to write the SAE to in the project's own form, with its threshold."""
    seed: int = 0
    """Seed of the choice of embeddings."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def check(self) -> None:
        """See `session.Checked.check`."""
        if self.rows < 16:
            raise ValueError(f"--rows {self.rows}: must be at least 16")
        if any(k < 1 for k in self.ks):
            raise ValueError(f"--ks {' '.join(map(str, self.ks))}: each must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return session.run_job(lambda: measure(sys.argv[1:] if argv is None else list(argv)))


def measure(argv: list[str]) -> int:
    """Check everything, measure, print."""
    with session.mistakes():
        arguments = session.parse(Arguments, argv, "jobs.measure")
        sae, seen = load(arguments)
        classes = read_classes(arguments, seen)
        other = load_other(arguments, sae)
    found = figures(arguments, sae, seen, classes, other)
    if arguments.save:
        from saecore.training import save_sae

        save_sae(sae, arguments.save)
        found["saved"] = arguments.save
    print(json.dumps(found) if arguments.json else table(found))
    return 0


def load(arguments: Arguments) -> "tuple[SAE, Survey]":
    """The SAE, and the embeddings to measure it on; ValueError if one cannot be had or they do not fit."""
    from saecore.checkpoints import load_sae
    from saecore.embeddings import choose, open_embeddings

    sae = load_sae(arguments.sae)
    source = open_embeddings(arguments.embeddings, arguments.column)
    if source.width != sae.config.n_inputs:
        raise ValueError(
            f"--sae {arguments.sae} takes embeddings of width {sae.config.n_inputs}, "
            f"--embeddings {arguments.embeddings} are {source.width} wide: they do not belong together"
        )
    return sae, choose(source, arguments.rows, arguments.seed)


def read_classes(arguments: Arguments, seen: "Survey") -> dict[str, Any]:
    """Labels of the chosen embeddings and text embeddings of the classes, as far as they are given."""
    import torch

    found: dict[str, Any] = {}
    words: list[str] = []
    if arguments.texts:
        filesystem, path = filesystem_of(join_uri(arguments.texts, "texts.parquet"))
        try:
            texts = pq.read_table(path, filesystem=filesystem)
        except OSError as error:
            raise ValueError(
                f"--texts {arguments.texts}: no texts.parquet there; jobs.embed --text makes one"
            ) from error
        words = texts["word"].to_pylist()
        found["texts"] = torch.tensor(texts["embedding"].to_pylist())
    if arguments.labels:
        try:
            lines = Path(arguments.labels).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f"--labels {arguments.labels} cannot be read: {error.strerror}") from error
        if len(lines) != seen.rows:
            raise ValueError(f"--labels {arguments.labels}: {len(lines):,} lines for {seen.rows:,} embeddings")
        # Words of --texts first, in their order, so that a label is the place of its text.
        names = words or sorted(set(lines))
        place = {name: index for index, name in enumerate(names)}
        if unknown := sorted(set(lines) - place.keys()):
            raise ValueError(
                f"--labels {arguments.labels}: {unknown[0]!r} is none of the words of --texts {arguments.texts}"
            )
        found["labels"] = torch.tensor([place[lines[row]] for row in seen.held_out.tolist()])
    return found


def load_other(arguments: Arguments, sae: "SAE") -> "SAE | None":
    """The SAE to compare with."""
    from saecore.checkpoints import load_sae

    if not arguments.against:
        return None
    other = load_sae(arguments.against)
    if other.config.n_inputs != sae.config.n_inputs:
        raise ValueError(
            f"--against {arguments.against} takes embeddings of width {other.config.n_inputs}, "
            f"--sae {arguments.sae} of {sae.config.n_inputs}: they cannot be compared"
        )
    return other


def figures(
    arguments: Arguments, sae: "SAE", seen: "Survey", classes: "dict[str, torch.Tensor]", other: "SAE | None"
) -> dict[str, Any]:
    """Everything that was asked for, as it is printed by --json."""
    import torch

    from saecore import quality

    x = torch.from_numpy(seen.evaluation)
    found: dict[str, Any] = {"sae": arguments.sae, "embeddings": arguments.embeddings, "unit_norm": seen.unit_norm}
    if sae.config.architecture == "batchtopk" and sae.threshold is not None and torch.isnan(sae.threshold).any():
        found["calibrated_threshold"] = quality.calibrate(sae, x, sae.config.k)
    found["config"] = sae.describe()
    found["quality"] = quality.quality(sae, x)._asdict()
    ks = arguments.ks or tuple(8 << i for i in range(7))
    found["recovery"] = quality.recovery(sae, x, [k for k in ks if arguments.ks or k <= sae.config.n_latents])
    if other is not None:
        found["alignment"] = quality.alignment(sae, other)
    if "texts" in classes:
        found["zero_shot"] = quality.zero_shot(sae, x, classes["texts"], classes.get("labels"))
    if "labels" in classes:
        found["linear_probe"] = quality.linear_probe(sae, x, classes["labels"])
    return found


def table(found: dict[str, Any]) -> str:
    """The figures, as a person reads them."""
    config, lines = found["config"], []
    if found["unit_norm"]:
        lines.append("warning: every embedding has length 1; SAEs for CLIP expect them before normalisation")
    k = f", k = {config['k']}" if config["k"] else ""
    lines.append(
        f"{found['sae']}: {config['architecture']}, {config['n_latents']:,} latents{k}, width {config['n_inputs']}"
    )
    if "calibrated_threshold" in found:
        lines.append(f"no threshold in the file: calibrated on these embeddings to {found['calibrated_threshold']:.4f}")
    lines += [f"  {name:18}{value:>12,.5g}" for name, value in found["quality"].items()]
    lines.append(f"{'by the k strongest':20}{'k':>8}{'fvu':>10}{'cosine':>10}")
    lines += [f"{'':20}{row['k']:>8,}{row['fvu']:>10.4f}{row['cosine']:>10.4f}" for row in found["recovery"]]
    titles = {
        "alignment": "agreement with the other SAE",
        "zero_shot": "zero-shot, original against reconstructed",
        "linear_probe": "linear probe, original against reconstructed",
    }
    for name, title in titles.items():
        if name in found:
            lines.append(title)
            lines += [f"  {key:26}{value:>10.4f}" for key, value in found[name].items()]
    if "saved" in found:
        lines.append(f"saved to {found['saved']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
