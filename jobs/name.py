"""Name the latents of a run's SAE, or of any SAE, by the words of a vocabulary: RUN/latents.parquet (schema.NAMES).

    python -m jobs.name --run runs/demo
    python -m jobs.name --run runs/photos --vocabulary words.txt --templates 'a photo of a {}' 'a drawing of a {}'
    python -m jobs.name --sae SAE --clip openai/clip-vit-large-patch14 --vocabulary words.txt --out names.parquet

    vocabulary -> text embeddings -> scores, a block of words at a time -> the nearest words -> names

`saecore.naming.scores` has the formulas, and says which of the ways gives true names. The same command again writes the same
names again. By data, the embeddings of all top images are held at once: at most 1.5 GB for 24,576 latents of width 768.
Left out: how true names are, which only the demo knows.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from saecore.naming.vocabulary import read_lines, read_texts, read_vocabulary
from saecore.query import results
from saecore.runs import card, latents
from saecore.runs.files import parquet_bytes
from saecore.runs.record import read_complete
from saecore.spellings import Model, telling
from saecore.storage import write_atomic

from . import commands, console, locks
from .hints import after_name
from .summaries import naming_summary

if TYPE_CHECKING:
    from saecore.naming.names import Nearest, Valid
    from saecore.sae.model import SAE
    from saecore.towers.text import TextTower

WAYS = ("data", "decoder", "decoder+mean")

NO_EMBEDDINGS = (
    "the names are by decoder, since this run keeps no embeddings; names by data are true more often, and need a run of "
    "jobs.explain --keep-embeddings"
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Name the latents of a run, or of an SAE, by the words of a vocabulary.

    Needs --run, or else --sae, --clip and --out; and --vocabulary, unless the CLIP is `demo`.
    """

    run: str = ""
    """A complete run of jobs.explain, local or at an address. The names go into its latents.parquet."""
    vocabulary: str = ""
    """A UTF-8 file with a word or phrase in each line. `demo` stands for the words of the demo, the default for its CLIP."""
    templates: tuple[str, ...] = ("{}",)
    """Texts into which each word is put, at {}. Several give the mean of their L2-normalised embeddings."""
    texts: str = ""
    """Folder that jobs.embed --text wrote; takes the place of --vocabulary and --templates."""
    by: str = ""
    """How names are found: data, decoder or decoder+mean. The default is data if the run keeps embeddings, else decoder."""
    subtract_mean: bool = False
    """Subtract the vocabulary's mean from every text embedding: it is what all texts share and no image has."""
    interpreter: str = ""
    """MSAE's Concept_Interpreter_*.npy, which holds scores for the words of --vocabulary; they replace our scores."""
    words: int = 10
    """How many nearest words are kept for each latent."""
    min_score: float | None = None
    """Least score of a valid name. The default is 1 standard deviation by data, and no limit by direction."""
    min_margin: float | None = None
    """Least margin between a valid name and its runner-up. The default is 0.2, in standard deviations or cosines."""
    min_ratio: float | None = None
    """Least ratio of the score of a valid name to that of its runner-up, if the latter is positive. The default is no limit."""
    seed: int = 42
    """Seed of the random images with which names by data are compared."""
    sae: str = ""
    """An SAE without a run, with --out; or the place to which the run's SAE was moved."""
    site: str = ""
    """Where that SAE reads, if its files do not say it: embedding or embedding:l2. The default is what the run was told."""
    any_clip: bool = False
    """Accept an SAE whose files name another model than --clip. A run's SAE needs this only once, when the run is made."""
    clip: str = ""
    """The model whose embeddings that SAE is for; or the place to which the run's model was moved."""
    out: str = ""
    """Parquet file for the names, if there is no run."""

    def check(self) -> None:
        """See `commands.Checked.check`."""
        if bool(self.run) == bool(self.out):
            raise ValueError("give --run, or else --sae, --clip and --out")
        if self.out and not (self.sae and (self.clip or self.interpreter)):
            raise ValueError("without --run, give --sae and --clip")
        commands.check_templates(self.templates)
        if self.by and self.by not in WAYS:
            raise ValueError(f"--by {self.by}: must be one of {', '.join(WAYS)}")
        if self.texts and (self.vocabulary or self.templates != ("{}",)):
            raise ValueError("--texts holds its own words and templates: omit --vocabulary and --templates")
        if self.interpreter:
            if not self.vocabulary:
                raise ValueError("--interpreter needs the --vocabulary that its rows are for")
            if self.texts or self.by or self.subtract_mean or self.templates != ("{}",):
                raise ValueError(
                    "--interpreter brings its own scores: omit --by, --texts, --templates and --subtract-mean"
                )
        if self.words < 2:
            raise ValueError(f"--words {self.words}: must be at least 2, a name and its runner-up")
        commands.at_least(self, seed=0)
        for field in ("min_score", "min_margin", "min_ratio"):
            if not math.isfinite(value := getattr(self, field) or 0.0):
                raise ValueError(f"{commands.flag(field)} {value}: must be a number")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: name(sys.argv[1:] if argv is None else list(argv)))


