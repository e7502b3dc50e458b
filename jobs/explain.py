"""Images to latents and relevance maps: the main job.

    python -m jobs.explain --demo --out runs/demo
    python -m jobs.explain --images photos/ 'shards/*.tar' --clip openai/clip-vit-base-patch16 --sae SAE --out runs/photos

The flow is `jobs.pipeline`'s, with `saecore.pipeline.stages.Explain` in its replicas:

    plan -> decode (CPU tasks) -> CLIP, SAE, maps, write (replicas) -> progress -> preview

The same command again resumes the run, or says that it is complete. A small collection takes the same steps in this
process, since Ray would take longer to start; `--local` and `--ray` choose.
"""

import contextlib
import dataclasses
import functools
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from saecore.demo.writing import write_shards
from saecore.methods import AUTO, DEFAULT_OPTIONS, Options, check_precision, methods_for, parse_methods
from saecore.pipeline.clock import Clock
from saecore.pipeline.config import ExplainConfig, ModelDigests, keeps_results
from saecore.pipeline.models import (
    check_latents,
    check_words,
    head_for,
    load_fitting_head,
    load_word_targets,
    tower_at,
)
from saecore.pipeline.stages import Explain
from saecore.report.preview import write_preview
from saecore.requests import parse_targets
from saecore.runs.fit import ENOUGH, Fit
from saecore.runs.record import Record
from saecore.runs.refusals import refusals
from saecore.sae import sites
from saecore.spellings import Model, telling
from saecore.storage import writing
from saecore.upkeep.lock import Lock

from . import collection, commands, console, decoding, exits, locks, pipeline
from .hints import after_explain
from .pool import DEVICES
from .summaries import outline, refused_images, run_summary

if TYPE_CHECKING:
    from saecore.sae.model import SAE
    from saecore.towers.tower import ImageTower

DEFAULT_K = 32

POOR_FIT = exits.FAULT
"""Exit code of a run whose SAE does not fit the images. The same command with --allow-poor-fit resumes the run, or keeps it."""

DEMO_SCENES, DEMO_SHARDS = 512, 4


@dataclasses.dataclass(frozen=True)
class Arguments(collection.Arguments):
    """Images to latents and relevance maps.

    Needs --images, --clip and --sae, or --demo in place of these three; and --out.
    """

    # Those that have their names in `ExplainConfig` say there whether they change results.
    sae: str = ""
    """SAE: a folder, an MSAE .pth file, either on s3:// or gs:// too, hf://OWNER/REPOSITORY[/PATH][@REVISION], or
    `demo` or `demo-patches`."""
    site: str = ""
    """Where the SAE reads, if its files do not say: embedding; embedding:l2 if it was trained on embeddings of length 1; or
    layerN.residual:cls, layerN.residual:patches or layerN.residual:all, the residual streams after layer N."""
    pool: str = ""
    """Of an SAE that reads patches or all tokens: how a latent's values there become one for the image: max, mean, sum, or cls
    (of all tokens only). There is no default, since projects differ."""
    head: str = ""
    """What the method removal predicts with, made by jobs.distill for this CLIP: a folder, on s3:// or gs:// too, or `demo`,
    which is the default with the embedded CLIP."""
    any_clip: bool = dataclasses.field(default=False, metadata=keeps_results("it lets a model pass, and changes none"))
    """Run an SAE whose files name another model than --clip."""
    allow_poor_fit: bool = dataclasses.field(default=False, metadata=keeps_results("it lets a run go on"))
    """Go on although the SAE reconstructs half of the images or more poorly (fvu at least 0.9)."""
    k: int = 0
    """Latents kept of each image. 0 is 32, or as many as the SAE lets fire if these are fewer."""
    method: str = dataclasses.field(default=AUTO, metadata=keeps_results("`ExplainConfig.methods` holds it"))
    """How maps are computed: one or several of contrib (exact), contrib_grad (exact gradient), chefer, legrad, gradeclip,
    rollout, dense, occlusion, shapley, removal (needs a head), attention, joined by commas. Of an SAE that reads tokens:
    activation, contrib, contrib_grad, occlusion, attention. `auto` is contrib, or removal if there is a --head; for tokens it
    is contrib,activation."""
    targets: tuple[str, ...] = ("kept",)
    """What the maps explain, one or several: `kept`, the latents kept of each image; text:A PHRASE and concept:A WORD, which
    are added to these; latents:NUMBER[,NUMBER] in place of these; `no-kept` for maps of texts and concepts only."""
    concept_latents: int = 8
    """Latents that make up a concept."""
    concept_positive: bool = False
    """A concept takes only latents with a positive weight."""
    options: Annotated[Options, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="methods'")] = DEFAULT_OPTIONS
    """What the methods leave open. Each option says which methods it concerns."""
    keep_embeddings: bool = dataclasses.field(
        default=False, metadata=keeps_results("`ExplainConfig.embeddings` holds it")
    )
    """Write the CLIP embeddings too. With them jobs.name finds better names. For an SAE inside the tower, all of the tower is
    run."""
    demo: bool = dataclasses.field(default=False, metadata=keeps_results("it stands for other arguments"))
    """Explain 512 drawn scenes with the embedded CLIP and SAE, and write their embeddings."""

    def check(self) -> None:
        """See `collection.Arguments.check`."""
        if not self.demo and not (self.images and self.clip and self.sae):
            raise ValueError("give --images, --clip and --sae, or --demo for all three")
        commands.at_least(self, k=0, concept_latents=1)
        with commands.given_fields(self, self.options):
            check_precision(self.precision, parse_methods(self.method))
            parse_targets(self.targets)
            self.options.check()
        super().check()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: explain(sys.argv[1:] if argv is None else list(argv)))


