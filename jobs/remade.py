"""What made a run, once more: its configuration from run.json, and its models, which must be those of before."""

from typing import TYPE_CHECKING, Any, NamedTuple

from saecore.pipeline.config import EmbedConfig, ExplainConfig, ModelDigests, restored
from saecore.runs.record import Record

if TYPE_CHECKING:
    from saecore.sae.model import SAE
    from saecore.towers.tower import ImageTower


def configuration(out: str, record: Record) -> EmbedConfig:
    """The configuration that the record of the run at `out` holds; ValueError if it lacks something."""
    try:
        return restored(record.kind, record.config)
    except TypeError as error:
        raise ValueError(f"run.json of {out} does not say how it was made: {error}") from error


class Models(NamedTuple):
    """The models of a run, on the CPU; of a run of jobs.embed without an SAE."""

    tower: "ImageTower"
    sae: "SAE | None"
    digests: ModelDigests


def models(out: str, config: EmbedConfig) -> Models:
    """The models of the run at `out`; ValueError if one cannot be loaded any more."""
    from saecore.removal.saved import digest_of, load_head
    from saecore.sae.checkpoints import load_running_sae
    from saecore.towers.loading import load_tower

    try:
        tower = load_tower(config.clip)
        sae, head = None, ""
        if isinstance(config, ExplainConfig):
            sae = load_running_sae(config.sae, config.site)
            head = digest_of(load_head(config.head)) if config.head else ""
    except ValueError as error:
        raise ValueError(f"the models that made {out} are needed again: {error}") from error
    clip = tower.sha256()[:16]
    if sae is None:
        return Models(tower, None, ModelDigests(clip))
    return Models(tower, sae, ModelDigests(clip, sae.sha256()[:16], sae.config.site, head))


def check_same(out: str, record: Record, parts: dict[str, Any]) -> None:
    """ValueError, which names what differs, if the run was made with something else than `parts`."""
    if changed := [
        f"{key} was {record.parts.get(key)!r}, is now {value!r}"
        for key, value in parts.items()
        if record.parts.get(key) != value
    ]:
        raise ValueError(f"{out} was made with other models, or in another way ({'; '.join(changed)})")