def name(argv: list[str]) -> int:
    """Check everything, find names, write them, and print the results."""
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "name")
    with console.quiet() as log:
        with commands.mistakes():
            check_place(arguments)
            job = prepare(arguments)
        log.run = arguments.run
        with locks.held("--run", arguments.run, "name") as lock:
            table = names(job, arguments).replace_schema_metadata({"naming": json.dumps(job.made_by)})
            lock.check()
            if job.run:
                latents.merge(arguments.run, table)
                card.write(arguments.run, job.run.record)
            else:
                write_atomic(arguments.out, parquet_bytes(table, latents.ROW_GROUP_ROWS))
    if job.remark:
        print(job.remark)
    print(naming_summary(table, job.made_by, arguments.run, arguments.out))
    if job.run:
        commands.propose(after_name(arguments.run))
    return 0


def check_place(arguments: Arguments) -> None:
    """ValueError if the names cannot be written where they are to go: before anything is loaded."""
    if arguments.run:
        read_complete(arguments.run)
        commands.check_writable("--run", arguments.run)
    else:
        commands.check_file("--out", arguments.out)


# ---- What is named, by which words, and how.


class Vocabulary(NamedTuple):
    """Words, and what gives their embeddings."""

    words: list[str]
    tower: "TextTower | None" = None
    """None with an interpreter, which needs no embeddings."""
    embeddings: np.ndarray | None = None
    """float32 (words, width), if --texts holds them."""


class Job(NamedTuple):
    """What the arguments come to."""

    sae: "SAE"
    run: results.Results | None
    vocabulary: Vocabulary
    way: str
    """How names are found: one of WAYS, or `interpreter`."""
    valid: "Valid"
    made_by: dict[str, Any]
    """For the table's metadata."""
    remark: str
    """One sentence on the way, or nothing."""


def prepare(arguments: Arguments) -> Job:
    """Load what is needed; ValueError for what the user can mend."""
    from saecore.naming.names import thresholds  # slow: PyTorch comes with it

    run = results.open(arguments.run) if arguments.run else None
    way, remark = choose_way(arguments, run)
    sae = load_sae(arguments, run)
    clip = arguments.clip or (run.record.clip if run else "")
    vocabulary = interpreter_words(arguments, sae) if way == "interpreter" else clip_words(arguments, clip, sae, run)
    if len(vocabulary.words) < 2:
        raise ValueError(f"a vocabulary of {len(vocabulary.words)} words leaves no choice: it must hold at least 2")
    valid = thresholds(way == "data", arguments.min_score, arguments.min_margin, arguments.min_ratio)
    made_by = {
        "by": way,
        "valid": valid._asdict(),
        "clip": clip,
        "sae_sha256": sae.sha256()[:16],
        "vocabulary": arguments.texts or arguments.vocabulary or "demo",
        "n_words": len(vocabulary.words),
        "templates": [] if arguments.texts else arguments.templates,
        "subtract_mean": arguments.subtract_mean,
        "interpreter": arguments.interpreter,
    }
    return Job(sae, run, vocabulary, way, valid, made_by, remark)


def choose_way(arguments: Arguments, run: results.Results | None) -> tuple[str, str]:
    """How names are found, and a remark on it; ValueError if it is to be by data and there are no embeddings."""
    if arguments.interpreter:
        return "interpreter", ""
    kept = run is not None and run.has_embeddings
    if run is not None and not run.record.has_words and (not kept or arguments.by not in ("", "data")):
        where = f"--run {arguments.run}: its SAE reads {run.record.site}, inside the tower"
        raise ValueError(f"{where}, where names are by data only; that needs a run of jobs.explain --keep-embeddings")
    if kept:
        return arguments.by or "data", ""
    if arguments.by == "data":
        raise ValueError("--by data needs a run of jobs.explain --keep-embeddings; --by decoder needs none")
    if run is None or arguments.by or run.record.keeps_embeddings:
        return arguments.by or "decoder", ""
    return "decoder", NO_EMBEDDINGS


# ---- Models.


def load_sae(arguments: Arguments, run: results.Results | None) -> "SAE":
    """The SAE; ValueError if there is none, or it is not the run's."""
    from saecore.sae.checkpoints import load_embedding_sae, load_running_sae

    address = arguments.sae or (run.record.sae_address if run else "")
    site = arguments.site or (run.record.given_site if run else "")
    with commands.given("--sae"):
        sae = load_embedding_sae(address, site) if run is None else load_running_sae(address, site)
    check_of_run("sae", address, sae.sha256(), run)
    return sae


