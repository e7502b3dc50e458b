"""What the stages are told, and which part of it changes results.

A run's fingerprint (`saecore.runs.run.fingerprint`) is a hash of parts. Every field of a configuration says in its metadata
which parts it is, or why it is none; `parts_of` makes the parts from the fields. So a new field cannot be forgotten in the
fingerprint, and a run cannot be resumed with other settings that change its results:

    k: int = dataclasses.field(metadata=changes_results(Part("k")))
    threads: int = dataclasses.field(default=0, metadata=keeps_results("CPU threads change speed"))
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from saecore.methods import DEFAULT_OPTIONS, SHAPLEY, Options, dtype_of
from saecore.requests import KEPT, TargetRequest

_SAYS = "fingerprint"


class ModelDigests(NamedTuple):
    """What the fingerprint holds of loaded models, since an address may name other files tomorrow."""

    clip: str
    """The first 16 digits of the SHA-256 of CLIP, as `sae` is of the SAE."""
    sae: str = ""
    site: str = ""
    """Where the SAE reads, by its files or as it was told."""
    head: str = ""
    """The first 16 digits of the SHA-256 of a head, if a method needs one."""


NO_DIGESTS = ModelDigests("")


class Part(NamedTuple):
    """One part of a fingerprint."""

    name: str
    value: Callable[[Any, ModelDigests], Any] | None = None
    """Computes the part from the configuration and the loaded models. None: the field's own value."""


def changes_results(*parts: Part) -> dict[str, tuple[Part, ...]]:
    """Metadata of a field that is, or goes into, these parts of the fingerprint."""
    assert parts
    return {_SAYS: parts}


def keeps_results(reason: str) -> dict[str, tuple[Part, ...]]:
    """Metadata of a field that changes no result, or whose effect another part holds; the reason is for readers."""
    assert reason
    return {_SAYS: ()}


def parts_of(settings: Any, models: ModelDigests = NO_DIGESTS, of: type | None = None) -> dict[str, Any]:
    """The parts that the fields of a dataclass are; with `of`, a class that it extends, only the fields of that class.

    TypeError for a field that does not say whether it changes results.
    """
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(of or settings):
        for part in said_of(field.name, field.metadata):
            parts[part.name] = part.value(settings, models) if part.value else getattr(settings, field.name)
    return parts


def said_of(name: str, metadata: Mapping[Any, Any]) -> tuple[Part, ...]:
    """The parts that a field is; TypeError if it does not say."""
    if _SAYS not in metadata:
        raise TypeError(f"the field {name} does not say whether it changes results")
    parts: tuple[Part, ...] = metadata[_SAYS]
    return parts


def _dtype(config: "EmbedConfig", _: ModelDigests) -> str:
    return dtype_of(config.device, config.methods if isinstance(config, ExplainConfig) else (), config.precision)


def _concepts(config: "ExplainConfig", _: ModelDigests) -> list[Any]:
    return [config.concept_latents, config.concept_positive] if config.targets.concepts else []


def _site(config: "ExplainConfig", models: ModelDigests) -> str:
    return " pooled by ".join(filter(None, (models.site, config.pool)))


def _norms(config: "ExplainConfig", _: ModelDigests) -> dict[str, str]:
    return {method: config.options.norm_of(method) for method in config.methods}


def _options(config: "ExplainConfig", _: ModelDigests) -> dict[str, Any]:
    """All but `norm`: `norms` has what it comes to for each method. `subsets` is younger than the first runs, and is among them
    only where its method is."""
    given = dataclasses.asdict(config.options)
    del given["norm"]
    if SHAPLEY not in config.methods:
        del given["subsets"]
    return given


def _methods(config: "ExplainConfig", models: ModelDigests) -> str:
    return " by the head ".join(filter(None, (",".join(config.methods), models.head)))


