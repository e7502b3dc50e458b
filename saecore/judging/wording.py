"""A verdict as tables with a question each, and as a picture: what a terminal and a page show of it.

`curves_svg` draws small pictures beside each other, one for each method: the mean value of the targets as patches are taken
out, the most important first (which falls, if the map is faithful) and the least important first. The area between them is the
SRG.
"""

from collections.abc import Sequence
from typing import NamedTuple

from saecore.evaluation.localisation import Mean
from saecore.judging.verdict import BASELINES, OTHER_ROWS, PLAIN, TRAINED, UNTRAINED, Course, Verdict

QUESTIONS = {
    "Does removing what a map shows remove the target?": {
        "SRG": ("srg", TRAINED),
        "filled by mean": ("srg_mean", TRAINED),
        "filled by blur": ("srg_blur", TRAINED),
        "random rows": ("srg", OTHER_ROWS),
        "untrained tower": ("srg", UNTRAINED),
        "one by one": ("occlusion", TRAINED),
        "Shapley values": ("shapley", TRAINED),
        "localisable": ("localisable", TRAINED),
    },
    "Is a map its target's own? Does it depend on what was learned?": {
        "SRG": ("srg", TRAINED),
        "by another's": ("srg_of_another", TRAINED),
        "alike": ("alike", TRAINED),
        "other row": ("other_row", TRAINED),
        "last layer": ("cascade_1", TRAINED),
        "half of them": ("cascade_half", TRAINED),
        "all layers": ("cascade_all", TRAINED),
    },
    "Does it stay the same?": {
        "shift": ("shift", TRAINED),
        "JPEG": ("jpeg", TRAINED),
        "bfloat16": ("bfloat16", TRAINED),
        "on sinks": ("sink_share", TRAINED),
    },
    "Does it lie on the object?": {
        "pointing": ("pointing", TRAINED),
        "mass": ("mass", TRAINED),
        "precision": ("average_precision", TRAINED),
        "mIoU": ("miou", TRAINED),
    },
    "Does it lie on what the picture is of, whatever its target is?": {
        "pointing": ("pointing_foreground", TRAINED),
        "mass": ("mass_foreground", TRAINED),
        "precision": ("average_precision_foreground", TRAINED),
        "mIoU": ("miou_foreground", TRAINED),
    },
}
"""Questions -> columns of their table: a metric of `saecore.judging.judge`, and a model."""

MEANINGS = {
    "SRG": "area between the curves of taking out the least and the most important patches first, in units of z; 0 is chance",
    "filled by mean": "the same, where patches get the mean colour in place of being taken out",
    "filled by blur": "the same, where they get the blurred picture",
    "random rows": "SRG where the SAE's encoder has random rows: what the tower alone gives",
    "untrained tower": "SRG in a tower that nobody trained",
    "one by one": "rank correlation with what each patch's absence alone takes from the target",
    "Shapley values": "rank correlation with the Shapley values of patches, which are sampled",
    "localisable": "the part of the target that the map can speak for; the remainder has the rest",
    "by another's": "SRG by the map of another target of the picture: a map that is its target's own has far less here",
    "alike": "rank correlation with the maps of the picture's other targets, without its sign: 1 is one map for all",
    "other row": "rank correlation with the map of a random row, without its sign: 1 is a map that knows no target",
    "last layer": "the same with the map after the last layer was drawn anew",
    "half of them": "after the last half of the layers was drawn anew",
    "all layers": "after all layers were drawn anew: 1 is a map that does not see what was learned",
    "shift": "rank correlation with the map of the picture moved by 2 pixels",
    "JPEG": "with the map of the picture written as JPEG of quality 90",
    "bfloat16": "with the map by a tower in bfloat16",
    "on sinks": "the part of the map that lies on sinks, tokens that say nothing about their place",
    "pointing": "how often the largest value lies on the object",
    "mass": "the part of the positive values that lies on the object",
    "precision": "average precision of the patches' order against the object's patches",
    "mIoU": "mean of the overlap of object and background, where the map is cut at its mean",
}
"""What each column says, for a reader of a page."""


class Answer(NamedTuple):
    """The answers to one question."""

    question: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    """A method, and `mean ± half of its interval` for each column; empty where it was not measured."""


