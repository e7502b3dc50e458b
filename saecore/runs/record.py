"""run.json: what made a run and, once it is complete, what came of it.

    read_record(uri)      of any run, complete or not
    read_complete(uri)    of a complete run of jobs.explain: the way in for whoever reads a run's tables
    write_record          by `saecore.runs.run` only

A field of `Record` is a key of the file. Older runs lack some of the keys: their fields then have the defaults, which say
nothing. What the file holds besides is kept, so that a record which is written again loses nothing.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from saecore.methods import SHAPLEY
from saecore.runs.fit import Fit
from saecore.schema import VERSION
from saecore.storage import is_file, join_uri, read_bytes, write_atomic

FILE = "run.json"


class Unread(NamedTuple):
    """Shards of the input that could not be read to their end."""

    shards: int
    first: list[str]
    """The addresses of the first three."""
    images: int | None = None
    """How many images are missing, where that is known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The content of run.json."""

    # Written when the run begins.
    status: str
    """`running` or `complete`."""
    fingerprint: str = ""
    """Hash of `parts`."""
    parts: dict[str, Any]
    """Everything that changes results, see `saecore.runs.run.fingerprint`."""
    command: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The configuration of the replicas' stage, and `images`, the inputs as they were given."""
    replicas: int = 0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of Python and of packages."""
    git_commit: str | None = None
    started: str = ""
    """ISO 8601."""
    n_outputs: int = 0
    """Numbers in an embedding; in runs of jobs.embed only."""
    n_vectors: int = 0
    """Vectors of each image; in runs of jobs.embed with a site inside the tower only."""
    grid: tuple[int, int] = (0, 0)
    """Height and width of the maps in patches. This and the next two: in runs of jobs.explain only."""
    n_latents: int = 0
    sae: dict[str, Any] = dataclasses.field(default_factory=dict)
    """`SAE.describe()`."""

    # Written when it is complete.
    session_images: int = 0
    """Images of the session that completed the run."""
    session_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """What that session waited for, see `saecore.runs.durations`."""
    images: int = 0
    """All images, refused images too."""
    refused: dict[str, int] = dataclasses.field(default_factory=dict)
    """Refused images by reason."""
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    """By table, as are `bytes`."""
    bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    step_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds of all sessions and processes by step."""
    worst_completeness_error: float | None = None
    """None where no method decomposes."""
    fit: Fit = dataclasses.field(default_factory=Fit)
    lost: Unread | None = None
    """What could not be read after the plan was made."""
    damaged: Unread | None = None
    """What was damaged when the plan was made."""
    growths: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """How the plan grew, as `saecore.pipeline.growth.grown` tells it; those that the tables hold."""

    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of the file that are none of these."""

    @property
    def kind(self) -> str:
        """`explain`, `embed` or `evaluate`. Runs of jobs.explain carry none: their fingerprints are older than kinds."""
        return str(self.parts.get("kind", "explain"))

    @property
    def is_complete(self) -> bool:
        """Whether every image that was planned has been written."""
        return self.status == "complete"

    @property
    def n_refused(self) -> int:
        """Refused images, for whatever reason."""
        return sum(self.refused.values())

    @property
    def clip(self) -> str:
        """Address of the CLIP, empty if the record does not say."""
        return str(self.config.get("clip", ""))

    @property
    def sae_address(self) -> str:
        """Address of the SAE, empty if there is none."""
        return str(self.config.get("sae", ""))

    def sha256_of(self, model: str) -> str:
        """The first digits of the SHA-256 of a model, `clip` or `sae`; empty if the record does not say."""
        return str(self.parts.get(model, ""))

    @property
    def given_site(self) -> str:
        """Where the SAE reads as the command said it, empty if it left that to the SAE's files."""
        return str(self.config.get("site", ""))

    @property
    def site(self) -> str:
        """Where the SAE reads, by its files or as the command said it. Runs from before sites had a name read the embedding."""
        return str(self.sae.get("site") or "embedding")

    @property
    def reads_tokens(self) -> bool:
        """Whether the SAE reads several tokens of an image; its activations are then pooled."""
        return self.site.partition(":")[2].partition(":")[0] in ("patches", "all")

    @property
    def embedded_site(self) -> str:
        """Where a run of jobs.embed took its vectors inside the tower; empty if they are embeddings, or of another job."""
        return str(self.parts.get("site", "")) if self.kind == "embed" else ""

    @property
    def embeds_tokens(self) -> bool:
        """Whether a run of jobs.embed wrote several vectors of each image."""
        return self.embedded_site.endswith((":patches", ":all"))

    @property
    def pool(self) -> str:
        """How activations at tokens became one for the image; empty where the SAE reads one vector."""
        return str(self.config.get("pool", ""))

    @property
    def has_words(self) -> bool:
        """Whether texts have a place where the SAE reads: in the image embedding they do, inside the tower they do not."""
        return self.site.startswith("embedding")

    @property
    def can_be_named(self) -> bool:
        """Whether words for the latents can be found: by data, which needs embeddings, or in the space of the embedding."""
        return self.has_words or self.keeps_embeddings

    @property
    def inputs(self) -> list[str]:
        """The images as the command named them."""
        return list(self.config.get("images", []))

    @property
    def dtype(self) -> str:
        """The precision of the tower."""
        return str(self.parts.get("dtype", ""))

    @property
    def methods(self) -> list[str]:
        """How maps were computed, empty if there are none."""
        return list(self.config.get("methods", []))

    @property
    def samples(self) -> bool:
        """Whether a method of its maps samples, so that the table `maps` has a standard error."""
        return SHAPLEY in self.methods

    @property
    def keeps_embeddings(self) -> bool:
        """Whether a run of jobs.explain wrote the embeddings too."""
        return bool(self.parts.get("embeddings", False))


