"""Numbers, maps, histograms and a run's record in words. What stands under a picture also serves those who do not see it."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from saecore.methods import ACTIVATION, METHODS, PRE_ACTIVATION, UNKNOWN, Method
from saecore.query.histograms import Bins, alike
from saecore.query.results import Results
from saecore.report.views import Map, Tile
from saecore.runs import durations
from saecore.runs.record import Record

FIGURES = {
    "l0": ("L0", "latents that fire for an image"),
    "cosine": ("Cosine", "between an image's embedding x and its reconstruction x'"),
    "fvu": ("FVU", "|x - x'|² / |x - training mean|² of an image"),
}


def number(value: float | None) -> str:
    """A number with three significant digits, two if it is below a tenth, and a true minus sign."""
    if value is None or math.isnan(value):
        return "none"
    size = abs(value)
    decimals = 0 if size >= 100 or not size else 1 if size >= 10 else 2 if size >= 1 else 3
    digits = f"{value:,.{decimals}f}" if size >= 0.1 or not size else f"{value:#.2g}"
    return digits.replace("-", "\N{MINUS SIGN}")


def signed(value: float) -> str:
    """As `number`, with a plus sign if it is positive."""
    return ("+" if value > 0 else "") + number(value)


def percent(share: float) -> str:
    """A share of 1 as percent."""
    return f"{number(100 * share)} %"


def label(tile: Tile, one: Map) -> str:
    """What a map shows, in words, for those who cannot see it."""
    return f"map of {tile.target} on {tile.image['key']}: {_places(one, lambda value: '')}"


def caption(one: Map, method: str) -> str:
    """The map's numbers, in words."""
    places = _places(one, lambda value: f" {signed(value)}")
    if not METHODS.get(method, UNKNOWN).decomposes:
        return places
    return f"patches {signed(one.total)}, remainder {signed(one.remainder)}; {places}"


def _places(one: Map, write: Callable[[float], str]) -> str:
    """The strongest patch, if it adds to the target, and the strongest patch against the target, if the map has one."""
    said = [
        f"{word}{write(patch.value)} at row {patch.row}, column {patch.column}"
        for word, patch in (
            ("strongest", one.strongest if one.strongest.value > 0 else None),
            ("strongest against", one.against),
        )
        if patch is not None
    ]
    return "; ".join(said) or "nothing anywhere"


def gives(method: Method, reads_tokens: bool) -> str:
    """What a method's maps show. Where the SAE reads tokens, these stand in the place of CLS."""
    return method.gives.replace("the CLS token", "the tokens that make the value") if reads_tokens else method.gives


def meaning(method: str, kind: str) -> str:
    """What the colours of a method's maps mean, and in which units."""
    if method == "attention":
        return "orange: attention, whatever the target; no units"
    if method == ACTIVATION:
        return "orange: the latent is active there; activation"
    if not has_signs(method):
        return "orange: the target depends on it; no units"
    colours = (
        "orange adds, blue takes away" if METHODS.get(method, UNKNOWN).is_cause else "orange above zero, blue below"
    )
    return f"{colours}; {units(method, kind)}"


def units(method: str, kind: str) -> str:
    """The units of a method's values for this kind of target; empty if they have none."""
    return METHODS.get(method, UNKNOWN).units.replace(PRE_ACTIVATION, "cosine" if kind == "text" else PRE_ACTIVATION)


def name_unit(row: Mapping[str, Any], naming: Mapping[str, Any]) -> str:
    """The units of the score and the margin of a latent's name; empty if nothing says which."""
    if row["by_data"]:
        return "standard deviations"
    return "cosine" if naming.get("by") in ("data", "decoder", "decoder+mean") else ""


def doubt(row: Mapping[str, Any], naming: Mapping[str, Any]) -> str:
    """Why a latent's name is not valid, in words and numbers. naming: what `saecore.report.holdings.naming` returns."""
    least: Mapping[str, float] = naming.get("valid", {})
    unit = " standard deviations" if row["by_data"] else ""  # a cosine has no unit
    reasons = []
    if naming.get("by") == "data" and not row["by_data"]:
        reasons.append(
            "the latent fires for too few images to be named by them, and its direction alone does not make it sure"
        )
    elif least:
        ratio = row["score"] / row["runner_up_score"] if (row["runner_up_score"] or 0) > 0 else math.inf
        figures = {
            "score": ("its score", row["score"], unit),
            "margin": ("its margin to the runner-up", row["margin"], unit),
            "ratio": ("its score's ratio to the runner-up's", ratio, ""),
        }
        reasons += [
            f"{what} of {_apart(held, least[name])}{unit} is below {number(least[name])}"
            for name, (what, held, unit) in figures.items()
            if held < least[name]
        ]
    return "; ".join(reasons) or "it did not pass the thresholds of a valid name"


