"""Names for the latents of a run's SAE, or of any SAE: words of a vocabulary, into RUN/latents.parquet (schema.NAMES).

    python -m jobs.name --run runs/demo
    python -m jobs.name --run runs/photos --vocabulary words.txt --templates 'a photo of a {}' 'a drawing of a {}'
    python -m jobs.name --run runs/photos --interpreter Concept_Interpreter_....npy --vocabulary clip_disect_20k.txt
    python -m jobs.name --sae SAE --clip openai/clip-vit-large-patch14 --vocabulary words.txt --out names.parquet

    vocabulary -> text embeddings -> scores, a block of words at a time -> the nearest words -> names

How names are found, and which of the ways tells the truth: `saecore.naming.names`. The same command again does the same again.
By data, the embeddings of all top images are held at once: at most 1.5 GB for 24,576 latents of width 768.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from saecore import spellings
from saecore.naming.vocabulary import read_lines, read_texts, read_vocabulary
from saecore.query import results
from saecore.runs import card, latents
from saecore.runs.files import parquet_bytes
from saecore.runs.record import read_complete
from saecore.storage import write_atomic
from saecore.training.embeddings import open_embeddings
from saecore.training.survey import draw

from . import commands, console
from .hints import after_name
from .summaries import naming_summary

if TYPE_CHECKING:
    from torch import Tensor

    from saecore.naming.names import Valid
    from saecore.sae.model import SAE
    from saecore.towers.text import TextTower

WAYS = ("data", "decoder", "decoder+mean")

SAMPLE_IMAGES = 4096
"""Random images that say what scores are usual: mean and standard deviation to 1.6 %."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Names for the latents of a run, or of an SAE: words of a vocabulary.

    Needs --run, or else --sae, --clip and --out; and --vocabulary, unless the CLIP is `demo`.
    """

    run: str = ""
    """A complete run of jobs.explain, local or at an address: its latents.parquet gets the names."""
    vocabulary: str = ""
    """Words or phrases, one a line, UTF-8; `demo`, the words of the drawn world, is what the embedded CLIP takes by default."""
    templates: tuple[str, ...] = ("{}",)
    """What each word is put into, at {}. Of several, the mean of their L2-normalised embeddings."""
    texts: str = ""
    """Out folder of jobs.embed --text, instead of --vocabulary and --templates."""
    by: str = ""
    """data, decoder or decoder+mean; by default data where the run has embeddings, else decoder."""
    subtract_mean: bool = False
    """Take the vocabulary's mean from every text embedding: what all texts share and no image has."""
    interpreter: str = ""
    """MSAE's Concept_Interpreter_*.npy, whose scores of --vocabulary's words are taken instead of any of ours."""
    words: int = 10
    """Nearest words kept for each latent."""
    min_score: float | None = None
    """Least score of a valid name: by default 1 standard deviation by data, none by direction."""
    min_margin: float | None = None
    """Least margin to the runner-up of a valid name: by default 0.2, in standard deviations or cosines."""
    min_ratio: float | None = None
    """Least ratio to a runner-up of positive score of a valid name: by default none."""
    seed: int = 42
    """Seed of the random images that names by data compare with."""
    sae: str = ""
    """An SAE without a run, with --out; or where the run's SAE lies now."""
    site: str = ""
    """Where that SAE reads, if its files do not say: embedding or embedding:l2; by default what the run was told."""
    any_clip: bool = False
    """Take an SAE whose files name another model than --clip; a run's was let pass before."""
    clip: str = ""
    """The CLIP whose embeddings that SAE is for; or where the run's CLIP lies now."""
    out: str = ""
    """Parquet file for the names, where there is no run."""

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
            raise ValueError("--texts holds its own words and templates: leave --vocabulary and --templates away")
        if self.interpreter:
            if not self.vocabulary:
                raise ValueError("--interpreter needs the --vocabulary that its rows are for")
            if self.texts or self.by or self.subtract_mean or self.templates != ("{}",):
                raise ValueError(
                    "--interpreter brings its own scores: leave --by, --texts, --templates and --subtract-mean away"
                )
        if self.words < 2:
            raise ValueError(f"--words {self.words}: must be at least 2, a name and its runner-up")
        commands.at_least(self, seed=0)
        for field in ("min_score", "min_margin", "min_ratio"):
            value = getattr(self, field)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"--{field.replace('_', '-')} {value}: must be a number")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: name(sys.argv[1:] if argv is None else list(argv)))


