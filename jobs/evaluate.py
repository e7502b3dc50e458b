"""Are the maps of a run true? A judge for any run: whether its maps are faithful, in plain words with intervals.

    python -m jobs.evaluate --run runs/photos
    python -m jobs.evaluate --run runs/photos --images-sample 500 --methods contrib,contrib_grad,occlusion

Patches are taken out of a sample of the run's images in the order of each map, and the targets are computed anew
(`saecore.evaluation.faithfulness`). The flow is `jobs.pipeline`'s, with `saecore.judging.stage.Evaluate` in its replicas:

    a sample of the run's plan -> decode (CPU tasks) -> maps, removal, nulls, write (replicas) -> verdict

What comes out is a run folder of its own, by default `evaluation` in the run: the tables `faithfulness` and `curves`, and
verdict.json. The same command again resumes it, or says the verdict once more.

Left out: the maps that the run wrote. The same maps are made again, in float32 and without rounding to 8 bits.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from saecore import schema
from saecore.images.changes import other_files, shortened
from saecore.images.effort import MAX_PIXELS
from saecore.judging import sample, verdict
from saecore.judging.places import Sight, places_of
from saecore.judging.settings import CHECKS, PICTURES_AT_ONCE, WAYS, Settings, forwards
from saecore.judging.stage import Evaluate
from saecore.judging.wording import curves_svg
from saecore.methods import METHODS, methods_for
from saecore.pipeline.clock import Clock
from saecore.pipeline.config import ExplainConfig, ModelDigests, parts_of
from saecore.pipeline.decoder import IMAGE_SECONDS
from saecore.pipeline.models import head_for, load_fitting_head, tower_at
from saecore.pipeline.stages import Decode
from saecore.runs.record import Record, read_complete
from saecore.runs.refusals import refusals
from saecore.runs.run import check_place, open_run
from saecore.storage import join_uri, resolved, write_atomic

from . import cluster, collection, commands, console, decoding, locks, origin, pipeline, remade
from .pool import Pool, Wishes
from .summaries import refused_images, run_summary, verdict_tables

if TYPE_CHECKING:
    from saecore.towers.tower import ImageTower

CONTROL = "attention"
"""The method that knows no target is judged beside any other."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Are the maps of a run true?

    Needs the folder of a complete run of jobs.explain, and the images and models that it was made of.
    """

    run: str
    """Folder of the run: a path, or an s3:// or gs:// address."""
    images_sample: int = 500
    """Images that are judged, drawn from those of the run; all, if it has fewer."""
    methods: str = ""
    """Methods that are judged, joined by commas; by default those of the run. The first is compared with the others."""
    latents: int = 16
    """Latents of each image that are judged: its strongest. Texts and concepts of the run are judged besides."""
    removal: str = "drop"
    """How patches are taken out, one or several of drop (their tokens leave the sequence), mean (their pixels become the mean
    colour) and blur, joined by commas."""
    steps: int = 10
    """In how many parts patches are taken out."""
    shapley_subsets: int = -1
    """Subsets of the patches by which Shapley values are sampled; -1 is 15 for each patch, 0 does without. Four times as many
    halve their error."""
    checks: str = ",".join(CHECKS)
    """What is measured besides, joined by commas: agreement (with occlusion), randomisation (of encoder rows and layers),
    stability (a shift, JPEG, bfloat16), nulls (an SAE and a tower that nobody trained). `none` is none."""
    head: str = ""
    """What the method removal predicts with; by default that of the run, or the demo's for its CLIP."""
    masks: str = ""
    """True masks of objects: a folder of PNG files, or a Parquet file. Adds whether maps lie on them."""
    seed: int = 0
    """Of the sample, and of all that is drawn at random."""
    out: str = ""
    """Folder of the evaluation; by default `evaluation` in the run. The same command again resumes it."""
    replicas: int = 0
    """Actors that hold the models. 0 is as many as the GPUs carry, or one if there is no GPU."""
    gpus_per_replica: float = -1.0
    """GPUs of each replica; a fraction is allowed. -1 is one GPU if there are GPUs, else none."""
    wait_minutes: float = 10.0
    """Minutes to wait for nodes that the cluster at RAY_ADDRESS starts on demand. 0 refuses at once what does not fit."""
    image_seconds: float = IMAGE_SECONDS
    """An image whose decoder takes longer is refused. 0 sets no limit."""
    stop_seconds: float = 10.0
    """Seconds that a first Ctrl-C or SIGTERM leaves for the chunks that are worked on. 0 ends at once."""
    local: bool = False
    """Run in this process, without Ray. It does so by itself where there is one machine, and at most one GPU."""
    ray: bool = False
    """Run on Ray."""
    log_json = ""
    """See `pipeline.Told`; the lines of progress say enough of a sample."""
    dry_run: bool = False
    """Say what the command would do, and how many forwards it would take, and do nothing."""

    @property
    def wishes(self) -> Wishes:
        """What is asked of the pool."""
        return Wishes(self.replicas, self.gpus_per_replica)

    @property
    def place(self) -> str:
        """The folder of the evaluation."""
        return self.out or join_uri(self.run, verdict.FOLDER)

    @property
    def ways(self) -> tuple[str, ...]:
        """How patches are taken out."""
        return listed("--removal", self.removal, WAYS)

    @property
    def checked(self) -> tuple[str, ...]:
        """What is measured besides."""
        return () if self.checks == "none" else listed("--checks", self.checks, CHECKS)

    def check(self) -> None:
        """See `commands.Checked.check`."""
        commands.at_least(self, images_sample=1, latents=0, steps=1, shapley_subsets=-1, seed=0)
        commands.at_least(self, replicas=0, wait_minutes=0, image_seconds=0, stop_seconds=0)
        self.ways  # noqa: B018
        self.checked  # noqa: B018
        with commands.given_fields(self):
            self.wishes.check()
        if self.local and (self.ray or self.replicas > 1):
            raise ValueError("--local is without Ray: omit --ray and --replicas, or omit --local")


