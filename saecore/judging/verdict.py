"""What a run that judged maps comes to: means with intervals, comparisons case by case, and a verdict in sentences.

    FAITHFULNESS, CURVES -> Verdict -> verdict.json, a table, a page

A case is a target of an image. Intervals hold 95 of 100 samples of as many images (`localisation.mean_over_images`: bootstrap,
2,000 resamples); a comparison takes the differences of the same cases. A sentence that one beats the other says that 0 lies
outside. Over many comparisons some are wrong by chance: the sentences compare with the first method only.

It loads no PyTorch: pages read it too.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saecore.evaluation.localisation import Mean, mean_over_images
from saecore.runs.files import open_dataset
from saecore.storage import is_file, join_uri, read_json, write_atomic

FILE = "verdict.json"

FOLDER = "evaluation"
"""Where a run's evaluation is, unless it is told otherwise; pages of the run look for it there."""

TRAINED, OTHER_ROWS, UNTRAINED = "trained", "other rows", "untrained tower"
MODELS = (TRAINED, OTHER_ROWS, UNTRAINED)
"""What is judged, and the two nulls: the SAE with random rows of its encoder, and a tower that nobody trained."""

SHAPLEY = "shapley values"
"""The name under which sampled Shapley values are judged as if they were a method."""

BASELINES = ("random", "centre", "edges")
"""Maps without a model, which any map has to beat."""

CONTROLS = ("attention", *BASELINES)
"""What knows no target."""

KINDS = ("latent", "text", "concept")
"""Of targets."""

PLAIN = 0.2
"""The largest of some numbers from which on two places are enough."""

LEAST_IMAGES = 30
"""With fewer, an interval by bootstrap says too little, and the verdict says so."""


class Key(NamedTuple):
    """What a score, or a curve, is of."""

    model: str
    method: str
    metric: str
    """Of a curve, the way in which patches are taken out."""


class Row(NamedTuple):
    """The mean of a score over the targets of a kind."""

    kind: str
    model: str
    method: str
    metric: str
    cases: int
    mean: Mean


class Apart(NamedTuple):
    """By how much a method's SRG exceeds another's, case by case."""

    kind: str
    method: str
    other: str
    mean: Mean


class Course(NamedTuple):
    """The mean curves of a method: z as patches are taken out, from all patches to none."""

    model: str
    method: str
    way: str
    mif: list[float]
    lif: list[float]


class Verdict(NamedTuple):
    """What the tables of a run come to."""

    images: int
    cases: int
    """Of the first kind."""
    kinds: list[str]
    """Of targets, those of `KINDS` that there are: their values have different units, so each has means of its own."""
    methods: list[str]
    """As they were asked for, then `SHAPLEY` if it was sampled, then `BASELINES`."""
    rows: list[Row]
    apart: list[Apart]
    courses: list[Course]
    """Of the first kind."""
    sentences: list[str]

    def mean(self, method: str, metric: str, model: str = TRAINED, kind: str = "") -> Mean | None:
        """The mean of a score over the targets of a kind, by default the first; None if it was not measured."""
        wanted = (kind or self.kinds[0], model, method, metric)
        return next((row.mean for row in self.rows if row[:4] == wanted), None)


def judged(uri: str, asked: list[str]) -> Verdict:
    """The verdict on a complete run of jobs.evaluate, whose methods were asked for in this order."""
    table = open_dataset(uri, "faithfulness").to_table()
    curves = open_dataset(uri, "curves").to_table()
    names = table["method"].unique().to_pylist()
    methods = [*asked, *(name for name in (SHAPLEY, *BASELINES) if name in names)]
    of_rows, of_curves = _kinds(table), _kinds(curves)
    kinds = [kind for kind in KINDS if (of_rows == kind).any()]
    held = {kind: _by_key(table.filter(pa.array(of_rows == kind))) for kind in kinds}
    rows = [
        Row(kind, *key, len(values), mean_over_images(values, images))
        for kind, by_key in held.items()
        for key, (values, images, _) in by_key.items()
    ]
    rows.sort(key=lambda row: (KINDS.index(row.kind), MODELS.index(row.model), methods.index(row.method), row.metric))
    apart = [one for kind in kinds for one in _all_apart(kind, held[kind], methods)]
    courses = _courses(curves.filter(pa.array(of_curves == (kinds or KINDS)[0])), methods)
    srg = held[kinds[0]].get((TRAINED, methods[0], "srg")) if kinds else None
    n_cases = 0 if srg is None else len(srg[0])
    verdict = Verdict(len(table["image_id"].unique()), n_cases, kinds, methods, rows, apart, courses, [])
    return verdict._replace(sentences=_sentences(verdict, held))