def name(argv: list[str]) -> int:
    """Check everything, find names, write them, say what came of it."""
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "name")
    with console.quiet() as log:
        with commands.mistakes():
            check_place(arguments)
            job = prepare(arguments)
        log.run = arguments.run
        table = names(job, arguments)
    metadata = {"naming": json.dumps(job.made_by)}
    if job.run:
        latents.merge(arguments.run, table.replace_schema_metadata(metadata))
        card.write(arguments.run, job.run.record)
    else:
        data = parquet_bytes(table.replace_schema_metadata(metadata), latents.ROW_GROUP_ROWS)
        write_atomic(arguments.out, data)
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


class Job(NamedTuple):
    """What the arguments come to."""

    sae: "SAE"
    run: results.Results | None
    tower: "TextTower | None"
    """None with an interpreter."""
    words: list[str]
    texts: np.ndarray | None
    """float32 (words, width), where --texts holds them."""
    way: str
    """One of WAYS, or `interpreter`: what names are by."""
    valid: "Valid"
    made_by: dict[str, Any]
    """For the table's metadata."""


def prepare(arguments: Arguments) -> Job:
    """Load what is needed; ValueError for what the user can mend."""
    run = results.open(arguments.run) if arguments.run else None
    if arguments.by == "data" and not has_embeddings(run):
        raise ValueError("--by data needs a run of jobs.explain --keep-embeddings; --by decoder needs none")
    from saecore.naming import names as naming  # and with it PyTorch: --help does without

    sae = load_sae(arguments, run)
    way = arguments.by or ("data" if has_embeddings(run) else "decoder")
    clip = arguments.clip or (run.record.clip if run else "")
    tower, texts = None, None
    if arguments.interpreter:
        way = "interpreter"
        with commands.given("--vocabulary"):
            words = read_lines(arguments.vocabulary)  # as they are: row i is line i
        naming.open_interpreter(arguments.interpreter, len(words), sae.config.n_latents)
    else:
        tower = load_tower(clip, run)
        if tower.n_outputs != sae.config.n_inputs:
            raise ValueError(
                f"--clip {clip} makes embeddings of width {tower.n_outputs}, the SAE is for {sae.config.n_inputs}: "
                "it is another CLIP's"
            )
        if run is None:
            check_model(arguments, sae)
        words, texts = words_of(arguments, tower, clip)
    if len(words) < 2:
        raise ValueError(f"a vocabulary of {len(words)} words leaves no choice: it must hold at least 2")
    asked = {field: getattr(arguments, f"min_{field}") for field in naming.Valid._fields}
    valid = naming.VALID_BY_DATA if way == "data" else naming.VALID_BY_DIRECTION
    valid = valid._replace(**{field: value for field, value in asked.items() if value is not None})
    made_by = {
        "by": way,
        "valid": valid._asdict(),
        "clip": clip,
        "sae_sha256": sae.sha256()[:16],
        "vocabulary": arguments.texts or arguments.vocabulary or "demo",
        "n_words": len(words),
        "templates": [] if arguments.texts else arguments.templates,
        "subtract_mean": arguments.subtract_mean,
        "interpreter": arguments.interpreter,
    }
    return Job(sae, run, tower, words, texts, way, valid, made_by)


def has_embeddings(run: results.Results | None) -> bool:
    """Whether the run was made with --keep-embeddings, and of some images."""
    return run is not None and run.record.keeps_embeddings and run.n_images > 0


def load_sae(arguments: Arguments, run: results.Results | None) -> "SAE":
    """The SAE; ValueError if there is none, or it is not the run's."""
    from saecore.sae.checkpoints import load_embedding_sae

    address = arguments.sae or (run.record.sae_address if run else "")
    site = arguments.site or (run.record.given_site if run else "")
    with commands.given("--sae"):
        sae = load_embedding_sae(address, site)
    check_same("sae", address, sae.sha256(), run)
    return sae


def check_model(arguments: Arguments, sae: "SAE") -> None:
    """ValueError if the SAE was trained on another model than --clip; says so where that cannot be told."""
    from saecore.towers.loading import load_tower

    clip = arguments.clip
    with commands.given("--clip"):
        digest = load_tower(clip).sha256()[:16] if sae.config.model_sha256 else ""
    model, trained_on = spellings.Model(spellings.telling(clip), digest), sae.config.trained_on
    remark = commands.check_same_model("--sae", arguments.sae, trained_on, f"--clip {clip}", model, arguments.any_clip)
    if remark:
        print(remark)