def listed(flag: str, words: str, known: Sequence[str]) -> tuple[str, ...]:
    """`drop,mean` -> each once; ValueError for a word that is not known, or for none."""
    found = tuple(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    if not found or set(found) - set(known):
        wrong = next((word for word in found if word not in known), words)
        raise ValueError(f"{flag} {wrong!r}: must be one or several, joined by commas, of {', '.join(known)}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: evaluate(sys.argv[1:] if argv is None else list(argv)))


def evaluate(argv: list[str]) -> int:
    """Check everything, judge what is pending, say what came of it."""
    clock = Clock()
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "evaluate")
    pipeline.share_cores()
    with console.quiet() as log, contextlib.ExitStack() as locked:
        with commands.mistakes():
            job = prepare(arguments, argv, locked)
        if job is None:
            return 0
        log.run = job.run.uri
        if pipeline.complete(job, dataclasses.replace(arguments, out=arguments.place), clock):
            pipeline.close(job, clock)
        record = job.run.record()
        found = verdict.judged(job.run.uri, record.methods)
        verdict.write(job.run.uri, found)
        write_atomic(join_uri(job.run.uri, "curves.svg"), curves_svg(found).encode())
    print("\n".join([verdict_tables(found), "", *found.sentences, "", run_summary(arguments.place, record)]))
    if record.n_refused:
        print(refused_images(arguments.place, refusals(job.run), is_explained=False))
    if not arguments.out:  # pages look for it in the run
        commands.propose(
            f"next          {commands.line('report', '--run', arguments.run)}    # pages, with this verdict"
        )
    return 0


# ---- Before the work.


def prepare(arguments: Arguments, argv: list[str], locked: contextlib.ExitStack) -> pipeline.Job | None:
    """A job from its arguments, or None after --dry-run; ValueError for what the user can mend."""
    from saecore.removal.saved import digest_of

    with commands.given("--run"):
        record = read_complete(resolved(arguments.run))
    config = remade.configuration(arguments.run, record)
    assert isinstance(config, ExplainConfig)
    if not arguments.dry_run:
        with commands.given("--out"):
            check_place(resolved(arguments.place))
    tower, sae, digests = remade.models(arguments.run, config)
    assert sae is not None
    remade.check_same(arguments.run, record, {"schema": schema.VERSION, **own_parts(config, digests)})
    tower = tower_at(config.sae, sae, config.clip, tower)
    settings = configure(arguments, record, config, tower)
    with commands.given("--head"):
        head = load_fitting_head(settings.head, settings.methods, tower)
    digests = digests._replace(head="" if head is None else digest_of(head))
    image_ids = sample.draw(resolved(arguments.run), arguments.images_sample, arguments.seed)
    if not len(image_ids):
        raise ValueError(f"--run {arguments.run} has no image that was explained: there is nothing to judge")
    plan = sample.plan_of(resolved(arguments.run), image_ids, PICTURES_AT_ONCE)
    if others := other_files(plan):
        raise ValueError(
            f"the images of {arguments.run} are gone or have changed since it was made: {shortened(others)}"
        )
    cases, said = None, list[str]()
    if arguments.masks:
        with commands.given("--masks"):
            found = places_of(
                resolved(arguments.run),
                resolved(arguments.masks),
                image_ids,
                settings.targets.texts,
                Sight(tower.preprocess.size, tower.grid, tower.vision.config.patch_size),
                arguments.seed,
            )
        cases, settings = found.table, dataclasses.replace(settings, masks=f"{arguments.masks} {found.sha256[:16]}")
        said.append(f"masks         {found.said}")
    n_targets = (settings.k or len(settings.targets.latents)) + len(settings.targets.words)
    each = forwards(settings, tower.grid[0] * tower.grid[1], n_targets)
    work = f"{len(image_ids):,} images, {n_targets} targets each, by {', '.join(settings.methods)}"
    work += f": about {each:,.0f} forwards an image"
    if arguments.dry_run:
        print("\n".join([*said, f"would judge {work}, into {arguments.place}"]))
        return None
    pool = make_pool(arguments)
    settings = dataclasses.replace(settings, device=pool.device, threads=pool.threads)
    lock = locked.enter_context(locks.held("--out", arguments.place, "evaluate"))
    parts = {"schema": schema.VERSION, "kind": "evaluate", **parts_of(settings, digests)}
    made_by = {
        "command": commands.called("evaluate", *argv),
        "config": dataclasses.asdict(settings),
        "replicas": pool.replicas,
        "versions": origin.versions(),
        "git_commit": origin.git_commit(),
        "started": collection.now(),
        "grid": list(tower.grid),
        "n_latents": sae.config.n_latents,
        "sae": sae.describe(),
    }
    with commands.given("--out"):
        run = open_run(resolved(arguments.place), parts, made_by, lambda: plan)
    print("\n".join([*said, f"judges {work}"]))
    decode = Decode(
        tower.preprocess,
        record.parts.get("max-pixels", MAX_PIXELS),
        arguments.image_seconds,
        decoding.held(record.parts),
    )
    tags = {"methods": ",".join(settings.methods), "of": settings.of}
    return pipeline.Job(run, decode, functools.partial(Evaluate, settings, cases), tags, pool, lock)


def own_parts(config: ExplainConfig, digests: ModelDigests) -> dict[str, object]:
    """The parts of a run's fingerprint that say which models made it."""
    return {name: part for name, part in parts_of(config, digests).items() if name in ("clip", "sae", "site")}


def configure(arguments: Arguments, record: Record, config: ExplainConfig, tower: "ImageTower") -> Settings:
    """What the replicas are told, without their device; ValueError for what these models cannot do."""
    from saecore.relevance.explain import check_fits
    from saecore.removal.shapley import ENOUGH, LEAST

    kept, targets = config.targets.kept and arguments.latents > 0, config.targets
    if not (kept or targets.latents or targets.words):
        raise ValueError("--latents 0 leaves nothing to judge: this run has no texts and no concepts")
    k = min(arguments.latents, config.k) if kept else 0
    targets = targets._replace(kept=kept, latents=() if kept else targets.latents)
    with commands.given_fields(arguments):
        methods = methods_for(arguments.methods, record.reads_tokens) if arguments.methods else config.methods
        methods = tuple(dict.fromkeys((*methods, CONTROL)))
        check_fits(tower, methods, config.options)
        # The run's own head serves where a method needs one; the methods that are judged may be others than those of the run.
        own = config.head if any(METHODS[name].needs_head for name in methods) else ""
        head = head_for(config.clip, methods, collection.address(arguments.head) if arguments.head else own)
    given, n_patches = arguments.shapley_subsets, tower.grid[0] * tower.grid[1]
    if 0 < given < (least := LEAST * n_patches):
        raise ValueError(f"--shapley-subsets {given}: must be 0, or at least {least} for the patches of this model")
    known = {field.name: getattr(config, field.name) for field in dataclasses.fields(ExplainConfig)}
    n_latents = k or len(targets.latents)
    known |= {
        "k": k,
        "methods": methods,
        "targets": targets,
        "batch_size": 0,
        "precision": "float32",
        "embeddings": False,
        "head": head,
    }
    return Settings(
        **known,
        of=record.fingerprint,
        sample=arguments.images_sample,
        ways=arguments.ways,
        steps=arguments.steps,
        shapley_subsets=(ENOUGH * n_patches if given < 0 else given) if tower.n_own else 0,
        checks=arguments.checked,
        null_latents=min(4, n_latents),
        seed=arguments.seed,
    )


def make_pool(arguments: Arguments) -> Pool:
    """Where the replicas run: on Ray if that is asked for, if there is a cluster, or if there are several GPUs."""
    import torch

    is_told = arguments.ray or arguments.replicas > 1 or arguments.gpus_per_replica not in (-1, 0, 1)
    several = cluster.asked_for() or torch.cuda.device_count() > 1
    if arguments.local or not (is_told or several):
        return cluster.here(arguments.gpus_per_replica)
    return cluster.make_pool(arguments.wishes, arguments.wait_minutes)


if __name__ == "__main__":
    sys.exit(main())
