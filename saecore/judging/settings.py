"""What a run of jobs.evaluate is told, and which part of it changes results. It loads no PyTorch."""

import dataclasses

from saecore.pipeline.config import ExplainConfig, Part, changes_results

WAYS = ("drop", "mean", "blur")
"""How patches are taken out, as `saecore.removal.ways` has them."""

CHECKS = ("agreement", "randomisation", "stability", "nulls")
"""What is measured besides SRG: with what maps agree; what they become with other models, and with other pictures; what a map
is worth of models that nobody trained."""

PICTURES_AT_ONCE = 8
"""Pictures of a chunk: each is hundreds of forwards, so a chunk of them is a minute's work or less."""


def _listed(name: str) -> dict[str, tuple[Part, ...]]:
    """Metadata of a tuple, which is a list in run.json and so in a fingerprint."""
    return changes_results(Part(name, lambda settings, _: list(getattr(settings, name))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(ExplainConfig):
    """Everything `saecore.judging.stage.Evaluate` needs. `k` is how many latents of each image are judged, 0 for those that
    the targets name by number; the other fields of `ExplainConfig` are those of the run whose maps are judged."""

    of: str = dataclasses.field(metadata=changes_results(Part("of")))
    """The fingerprint of that run."""
    sample: int = dataclasses.field(metadata=changes_results(Part("sample")))
    """How many of its images are judged."""
    ways: tuple[str, ...] = dataclasses.field(default=WAYS[:1], metadata=_listed("ways"))
    """How patches are taken out, some of `WAYS`; nulls are measured by the first."""
    steps: int = dataclasses.field(default=10, metadata=changes_results(Part("steps")))
    """In how many parts they are taken out."""
    shapley_subsets: int = dataclasses.field(default=960, metadata=changes_results(Part("shapley-subsets")))
    """Subsets of patches by which the Shapley values are sampled that maps are compared with; 0 for none."""
    checks: tuple[str, ...] = dataclasses.field(default=CHECKS, metadata=_listed("checks"))
    """Some of `CHECKS`."""
    null_latents: int = dataclasses.field(default=4, metadata=changes_results(Part("null-latents")))
    """Latents of each image by which the nulls are measured, at most as many as targets; 0 for none."""
    masks: str = dataclasses.field(default="", metadata=changes_results(Part("masks")))
    """The address of masks, and the hash of what they say of the sample (`saecore.judging.places`); empty for none."""
    seed: int = dataclasses.field(default=0, metadata=changes_results(Part("seed")))
    """Of the sample, of random orders, rows and weights."""


def forwards(settings: Settings, n_patches: int, targets: int) -> float:
    """About how many forwards one image takes: token drop at half of the patches on average, each order of each target its own.

    A method with forwards of its own, and what is measured besides, are not counted but for the references.
    """
    lengths = settings.steps - 1
    kinds = len(settings.methods) + 3 + bool(settings.shapley_subsets)
    by_way = {"drop": 0.5, "mean": 1.0, "blur": 1.0}
    srg = 2 * lengths * targets * kinds * sum(by_way[way] for way in settings.ways)
    null = (
        2 * 2 * lengths * settings.null_latents * (len(settings.methods) + 3) * 0.5 if "nulls" in settings.checks else 0
    )
    reference = n_patches if "agreement" in settings.checks else 0
    sampled = settings.shapley_subsets * 0.5
    return srg + null + reference * (3 if "nulls" in settings.checks else 1) + sampled
