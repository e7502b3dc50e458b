"""What a run holds and what it lacks, in words: for its first page, and for the places where a map is missing."""

import json
from typing import Any, NamedTuple

from saecore.judging import verdict
from saecore.methods import OF_EMBEDDING, OF_TOKENS
from saecore.query.results import Results
from saecore.requests import KEPT, TargetRequest
from saecore.storage import join_uri

LISTED = 6
"""Up to this number, targets or latents are named one by one; more are counted."""


class Holding(NamedTuple):
    """One kind of thing that a run may hold."""

    what: str
    held: str
    missing: str
    """Empty if nothing is missing."""
    complete: tuple[str, ...] = ()
    """What a run would have to be made with to hold what is missing: targets, or methods."""


def wanted(run: Results) -> TargetRequest:
    """What the maps of a run explain: latents from run.json, texts and concepts from the maps themselves."""
    config = run.record.config
    given = TargetRequest(*config["targets"]) if "targets" in config else KEPT
    by_kind = {
        kind: tuple(target.removeprefix(f"{kind}: ") for target in run.targets if target.startswith(f"{kind}: "))
        for kind in ("text", "concept")
    }
    return given._replace(latents=tuple(given.latents), texts=by_kind["text"], concepts=by_kind["concept"])


def maps_in_words(run: Results, named: bool = False) -> str:
    """What a run has maps of: `the kept latents and 2 texts`. With `named`, a few texts and concepts are named, not counted."""
    if not run.methods:
        return "nothing"
    targets = wanted(run)
    parts = ["the kept latents"] if targets.kept else []
    if 0 < len(targets.latents) <= LISTED:
        plural = "s" if len(targets.latents) > 1 else ""
        parts.append(f"latent{plural} {_listed([str(latent) for latent in targets.latents])}")
    elif targets.latents:
        parts.append(f"{len(targets.latents):,} latents chosen by number")
    if named and len(targets.words) <= LISTED:
        parts += [f"the {label}" for label in targets.labels()]
    else:
        parts += [
            _count(len(words), kind)
            for kind, words in (("text", targets.texts), ("concept", targets.concepts))
            if words
        ]
    return _listed(parts)


def naming(run: Results) -> dict[str, Any]:
    """How jobs.name found the names, with the thresholds of valid ones; empty if nothing says how."""
    made_by: dict[str, Any] = json.loads((run.latents.schema.metadata or {}).get(b"naming", b"{}"))
    return made_by


def holdings(run: Results) -> list[Holding]:
    """What there is to know of a run besides its images and latents."""
    return [_targets(run), _methods(run), _embeddings(run), _names(run), _index(run), _judgement(run)]


def _targets(run: Results) -> Holding:
    targets = wanted(run)
    missing, complete = [], targets.specs()
    if not targets.kept or not run.methods:
        missing.append("maps of the kept latents")
        complete = ["kept", *(spec for spec in complete if spec != "no-kept")]
    if not targets.words and run.record.has_words:
        missing.append("texts and concepts of your own")
        complete = [*complete, "text:A PHRASE", "concept:A WORD"]
    held = maps_in_words(run, named=True)
    return Holding("Maps of", held, _listed(missing), tuple(complete) if missing else ())


def _methods(run: Results) -> Holding:
    others = [name for name in (OF_TOKENS if run.record.reads_tokens else OF_EMBEDDING) if name not in run.methods]
    complete = (*run.methods, *others[:1]) if others else ()
    return Holding("Methods", _listed(run.methods) or "none", ", ".join(others), complete)


def _embeddings(run: Results) -> Holding:
    if run.record.keeps_embeddings:
        return Holding("Embeddings", "of every image", "")
    return Holding("Embeddings", "none", "CLIP's embeddings of the images, which make names of latents better")


def _names(run: Results) -> Holding:
    if not run.record.can_be_named:
        return Holding("Names", "none: the SAE reads inside the tower, where names need embeddings", "")
    if "name" not in run.latents.column_names:
        return Holding("Names", "none", "words for what each latent is")
    sure = run.latents["valid"].to_pylist().count(True) if "valid" in run.latents.column_names else 0
    named = run.n_latents - run.latents["name"].null_count
    made_by = naming(run)
    by = f", by {made_by['by']}, from the vocabulary {made_by['vocabulary']}" if made_by else ""
    return Holding("Names", f"for {named:,} of {run.n_latents:,} latents, {sure:,} names valid{by}", "")


def _index(run: Results) -> Holding:
    if run.tables.index is None:
        return Holding("Index", "none", "fast pages and questions; how local each latent's maps are")
    left = len(run.tables.not_indexed)
    return Holding("Index", "by latent", f"{_count(left, 'chunk')} that came after it" if left else "")


def _judgement(run: Results) -> Holding:
    found = verdict.read(join_uri(run.uri, verdict.FOLDER))
    if found is None:
        missing = "whether its maps are faithful, measured on a sample" if run.methods else ""
        return Holding("Judgement", "none", missing)
    return Holding("Judgement", f"of maps, on {_count(found.images, 'image')}", "")


def _count(n: int, unit: str) -> str:
    return f"{n:,} {unit}{'s' if n > 1 else ''}"


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
