"""Images to latents and relevance maps: the main job.

    python -m jobs.explain --demo --out runs/demo
    python -m jobs.explain --images photos/ 'shards/*.tar' --clip openai/clip-vit-base-patch16 --sae SAE --out runs/photos

The flow is `jobs.pipeline`'s, with `saecore.pipeline.stages.Explain` in its replicas:

    plan -> decode (CPU tasks) -> CLIP, SAE, maps (replicas) -> write (CPU tasks) -> progress -> preview

The same command again resumes, or says that the run is complete. A small collection takes the same three steps in this process,
since Ray would take longer to start; `--local` and `--ray` choose.
"""

import dataclasses
import functools
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tyro

from saecore.demo.writing import write_shards
from saecore.methods import DEFAULT_OPTIONS, Options, dtype_of, parse_methods, parse_targets
from saecore.pipeline.clock import Clock
from saecore.pipeline.stages import Decode, Explain, ExplainConfig, load_models, load_words
from saecore.report.preview import write_preview
from saecore.runs.fit import ENOUGH, Fit
from saecore.runs.record import Record
from saecore.spellings import Model, check_same, telling
from saecore.storage import writing

from . import commands, console, pipeline
from .summaries import next_steps, outline, run_summary

DEFAULT_K = 32

POOR_FIT = 1
"""Exit code of a run whose SAE does not fit the images: it is resumed, or kept, by the same command with --allow-poor-fit."""

DEMO_SCENES, DEMO_SHARDS = 512, 4


@dataclasses.dataclass(frozen=True)
class Arguments(pipeline.Arguments):
    """Images to latents and relevance maps."""

    sae: str = ""
    """SAE: a folder, an MSAE .pth file, hf://OWNER/REPOSITORY[/PATH][@REVISION], or `demo`."""
    site: str = ""
    """Where the SAE reads, if its files do not say: embedding, or embedding:l2 if it was trained on embeddings of length 1."""
    any_clip: bool = False
    """Run an SAE whose files name another model than --clip."""
    allow_poor_fit: bool = False
    """Go on although the SAE reconstructs half of the images or more poorly (fvu at least 0.9)."""
    k: int = 0
    """Latents kept per image; 0 is 32, or as many as the SAE lets fire where these are fewer."""
    method: str = "contrib"
    """How maps are computed, one or several joined by commas: contrib (exact), contrib_grad (exact gradient), chefer, legrad,
    gradeclip, rollout, dense, occlusion, attention."""
    targets: tuple[str, ...] = ("kept",)
    """What they explain: kept, the latents kept of each image; text:A PHRASE and concept:A WORD, which add to these;
    latents:NUMBER[,NUMBER] instead of these; no-kept leaves them away. Several in one run."""
    concept_latents: int = 8
    """Latents that make up a concept."""
    concept_positive: bool = False
    """Take latents with a positive weight only."""
    options: tyro.conf.OmitArgPrefixes[Options] = DEFAULT_OPTIONS
    embeddings: bool = False
    """Write the CLIP embeddings too: jobs.name finds better names with them."""
    demo: bool = False
    """Explain 512 drawn scenes with the embedded CLIP and SAE, and write their embeddings."""

    def check(self) -> None:
        """See `pipeline.Arguments.check`."""
        if not self.demo and not (self.images and self.clip and self.sae):
            raise ValueError("give --images, --clip and --sae, or --demo for all three")
        commands.at_least(self, k=0, concept_latents=1)
        self.options.check()
        super().check()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: explain(sys.argv[1:] if argv is None else list(argv)))


def explain(argv: list[str]) -> int:
    """Check everything, run what is pending, say what came of it."""
    clock = Clock()
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "jobs.explain")
    with console.quiet() as log:
        with commands.mistakes():
            job = prepare(arguments, argv)
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
    if record.fit.is_poor() and not arguments.allow_poor_fit:
        print(f"kept, but {advice(record.fit, record)}")
        return POOR_FIT
    print(next_steps(arguments.out))
    return 0


def watch(job: pipeline.Job, arguments: Arguments, fit: Fit) -> None:
    """`pipeline.AlarmError` once it is sure that the SAE does not fit these images, unless that is allowed."""
    if fit.is_poor(ENOUGH) and not arguments.allow_poor_fit:
        raise pipeline.AlarmError(advice(fit, job.run.record()))


def advice(fit: Fit, record: Record) -> str:
    """One sentence on a poor fit: what was counted, and what to check."""
    sae = record.sae
    reads = f"{sae['site']}, {sae['n_inputs']} wide" + (f", of {sae['model']}" if sae["model"] else "")
    return (
        f"{fit.words()}: the SAE, taken to read {reads}, does not fit --clip {record.clip}; "
        "check that it was trained on this model, on its final embedding, and whether on embeddings of length 1 "
        "(--site embedding:l2), or let it pass with --allow-poor-fit"
    )