def _kinds(table: pa.Table) -> np.ndarray:
    """The kind of each row's target."""
    words = pc.replace_substring_regex(pc.fill_null(table["target"], KINDS[0]), ":.*", "")
    return np.array(words.to_pylist(), object)


def _cases(table: pa.Table) -> np.ndarray:
    """A number for each target of each image, int64 (rows,)."""
    columns = [table["image_id"], pc.fill_null(table["latent"], -1), pc.fill_null(table["target"], "")]
    numbers = [column.combine_chunks().dictionary_encode().indices.to_numpy() for column in columns]
    sizes = [int(one.max(initial=0)) + 1 for one in numbers]
    return (numbers[0].astype(np.int64) * sizes[1] + numbers[1]) * sizes[2] + numbers[2]


Held = dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray, np.ndarray]]


def _by_key(table: pa.Table) -> Held:
    """By model, method and metric: values, images and cases, in the order of the cases."""
    cases = _cases(table)
    keys = [table[name].combine_chunks().dictionary_encode() for name in ("model", "method", "metric")]
    names = [key.dictionary.to_pylist() for key in keys]
    numbers = np.ravel_multi_index([key.indices.to_numpy() for key in keys], [max(1, len(name)) for name in names])
    values, images = table["value"].to_numpy().astype(np.float64), table["image_id"].to_numpy()
    order = np.lexsort((cases, numbers))
    found, starts = np.unique(numbers[order], return_index=True)
    held: Held = {}
    for number, rows in zip(found, np.split(order, starts[1:]), strict=True):
        at = np.unravel_index(number, [len(name) for name in names])
        model, method, metric = (name[place] for name, place in zip(names, at, strict=True))
        held[model, method, metric] = (values[rows], images[rows], cases[rows])
    return held


def _all_apart(kind: str, held: Held, methods: list[str]) -> Iterator[Apart]:
    """The first method beside every other one; both have the same cases, in the same order."""
    srg = {method: held[TRAINED, method, "srg"] for method in methods if (TRAINED, method, "srg") in held}
    for other, (two, _, others) in list(srg.items())[1:] if methods[0] in srg else ():
        one, images, cases = srg[methods[0]]
        assert np.array_equal(cases, others), (methods[0], other)
        yield Apart(kind, methods[0], other, mean_over_images(one - two, images))


def _courses(curves: pa.Table, methods: list[str]) -> list[Course]:
    courses = []
    for model in MODELS:
        for method in methods:
            for way in curves["way"].unique().to_pylist():
                rows = curves.filter(
                    pc.and_(
                        pc.and_(pc.equal(curves["model"], model), pc.equal(curves["method"], method)),
                        pc.equal(curves["way"], way),
                    )
                )
                if rows.num_rows:
                    means = (
                        rows[name].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1).mean(0)
                        for name in ("mif", "lif")
                    )
                    courses.append(Course(model, method, way, *(mean.tolist() for mean in means)))
    return courses


# ---- In words.


def signed(mean: Mean) -> str:
    """`+1.95 [1.70, 2.20]`; smaller numbers, as those of cosines, with more places."""
    places = 2 if max(map(abs, mean)) >= PLAIN else 4
    return f"{mean.value:+.{places}f} [{mean.low:.{places}f}, {mean.high:.{places}f}]"