_ENDS_WITH = ("session_images", "session_seconds", "images", "refused", "rows", "bytes", "step_seconds")
"""Fields that are written once a run is complete, also where they are zero or empty."""


def from_document(document: Mapping[str, Any]) -> Record:
    """What run.json holds, of this or an older version."""
    names = {field.name for field in dataclasses.fields(Record)} - {"more"}
    known = {name: value for name, value in document.items() if name in names}
    if "grid" in known:
        known["grid"] = tuple(known["grid"])
    seconds = known.get("session_seconds", {})
    # Runs from before the start and the close were counted have one number.
    known["session_seconds"] = seconds if isinstance(seconds, Mapping) else {"images": seconds}
    known["fit"] = Fit(**known.get("fit", {}))
    for name in ("lost", "damaged"):
        known[name] = Unread(**known[name]) if known.get(name) else None
    return Record(**known, more={name: value for name, value in document.items() if name not in names})


def to_document(record: Record) -> dict[str, Any]:
    """What run.json is to hold: the fields that say something, under their own names."""
    defaults = Record(status="", parts={})
    always = {"git_commit", *(_ENDS_WITH if record.is_complete else ())}
    document = {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
        if field.name != "more"
        and (field.name in always or getattr(record, field.name) != getattr(defaults, field.name))
    }
    for name, value in document.items():
        if isinstance(value, Fit | Unread):
            document[name] = {key: number for key, number in value._asdict().items() if number is not None}
    return document | record.more


def read_record(uri: str) -> Record:
    """The record of the run at `uri`; ValueError, which names the file, if no run wrote it; OSError if there is none."""
    where = join_uri(uri, FILE)
    content = read_bytes(where)
    try:
        document = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    try:
        record = from_document(document)
    except (AttributeError, TypeError):  # another program's run.json
        record = None
    if record is None or not isinstance(record.parts, dict):
        raise ValueError(f"{where} is not what a run writes: {uri} holds no run")
    return record


def read_complete(uri: str) -> Record:
    """The record of a complete run of jobs.explain; ValueError if there is none at `uri`."""
    if not uri:
        raise ValueError("the run's folder has no name: give that of a run of jobs.explain")
    try:
        if not is_file(join_uri(uri, FILE)):
            raise ValueError(f"{uri} holds no run: there is no run.json")
        record = read_record(uri)
    except OSError as error:
        raise ValueError(f"{uri} cannot be read: {error}") from error
    if record.kind != "explain":
        raise ValueError(f"{uri} is a run of another job and holds no latents: jobs.explain makes those")
    if (version := record.parts.get("schema")) != VERSION:
        raise ValueError(
            f"{uri} has tables of version {version}, and this program reads version {VERSION}: make the run again"
        )
    if not record.is_complete:
        raise ValueError(f"{uri} is not complete; the command that began it, given again, ends it: {record.command}")
    return record


def write_record(uri: str, record: Record) -> None:
    """Write run.json of the run at `uri`."""
    write_atomic(join_uri(uri, FILE), (json.dumps(to_document(record), indent=2) + "\n").encode())