# ---- Before any actor starts.


def prepare(arguments: Arguments, argv: list[str]) -> pipeline.Job | None:
    """Resolve the arguments to a job, or print what it would be for --dry-run; ValueError for what the user can mend."""
    from saecore.pipeline.inference import check_fits

    methods, targets = parse_methods(arguments.method), parse_targets(arguments.targets)
    pipeline.check_outside(arguments)
    images = arguments.images or demo_images(arguments.out)
    clip, sae_address = pipeline.address(arguments.clip or "demo"), pipeline.address(arguments.sae or "demo")
    tower, sae = load_models(clip, sae_address, arguments.site)
    found = Model(telling(clip), tower.sha256()[:16])  # once: of L/14 it takes a second
    remark = check_same(sae.config.trained_on, sae_address, f"--clip {clip}", found, arguments.any_clip)
    sae.firing_threshold()  # a BatchTopK SAE may have none yet
    most = sae.config.k if sae.config.architecture == "topk" else sae.config.n_latents
    if arguments.k > most:
        raise ValueError(f"--k {arguments.k}: this SAE lets {most} latents fire, so at most that many can be kept")
    if wrong := [latent for latent in targets.latents if latent >= sae.config.n_latents]:
        raise ValueError(f"--targets latents:{wrong[0]}: this SAE has {sae.config.n_latents} latents, the first is 0")
    check_fits(tower, methods, arguments.options)
    k = arguments.k or min(DEFAULT_K, most)
    shards = pipeline.listed(arguments, images)
    make_plan = functools.cache(functools.partial(pipeline.plan, arguments, shards))
    pool = pipeline.make_pool(arguments, shards, make_plan)
    config = ExplainConfig(
        clip=clip,
        sae=sae_address,
        site=arguments.site,
        k=k,
        batch_size=arguments.batch_size,
        device=pool.device,
        methods=methods,
        targets=targets,
        concept_latents=arguments.concept_latents,
        concept_positive=arguments.concept_positive,
        options=arguments.options,
        embeddings=arguments.embeddings or arguments.demo,
        threads=pool.threads,
    )
    load_words(config, tower, sae)  # so that a text tower that cannot be had is told now
    norms = {method: arguments.options.norm_of(method) for method in methods}
    parts = pipeline.parts(arguments, shards, pool) | {
        "dtype": dtype_of(pool.device, methods),
        "clip": found.sha256,
        "sae": sae.sha256()[:16],
        "site": sae.config.site,
        "k": k,
        "method": ",".join(methods),
        "targets": targets.specs(),
        "concepts": [arguments.concept_latents, arguments.concept_positive] if targets.concepts else [],
        "norms": norms,
        "options": {name: value for name, value in dataclasses.asdict(arguments.options).items() if name != "norm"},
        "embeddings": arguments.embeddings or arguments.demo,
    }
    height, width = tower.grid
    tags = {
        "clip": clip,
        "clip_sha256": parts["clip"],
        "sae": sae_address,
        "sae_sha256": parts["sae"],
        "site": sae.config.site,
        "methods": ",".join(methods),
        "norms": ", ".join(f"{method} {norm}" for method, norm in norms.items()),
        "grid_height": str(height),
        "grid_width": str(width),
    }

    if remark:
        print(remark)
    if arguments.dry_run:
        how = [
            f"with CLIP {clip} and SAE {sae_address}, which reads {sae.config.site}",
            f"{k} latents per image, maps of {', '.join(targets.specs())} by {', '.join(methods)}",
        ]
        print(outline(make_plan(), "explain", arguments.out, how))
        return None
    made_by = pipeline.made_by("jobs.explain", argv, config, images, pool) | {
        "grid": [height, width],
        "n_latents": sae.config.n_latents,
        "sae": sae.describe(),
    }
    run = pipeline.begin_run(arguments, parts, made_by, shards, make_plan)
    decode = Decode(tower.preprocess, arguments.max_pixels)
    return pipeline.Job(run, decode, functools.partial(Explain, config), tags, pool)


def demo_images(out: str) -> tuple[str, ...]:
    """The demo's scenes beside the run, drawn if they are not there yet."""
    if "://" in out:
        raise ValueError(f"--demo draws its images beside the run, so --out {out} must be a local folder")
    folder = Path(out + "-images")
    if not folder.exists():
        # Under another name until all of it is there: an interrupted start must not leave half of the images.
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