def _apart(value: float, least: float) -> str:
    """A value in as many digits as show that it is below another."""
    return number(value) if number(value) != number(least) else f"{value:.7g}"


def value(kind: str) -> str:
    """What the value of a target of this kind is called."""
    return {"latent": "activation", "text": "cosine", "concept": "weighted mean of pre-activations"}[kind]


def has_signs(method: str) -> bool:
    """Whether a method's maps have values below zero; those with units do, but for activations."""
    return method != ACTIVATION and bool(METHODS.get(method, UNKNOWN).units)


class Bar(NamedTuple):
    """One bar of a histogram, in the units of an SVG of 480 x 150."""

    x: float
    y: float
    width: float
    height: float
    between: str
    tally: str
    text: str


class Chart(NamedTuple):
    """A histogram to be drawn."""

    title: str
    of: str
    unit: str
    summary: str
    bars: list[Bar]
    ticks: list[tuple[float, str, str]]
    """x, text, SVG's text-anchor."""
    most: str


def chart(
    title: str, of: str, unit: str, bins: Bins, write: Callable[[float], str] = number, ticks: int = 2
) -> Chart | None:
    """A histogram of `of`, counted in `unit`; `write` puts an edge into words. The axis has marks at `ticks` + 1 edges.

    None if there is nothing to count.
    """
    if not bins.counts:
        return None
    total, most = counted(sum(bins.counts), unit), max([*bins.counts, 1])
    lengths = [round(112 * count / most, 1) for count in bins.counts]
    if alike(bins.edges[0], bins.edges[-1]):
        value, among = write(bins.edges[0]), "all " if sum(bins.counts) > 1 else ""
        bar = Bar(230, round(130 - lengths[0], 1), 20, lengths[0], value, f"{bins.counts[0]:,}", f"{value}: {total}")
        summary = f"Histogram of {of}: {total}, {among}at {value}"
        return Chart(title, of, unit, summary, [bar], [(240, value, "middle")], counted(most, unit))
    step = 480 / len(bins.counts)
    bars = []
    for place, (count, length) in enumerate(zip(bins.counts, lengths, strict=True)):
        between = f"{write(bins.edges[place])} to {write(bins.edges[place + 1])}"
        box = (round(place * step + 1, 1), round(130 - length, 1), round(step - 2, 1), length)
        bars.append(Bar(*box, between, f"{count:,}", f"{between}: {counted(count, unit)}"))
    low, high = bins.edges[0], bins.edges[-1]
    peak = int(np.argmax(bins.counts))
    summary = f"Histogram of {of}: {total} from {write(low)} to {write(high)}, most of them from {bars[peak].between}"
    marks = [
        (
            round(480 * mark / ticks, 1),
            write(low + (high - low) * mark / ticks),
            "start" if not mark else "middle" if mark < ticks else "end",
        )
        for mark in range(ticks + 1)
    ]
    return Chart(title, of, unit, summary, bars, marks, counted(most, unit))


def counted(n: int, unit: str) -> str:
    """`1 image`, `2,000 images`; `unit` is a plural."""
    return f"{n:,} {unit.removesuffix('s') if n == 1 else unit}"


def cards(run: Results, figures: Mapping[str, Mapping[str, float]], firing: int) -> list[dict[str, str]]:
    """The first figures that one reads: a value, its unit, and a note. `firing`: latents that fire."""
    held = [
        {
            "value": f"{run.n_images:,}",
            "unit": "image" if run.n_images == 1 else "images",
            "note": f"explained; {run.record.n_refused:,} refused",
        },
        {
            "value": f"{firing:,}",
            "unit": f"of {run.n_latents:,} latents fire",
            "note": f"{run.n_latents - firing:,} for none",
        },
    ]
    for name, unit, note in (
        ("l0", "latents", "fire for an image, mean (L0)"),
        ("cosine", "cosine", "of the reconstruction, mean"),
        ("fvu", "FVU", "of the reconstruction, mean"),
    ):
        if name in figures:
            held.append({"value": number(figures[name]["mean"]), "unit": unit, "note": note})
    if (worst := run.record.worst_completeness_error) is not None:
        held.append({"value": number(worst), "unit": "worst error", "note": "of map + remainder = pre-activation"})
    return held


def made(record: Record) -> dict[str, str]:
    """How the run was made, as far as its record says."""
    clip, sae = record.clip, record.sae_address
    known = {
        "command": record.command,
        "CLIP": f"{clip} ({record.sha256_of('clip')})" if clip else None,
        "SAE": f"{sae} ({record.sha256_of('sae')})" if sae else None,
        "site": " pooled by ".join(filter(None, (record.sae.get("site"), record.pool))),
        "started": record.started,
        "time": durations.waited(record) if record.session_seconds else None,
        "work": durations.worked(record) if record.step_seconds else None,
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        "commit": record.git_commit,
        "fingerprint": record.fingerprint,
    }
    return {name: value for name, value in known.items() if value}