def load_tower(clip: str, run: results.Results | None) -> "TextTower":
    """CLIP's text tower; ValueError if there is none, or its other half is not the run's."""
    from saecore.towers.loading import load_text_tower, load_tower

    if run:
        with commands.given("--clip"):
            digest = load_tower(clip).sha256()
        check_same("clip", clip, digest, run)
    with commands.given("--clip"):
        return load_text_tower(clip)


def words_of(arguments: Arguments, tower: "TextTower", clip: str) -> tuple[list[str], np.ndarray | None]:
    """The vocabulary, and its embeddings where --texts holds them; ValueError if there is none, or it is of another CLIP."""
    if arguments.texts:
        with commands.given("--texts"):
            words, embeddings, digest = read_texts(arguments.texts)
        if not tower.sha256().startswith(digest) or embeddings.shape[1] != tower.n_outputs:
            raise ValueError(f"--texts {arguments.texts} was made with another CLIP than {clip}")
        return words, embeddings
    if not arguments.vocabulary and clip != "demo":
        raise ValueError("give --vocabulary, a file with a word a line (docs/names.md says where some are), or --texts")
    with commands.given("--vocabulary"):
        return read_vocabulary(arguments.vocabulary or "demo").words, None


def check_same(model: str, address: str, digest: str, run: results.Results | None) -> None:
    """ValueError if a model is not what the run was made with."""
    if run and not digest.startswith(made_with := run.record.parts[model]):
        raise ValueError(
            f"--{model} {address} is not what {run.uri} was made with: its hash begins with {digest[:16]}, not {made_with}"
        )


def names(job: Job, arguments: Arguments) -> pa.Table:
    """schema.NAMES of the SAE's latents."""
    import torch

    from saecore.naming import names as naming
    from saecore.towers.text import embed_words

    n = arguments.words
    if job.tower is None:
        scores = naming.open_interpreter(arguments.interpreter, len(job.words), job.sae.config.n_latents)
        with commands.mistakes():
            direction = naming.nearest(scores, n)
        return naming.table(job.words, direction, None, False, job.valid)
    device, texts = "cuda" if torch.cuda.is_available() else "cpu", job.texts
    if texts is None:
        if cut := job.tower.too_long([t.replace("{}", word) for word in job.words for t in arguments.templates]):
            print(f"{cut:,} texts are longer than the {job.tower.n_tokens} tokens of this CLIP: cut there")
        texts = embed_words(job.tower, job.words, arguments.templates, device=device)
    sae, texts_VE = job.sae.to(device), torch.from_numpy(texts).to(device)
    if arguments.subtract_mean:
        texts_VE = naming.centred(texts_VE)
    towards = naming.directions(sae, job.way if job.way in naming.DIRECTIONS else "decoder")
    direction, data = naming.nearest(naming.by_direction(towards, texts_VE), n), None
    if job.run is not None and has_embeddings(job.run):
        images, top, sample = (found.to(device) for found in evidence(job.run, arguments.seed))
        data = naming.nearest(watched(naming.by_data(images, top, sample, texts_VE), len(job.words)), n)
    return naming.table(job.words, direction, data, job.way == "data", job.valid)


def evidence(run: results.Results, seed: int) -> "tuple[Tensor, Tensor, Tensor]":
    """What `saecore.naming.names.by_data` takes: embeddings of all top images, whose they are, embeddings of random ones."""
    import torch

    from saecore.naming.names import TOP_IMAGES

    found = run.sql(
        """SELECT latent, image_id, row_number() OVER (PARTITION BY latent ORDER BY activation DESC, image_id) AS place
        FROM activations WHERE activation > 0 QUALIFY place <= ?""",
        TOP_IMAGES,
    )
    image_ids, row = np.unique(found["image_id"].to_numpy(), return_inverse=True)
    top = np.full((run.n_latents, TOP_IMAGES), -1)
    top[found["latent"].to_numpy(), found["place"].to_numpy() - 1] = row
    rows = run.tables.rows("images", pa.chunked_array([image_ids]), ["embedding"]).sort_by("image_id")
    embeddings = rows["embedding"].combine_chunks().flatten().to_numpy().reshape(len(image_ids), -1)
    _, sample = draw(open_embeddings(run.uri), SAMPLE_IMAGES, seed)
    return torch.from_numpy(embeddings.copy()), torch.from_numpy(top), torch.from_numpy(sample)


def watched(blocks: "Iterable[Tensor]", words: int) -> "Iterator[Tensor]":
    """The same blocks, with a progress line."""
    progress = console.Progress(words, 0, "words")
    for block in blocks:
        yield block
        progress.add(len(block), 0)
    progress.close()


if __name__ == "__main__":
    sys.exit(main())