def explain(argv: list[str]) -> int:
    """Check everything, run what is pending, say what came of it."""
    clock = Clock()
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "explain")
    pipeline.share_cores()
    with console.quiet() as log, contextlib.ExitStack() as locked:
        with commands.mistakes():
            job = prepare(arguments, argv, locked)
        if job is None:
            return 0
        log.run = job.run.uri
        try:
            if pipeline.complete(job, arguments, clock, functools.partial(watch, job, arguments)):
                write_preview(job.run.uri)
                pipeline.close(job, clock)
        except pipeline.AlarmError as alarm:
            print(f"stopped: {alarm}")
            return POOR_FIT
        record = job.run.record()
    print(run_summary(arguments.out, record))
    if record.n_refused:
        print(refused_images(arguments.out, refusals(job.run)))
    if record.fit.is_poor() and not arguments.allow_poor_fit:
        print(f"kept, but {advice(record.fit, record)}")
        return POOR_FIT
    commands.propose(after_explain(arguments.out, record))
    return collection.judged(arguments, record)


def watch(job: pipeline.Job, arguments: Arguments, fit: Fit) -> None:
    """`pipeline.AlarmError` once it is sure that the SAE does not fit these images, unless that is allowed."""
    if fit.is_poor(ENOUGH) and not arguments.allow_poor_fit:
        raise pipeline.AlarmError(advice(fit, job.run.record()))


def advice(fit: Fit, record: Record) -> str:
    """One sentence on a poor fit: what was counted, and what to check."""
    sae = record.sae
    reads = f"{sae['site']}, {sae['n_inputs']} wide" + (f", of {sae['model']}" if sae["model"] else "")
    place = (
        "on its final embedding, and whether on embeddings of length 1 (--site embedding:l2)"
        if record.has_words
        else f"at this layer, on these tokens, and whether on vectors of length 1 (--site {record.site.removesuffix(':l2')}:l2)"
    )
    return (
        f"{fit.words()}: the SAE, taken to read {reads}, does not fit --clip {record.clip}; "
        f"check that it was trained on this model, {place}, or let it pass with --allow-poor-fit"
    )


# ---- Before the work.


def prepare(arguments: Arguments, argv: list[str], locked: contextlib.ExitStack | None = None) -> pipeline.Job | None:
    """A job from its arguments, or None after --dry-run; ValueError for what the user can mend.

    The lock of the run folder goes into `locked`; without it the folder is not locked.
    """
    collection.check_outside(arguments)
    images = arguments.images or demo_images(arguments.out)
    loaded = load(arguments)
    config = configure(arguments, loaded)
    inputs = collection.Inputs(arguments, images)
    if not arguments.dry_run:
        on_devices = (dataclasses.replace(config, device=device) for device in DEVICES)
        collection.check_run(inputs, [collection.fingerprint_parts(inputs, on, loaded.digests) for on in on_devices])
    pool = collection.make_pool(arguments, inputs, loaded.tower.preprocess.bytes)  # it may start Ray: the last check
    config = dataclasses.replace(config, device=pool.device, threads=pool.threads)
    if loaded.remark:
        print(loaded.remark)
    if arguments.dry_run:
        print(outline(inputs.plan, "explain", arguments.out, in_words(config, loaded)))
        return None
    parts = collection.fingerprint_parts(inputs, config, loaded.digests)
    made_by = collection.made_by("explain", argv, config, inputs, pool) | {
        "grid": list(loaded.tower.grid),
        "n_latents": loaded.sae.config.n_latents,
        "sae": loaded.sae.describe(),
    }
    lock = Lock() if locked is None else locked.enter_context(locks.held("--out", arguments.out, "explain"))
    run = collection.begin_run(inputs, parts, made_by)
    decode = decoding.decoder(arguments, loaded.tower.preprocess, inputs.run)
    return pipeline.Job(run, decode, functools.partial(Explain, config), tags(config, loaded), pool, lock)


class Loaded(NamedTuple):
    """The models of a run on the CPU, loaded once to be checked; each replica loads them again."""

    clip_address: str
    sae_address: str
    tower: "ImageTower"
    sae: "SAE"
    head: str
    """The address of the head, empty if no method needs one."""
    digests: ModelDigests
    remark: str | None
    """A sentence if nothing tells whether the two belong together."""