def tables_of(found: Verdict) -> list[Answer]:
    """The questions that were measured, with only the columns that were; first of the first kind of targets."""
    made = [_table(found, kind, question) for kind in found.kinds for question in QUESTIONS]
    # SRG alone is an answer to the first question only.
    first = next(iter(QUESTIONS))
    return [t for t in made if set(t.columns) - {"SRG"} or (t.columns and t.question.endswith(first[1:]))]


def _table(found: Verdict, kind: str, question: str) -> Answer:
    means = {
        name: [found.mean(method, *of, kind) for method in found.methods] for name, of in QUESTIONS[question].items()
    }
    means = {name: column for name, column in means.items() if any(column)}
    said = [_column(column) for column in means.values()]
    rows = [(method, list(cells)) for method, cells in zip(found.methods, zip(*said, strict=True), strict=False)]
    title = question if kind == found.kinds[0] else f"Of {kind}s: {question[0].lower()}{question[1:]}"
    return Answer(title, list(means), [(method, cells) for method, cells in rows if any(cells)])


def _column(means: Sequence[Mean | None]) -> list[str]:
    """`mean ± half of its interval`, all with the same number of places."""
    largest = max(abs(mean.value) for mean in means if mean is not None)
    places = 3 if 0 < largest < PLAIN else 2
    return ["" if m is None else f"{m.value:.{places}f} ± {(m.high - m.low) / 2:.{places}f}" for m in means]


# ---- The curves as a picture.

WIDTH, HEIGHT, LEFT, TOP, GAP = 190, 130, 34, 26, 18
"""Of one small picture, and what lies between them, in pixels."""

MOST = 6
"""Small pictures of one drawing."""


def curves_svg(found: Verdict) -> str:
    """An SVG of the mean curves of the trained model, by the first way in which patches were taken out; empty without any."""
    way = next((course.way for course in found.courses), "")
    of_methods = {c.method: c for c in found.courses if (c.model, c.way) == (TRAINED, way)}
    last = [name for name in BASELINES[:1] if name in of_methods]
    shown = [of_methods[name] for name in found.methods if name in of_methods and name not in BASELINES]
    shown = [*shown[: MOST - len(last)], *(of_methods[name] for name in last)]
    if not shown:
        return ""
    values = [value for course in shown for value in (*course.mif, *course.lif)]
    low, high = min(*values, 0.0), max(*values, 0.0)
    span = (high - low) or 1.0
    width = LEFT + len(shown) * (WIDTH + GAP)
    parts = [_panel(course, LEFT + place * (WIDTH + GAP), low, span) for place, course in enumerate(shown)]
    axis = "".join(
        f'<text x="{LEFT - 6}" y="{_y(value, low, span) + 4:.1f}" text-anchor="end">{value:.1f}</text>'
        for value in (low, high)
    )
    return (
        f'<svg class="curves" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + 34}" role="img" '
        'aria-label="Mean value of the targets as patches are taken out" font-family="system-ui, sans-serif" font-size="11" '
        f'fill="currentColor">{axis}{"".join(parts)}</svg>'
    )


def _y(value: float, low: float, span: float) -> float:
    return TOP + HEIGHT * (1 - (value - low) / span)


def _panel(course: Course, left: int, low: float, span: float) -> str:
    steps = len(course.mif) - 1

    def points(values: list[float]) -> list[str]:
        return [f"{left + WIDTH * at / steps:.1f},{_y(value, low, span):.1f}" for at, value in enumerate(values)]

    mif, lif = points(course.mif), points(course.lif)
    zero = _y(0.0, low, span)
    return (
        f'<text x="{left}" y="{TOP - 10}" font-weight="600">{course.method}</text>'
        f'<line x1="{left}" x2="{left + WIDTH}" y1="{zero:.1f}" y2="{zero:.1f}" stroke="currentColor" opacity="0.35"/>'
        f'<polygon points="{" ".join([*mif, *reversed(lif)])}" fill="#8a8a8a" opacity="0.18"/>'
        f'<polyline points="{" ".join(lif)}" fill="none" stroke="#2f6fb2" stroke-width="2"/>'
        f'<polyline points="{" ".join(mif)}" fill="none" stroke="#e2580c" stroke-width="2"/>'
        f'<text x="{left}" y="{TOP + HEIGHT + 16}">all patches</text>'
        f'<text x="{left + WIDTH}" y="{TOP + HEIGHT + 16}" text-anchor="end">none</text>'
    )