def clip_words(arguments: Arguments, clip: str, sae: "SAE", run: results.Results | None) -> Vocabulary:
    """The vocabulary for a CLIP and an SAE; ValueError if they do not belong together, or it was made with another CLIP."""
    from saecore.towers.loading import load_text_tower, load_tower

    with commands.given("--clip"):
        digest_of_images = load_tower(clip).sha256() if run else ""
        tower = load_text_tower(clip)
    check_of_run("clip", clip, digest_of_images, run)
    if tower.n_outputs != sae.config.n_inputs and (run is None or run.record.has_words):
        widths = f"makes embeddings of width {tower.n_outputs}, and the SAE is for {sae.config.n_inputs}"
        raise ValueError(f"--clip {clip} {widths}: it is another CLIP's")
    if run is None:
        check_model(arguments, sae)
    if arguments.texts:
        with commands.given("--texts"):
            words, embeddings, digest = read_texts(arguments.texts)
        if not tower.sha256().startswith(digest) or embeddings.shape[1] != tower.n_outputs:
            raise ValueError(f"--texts {arguments.texts} was made with another CLIP than {clip}")
        return Vocabulary(words, tower, embeddings)
    if not arguments.vocabulary and clip != "demo":
        raise ValueError("give --vocabulary, a file with a word in each line (docs/names.md lists some), or --texts")
    with commands.given("--vocabulary"):
        return Vocabulary(read_vocabulary(arguments.vocabulary or "demo").words, tower)


def interpreter_words(arguments: Arguments, sae: "SAE") -> Vocabulary:
    """The words of an interpreter's rows; ValueError if their number does not fit, or the interpreter is none."""
    from saecore.naming.scores import open_interpreter

    with commands.given("--vocabulary"):
        words = read_lines(arguments.vocabulary)  # unchanged: row i is line i
    with commands.given("--interpreter"):
        open_interpreter(arguments.interpreter, len(words), sae.config.n_latents)
    return Vocabulary(words)


def check_model(arguments: Arguments, sae: "SAE") -> None:
    """ValueError if the SAE was trained on another model than --clip. Prints a line if that cannot be told."""
    from saecore.towers.loading import load_tower

    with commands.given("--clip"):
        digest = load_tower(arguments.clip).sha256()[:16] if sae.config.model_sha256 else ""
    model, clip, trained_on = Model(telling(arguments.clip), digest), f"--clip {arguments.clip}", sae.config.trained_on
    if remark := commands.check_same_model("--sae", arguments.sae, trained_on, clip, model, arguments.any_clip):
        print(remark)


def check_of_run(model: str, address: str, digest: str, run: results.Results | None) -> None:
    """ValueError if a model is not the one that the run was made with."""
    if run and not digest.startswith(made_with := run.record.sha256_of(model)):
        raise ValueError(
            f"--{model} {address} is not what {run.uri} was made with: its hash begins with {digest[:16]}, not {made_with}"
        )


# ---- The work.


def names(job: Job, arguments: Arguments) -> pa.Table:
    """schema.NAMES of the SAE's latents."""
    from saecore.naming.names import names_table, nearest
    from saecore.naming.scores import open_interpreter

    words = job.vocabulary.words
    if job.way == "interpreter":
        with commands.mistakes(), commands.given("--interpreter"):
            scores = open_interpreter(arguments.interpreter, len(words), job.sae.config.n_latents)
            direction = nearest(scores, arguments.words)
        return names_table(words, direction, None, False, job.valid)
    return names_table(words, *nearest_words(job, arguments), job.way == "data", job.valid)


def nearest_words(job: Job, arguments: Arguments) -> "tuple[Nearest | None, Nearest | None]":
    """The nearest words by direction, in the space of the embedding, and by data, if the run keeps embeddings."""
    import torch

    from saecore.naming.evidence import gather
    from saecore.naming.names import nearest
    from saecore.naming.scores import DIRECTIONS, by_data, by_direction, centred, directions

    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts_VE = torch.from_numpy(text_embeddings(job.vocabulary, arguments.templates, device)).to(device)
    if arguments.subtract_mean:
        texts_VE = centred(texts_VE)
    data = direction = None
    if job.run is None or job.run.record.has_words:
        towards = directions(job.sae.to(device), job.way if job.way in DIRECTIONS else "decoder")
        direction = nearest(by_direction(towards, texts_VE), arguments.words)
    if job.run is not None and job.run.has_embeddings:
        scores = by_data(*gather(job.run, arguments.seed).to(device), texts_VE)
        data = nearest(console.with_progress(scores, len(job.vocabulary.words), "words"), arguments.words)
    return direction, data


def text_embeddings(vocabulary: Vocabulary, templates: tuple[str, ...], device: str) -> np.ndarray:
    """float32 (words, width). Prints how many texts were cut."""
    from saecore.towers.text import embed_words

    if vocabulary.embeddings is not None:
        return vocabulary.embeddings
    words, tower = vocabulary.words, vocabulary.tower
    assert tower
    if n_cut := tower.too_long([template.replace("{}", word) for word in words for template in templates]):
        print(f"{n_cut:,} texts are longer than the {tower.n_tokens} tokens of this CLIP, and were cut there")
    return embed_words(tower, words, templates, device=device)


if __name__ == "__main__":
    sys.exit(main())