def load(arguments: Arguments) -> Loaded:
    """CLIP and SAE; ValueError if one cannot be had, or they do not belong together."""
    from saecore.removal.saved import digest_of
    from saecore.sae.checkpoints import load_running_sae
    from saecore.towers.loading import load_tower

    clip, address = collection.address(arguments.clip or "demo"), collection.address(arguments.sae or "demo")
    with commands.given("--sae"):
        sae = load_running_sae(address, arguments.site)
    with commands.given("--clip"):
        tower = load_tower(clip)
    with commands.given("--sae"):
        tower = tower_at(address, sae, clip, tower)
    digest = tower.sha256()[:16]  # once: of L/14 it takes a second
    named = Model(telling(clip), digest)
    remark = commands.check_same_model(
        "--sae", address, sae.config.trained_on, f"--clip {clip}", named, arguments.any_clip
    )
    sae.firing_threshold()  # a BatchTopK SAE may have none yet
    with commands.given_fields(arguments):
        methods = methods_for(arguments.method, sites.reads_tokens(sae.config.site), bool(arguments.head))
        head = head_for(clip, methods, collection.address(arguments.head) if arguments.head else "")
        fitting = load_fitting_head(head, methods, tower)
    digests = ModelDigests(digest, sae.sha256()[:16], sae.config.site, digest_of(fitting) if fitting else "")
    return Loaded(clip, address, tower, sae, head, digests, remark)


def configure(arguments: Arguments, loaded: Loaded) -> ExplainConfig:
    """The configuration of the replicas, without their device; ValueError for what these models cannot do."""
    from saecore.relevance.explain import check_fits

    sae, targets = loaded.sae.config, parse_targets(arguments.targets)
    reads_tokens = sites.reads_tokens(sae.site)
    most = sae.n_latents if reads_tokens else sae.most_firing
    if arguments.k > most:
        raise ValueError(f"--k {arguments.k}: this SAE lets {most} latents fire, so at most that many can be kept")
    with commands.given_fields(arguments, arguments.options):
        methods = methods_for(arguments.method, reads_tokens, bool(arguments.head))
        check_precision(arguments.precision, methods)
        sites.check_pool(arguments.pool, sites.parse(sae.site).tokens)
        check_latents(targets, loaded.sae)
        check_words(targets, sae.site)
        check_fits(loaded.tower, methods, arguments.options)
    config = ExplainConfig(
        clip=loaded.clip_address,
        sae=loaded.sae_address,
        site=arguments.site,
        pool=arguments.pool,
        head=loaded.head,
        k=arguments.k or min(DEFAULT_K, most),
        batch_size=arguments.batch_size,
        precision=arguments.precision,
        methods=methods,
        targets=targets,
        concept_latents=arguments.concept_latents,
        concept_positive=arguments.concept_positive,
        options=arguments.options,
        embeddings=arguments.keep_embeddings or arguments.demo,
    )
    with commands.given("--clip"):
        load_word_targets(config, loaded.tower, loaded.sae)  # so that a text tower that cannot be had is told now
    return config


def in_words(config: ExplainConfig, loaded: Loaded) -> list[str]:
    """What would be computed, for --dry-run."""
    return [
        f"with CLIP {config.clip} and SAE {config.sae}, which reads {loaded.sae.config.site}"
        + (f", pooled by {config.pool}" if config.pool else ""),
        f"{config.k} latents per image, maps of {', '.join(config.targets.specs())} by {', '.join(config.methods)}",
    ]


def tags(config: ExplainConfig, loaded: Loaded) -> dict[str, str]:
    """Metadata of every Parquet file of the run."""
    height, width = loaded.tower.grid
    return {
        "clip": config.clip,
        "clip_sha256": loaded.digests.clip,
        "sae": config.sae,
        "sae_sha256": loaded.digests.sae,
        "site": loaded.digests.site,
        **({"pool": config.pool} if config.pool else {}),
        **({"head": config.head, "head_sha256": loaded.digests.head} if config.head else {}),
        "methods": ",".join(config.methods),
        "norms": ", ".join(f"{method} {config.options.norm_of(method)}" for method in config.methods),
        "grid_height": str(height),
        "grid_width": str(width),
    }


def demo_images(out: str) -> tuple[str, ...]:
    """The folder of the demo's scenes, next to the run; the scenes are drawn if they are not there yet."""
    if "://" in out:
        raise ValueError(f"--demo draws its images next to the run, so --out {out} must be a local folder")
    folder = Path(out + "-images")
    if not folder.exists():
        # The folder has another name until all images are there: an interrupted start must not leave half of them.
        with writing(str(folder)):
            unfinished = Path(tempfile.mkdtemp(prefix=folder.name, dir=_made(folder.parent)))
            try:
                write_shards(unfinished, DEMO_SCENES, DEMO_SHARDS)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)  # still there only if something above failed
    return (str(folder),)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