def at_once(batch_size: int, device: str) -> int:
    """Images per forward: as told, or if that is 0, what suits the device.

    On a CPU, B/32 takes as long by 64 as by 32, and by 128 a third more. On a GPU nothing was measured; a batch for which its
    memory does not suffice is halved.
    """
    return batch_size or (32 if device == "cpu" else 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Everything `saecore.pipeline.stages.Embed` needs to build itself in another process."""

    clip: str = dataclasses.field(metadata=changes_results(Part("clip", lambda _, models: models.clip)))
    """CLIP or SigLIP: a Hub id, a local directory in transformers format, or `demo`."""
    batch_size: int = dataclasses.field(default=0, metadata=keeps_results("a batch changes speed and memory"))
    """Images per forward; 0 is what suits the device, see `at_once`."""
    device: str = dataclasses.field(default="cpu", metadata=changes_results(Part("dtype", _dtype)))
    """`cpu` or `cuda`: with it comes the precision of the forward, if that is `auto`."""
    precision: str = dataclasses.field(default="auto", metadata=changes_results(Part("dtype", _dtype)))
    """One of `saecore.methods.PRECISIONS`. The part is what it comes to: a run is resumed on any device that has the same."""
    threads: int = dataclasses.field(default=0, metadata=keeps_results("CPU threads change speed"))
    """CPU threads of the forward; 0 leaves PyTorch's own choice (Ray sets OMP_NUM_THREADS to an actor's num_cpus)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteConfig(EmbedConfig):
    """The same where vectors of a site inside the tower are written, in place of the embedding."""

    site: str = dataclasses.field(metadata=changes_results(Part("site")))
    """In the text form of `saecore.sae.sites`."""
    tokens_per_image: int = dataclasses.field(default=0, metadata=changes_results(Part("tokens-per-image")))
    """How many of an image's tokens are drawn; 0 is all that the site has."""
    seed: int = dataclasses.field(default=0, metadata=changes_results(Part("seed")))
    """Of the draws."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainConfig(EmbedConfig):
    """Everything `saecore.pipeline.stages.Explain` needs, which begins with the embedding."""

    sae: str = dataclasses.field(metadata=changes_results(Part("sae", lambda _, models: models.sae)))
    """SAE: a folder, a file, a Hub address, or `demo`."""
    site: str = dataclasses.field(default="", metadata=changes_results(Part("site", _site)))
    """Where the SAE reads, if its files do not say."""
    pool: str = dataclasses.field(default="", metadata=changes_results(Part("site", _site)))
    """How what it makes of tokens becomes one value for an image, one of `saecore.sae.sites.POOLS`. Empty where it reads one
    vector: the part `site` is then as it was before there was this field."""
    k: int = dataclasses.field(metadata=changes_results(Part("k")))
    """Latents kept per image."""
    methods: tuple[str, ...] = dataclasses.field(
        default=("contrib",),
        metadata=changes_results(Part("method", _methods), Part("norms", _norms), Part("dtype", _dtype)),
    )
    """How maps are computed."""
    head: str = dataclasses.field(default="", metadata=changes_results(Part("method", _methods)))
    """What removal predicts with: a folder, or `demo`. Empty without that method: the part `method` is then as it was before
    there was this field."""
    targets: TargetRequest = dataclasses.field(
        default=KEPT,
        metadata=changes_results(
            Part("targets", lambda config, _: config.targets.specs()), Part("concepts", _concepts)
        ),
    )
    """What they explain."""
    concept_latents: int = dataclasses.field(default=8, metadata=changes_results(Part("concepts", _concepts)))
    """Latents that make up a concept."""
    concept_positive: bool = dataclasses.field(default=False, metadata=changes_results(Part("concepts", _concepts)))
    """Whether a concept takes latents with a positive weight only."""
    options: Options = dataclasses.field(
        default=DEFAULT_OPTIONS, metadata=changes_results(Part("norms", _norms), Part("options", _options))
    )
    """What the methods leave open."""
    embeddings: bool = dataclasses.field(default=False, metadata=changes_results(Part("embeddings")))
    """Whether the CLIP embedding is written too."""


def restored(kind: str, held: Mapping[str, Any]) -> EmbedConfig:
    """The configuration that a run's record holds, for a run of that kind; TypeError if it lacks what the stage needs.

    Keys that are no fields, such as those of older versions, are passed over.
    """
    form = ExplainConfig if kind == "explain" else SiteConfig if "tokens_per_image" in held else EmbedConfig
    known = {field.name: held[field.name] for field in dataclasses.fields(form) if field.name in held}
    if "methods" in known:
        known["methods"] = tuple(known["methods"])
    if "targets" in known:
        kept, *words = known["targets"]
        known["targets"] = TargetRequest(kept, *map(tuple, words))
    if "options" in known:
        known["options"] = Options(**known["options"])
    return form(**known)