def _sentences(verdict: Verdict, of_kinds: dict[str, Held]) -> list[str]:
    """The verdict in plain words, the most important first."""
    said = list[str]()
    for kind, held in of_kinds.items():
        about = "" if kind == verdict.kinds[0] else f"Of {kind}s: "
        said += [about + one for one in _of_kind(verdict, kind, held)]
    if said and verdict.images < LEAST_IMAGES:
        said.append(f"These are {verdict.images} images: with fewer than {LEAST_IMAGES}, intervals say little.")
    return said


def _of_kind(verdict: Verdict, kind: str, held: Held) -> Iterator[str]:
    first = verdict.methods[0]
    apart = {one.other: one.mean for one in verdict.apart if one.kind == kind}
    if not apart:
        return
    n = f"n = {verdict.images:,} images, {len(held[TRAINED, first, 'srg'][0]):,} targets"
    yield _compared(first, "attention" if "attention" in apart else "random", apart, n)
    if "attention" in apart:
        yield _compared(first, "random", apart, "")
    if (TRAINED, first, "srg_of_another") in held:
        (own, images, _), (another, _, _) = held[TRAINED, first, "srg"], held[TRAINED, first, "srg_of_another"]
        gain = mean_over_images(own - another, images)
        if gain.low > 0:
            yield f"{first} knows its target: its SRG is {signed(gain)} above that by another target's map."
        else:
            yield f"{first} is not shown to know its target: by another target's map, SRG differs by {signed(gain)}."
    for other in apart:
        if other not in (*CONTROLS, SHAPLEY):
            yield _compared(first, other, apart, "")
    if SHAPLEY in apart:
        yield _beside_shapley(first, apart[SHAPLEY], held)
    yield from _nulls(verdict, first, kind)


def _compared(first: str, other: str, apart: dict[str, Mean], n: str) -> str:
    mean, ending = apart[other], f", {n}." if n else "."
    if mean.low > 0:
        return f"{first} beats {other}: SRG {signed(mean)}{ending}"
    if mean.high < 0:
        return f"{other} beats {first}: SRG {signed(Mean(-mean.value, -mean.high, -mean.low))}{ending}"
    return f"{first} and {other} cannot be told apart: SRG {signed(mean)}{ending}"


def _beside_shapley(first: str, apart: Mean, held: Held) -> str:
    own, most = (float(held[TRAINED, method, "srg"][0].mean()) for method in (first, SHAPLEY))
    if apart.low > 0:
        noisy = "Shapley values by sampling are too noisy to be a reference here: sample more subsets"
        return f"{noisy} ({first} beats them, SRG {signed(apart)})."
    share = f"{first} has {own / most:.0%} of the SRG of {most:.2f} that Shapley values by sampling have"
    return f"{share}." if apart.high < 0 else f"{share}: they cannot be told apart, {signed(apart)}."


def _nulls(verdict: Verdict, first: str, kind: str) -> Iterator[str]:
    means = [verdict.mean(first, "srg", model, kind) for model in MODELS]
    found = [f"{mean.value:.2f}" for mean in means if mean is not None]
    if len(found) == len(MODELS):
        rows = f"with random rows in the SAE it is {found[1]}, which the tower alone gives"
        yield f"Nulls: the SRG of {first} is {found[0]}; {rows}, and in a tower that nobody trained it is {found[2]}."


# ---- As a file.


def write(uri: str, verdict: Verdict) -> None:
    """Write verdict.json into the run of jobs.evaluate at `uri`."""
    document = verdict._asdict()
    for name in ("rows", "apart"):
        document[name] = [one._asdict() | {"mean": one.mean._asdict()} for one in document[name]]
    document["courses"] = [course._asdict() for course in verdict.courses]
    write_atomic(join_uri(uri, FILE), (json.dumps(document, indent=1) + "\n").encode())


def read(uri: str) -> Verdict | None:
    """What `write` wrote; None if there is none."""
    if not is_file(join_uri(uri, FILE)):
        return None
    document: dict[str, Any] = read_json(join_uri(uri, FILE))
    kinds = {"rows": Row, "apart": Apart}
    for name, kind in kinds.items():
        document[name] = [kind(**{**one, "mean": Mean(**one["mean"])}) for one in document[name]]
    document["courses"] = [Course(**one) for one in document["courses"]]
    return Verdict(**document)
