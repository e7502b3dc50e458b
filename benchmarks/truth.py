"""Do maps lie on the right object? Every method is scored against the true masks of the demo's scenes.

    python -m benchmarks truth

A case is a scene and a target whose object the scene shows. The target is a latent that follows one word and fires there, or
the word itself as a text. The map ought to lie on that object. Only activations decide which latents follow a word (area under
the ROC curve above `FOLLOWS`), on other scenes than those that are measured. No training and no
choice used any of these scenes before.

High scores here promise little for other models. This CLIP also learnt to tell colours and shapes from its patch tokens
(`saecore.demo.build`), so its tokens describe their own positions more than after training on captions only.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from saecore.demo.drawing import visible
from saecore.demo.figures import followed
from saecore.demo.lessons import FACETS, WORDS, photo
from saecore.demo.scenes import SEED_EVALUATION, Scene, scenes_of
from saecore.evaluation import localisation
from saecore.evaluation.localisation import Mean, mean_over_images
from saecore.methods import DEFAULT_OPTIONS, OF_EVERY_TOWER, Options
from saecore.relevance.explain import explain_latents
from saecore.relevance.targets import word_targets
from saecore.removal.head import Head
from saecore.sae.model import SAE
from saecore.towers.loading import load_text_tower
from saecore.towers.text import embed_texts
from saecore.towers.tower import ImageTower

FOLLOWS = 0.95
"""A latent follows a word if its area under the ROC curve is above this."""

FIRST_CHOSEN, FIRST_MEASURED = 300_000, 400_000
"""Numbers of the first scenes, of the evaluation's seed, on which latents are chosen and on which maps are measured."""

REFERENCE = "occlusion"
"""The method with which the agreement of the others is measured: it runs the model itself, patch by patch."""

BATCH = 32

OTHER_NORM = {"frozen": "exact", "exact": "frozen"}


class Sample(NamedTuple):
    """Scenes, and their pictures for CLIP."""

    scenes: list[Scene]
    pixels: np.ndarray
    """uint8 (n, height, width, 3)."""


def sample(count: int, start: int) -> Sample:
    """Scenes of the evaluation's seed, from number `start` on."""
    drawn = list(scenes_of(SEED_EVALUATION, count, start))
    with ThreadPoolExecutor() as pool:
        return Sample(drawn, np.stack(list(pool.map(photo, drawn))))


@torch.inference_mode()
def followers(tower: ImageTower, sae: SAE, seen: Sample) -> dict[int, str]:
    """Latents that follow a word, and the word that each follows best."""
    x = torch.cat([tower.embed(torch.from_numpy(seen.pixels[at : at + 256])) for at in range(0, len(seen.pixels), 256)])
    code = sae.encode_sparse(x)
    activations = torch.zeros(len(x), sae.config.n_latents).scatter(1, code.latents, code.activations)
    best = followed(activations, seen.scenes).max(dim=1)
    chosen = torch.nonzero(best.values > FOLLOWS).flatten().tolist()
    return {latent: WORDS[int(best.indices[latent])] for latent in chosen}


def covered(scenes: Sequence[Scene], words: Sequence[str], grid: tuple[int, int]) -> np.ndarray:
    """The share of each patch that the objects named by a word fill, float64 (scenes, words, P)."""
    covers = np.zeros((len(scenes), len(words), grid[0] * grid[1]))
    for row, scene in enumerate(scenes):
        shares = localisation.per_patch(visible(scene, 16 * max(grid)), grid)
        for column, word in enumerate(words):
            named = [word in (thing.colour, thing.shape, thing.texture) for thing in scene.things]
            covers[row, column] = shares[named].sum(axis=0)
    return covers


class Cases(NamedTuple):
    """m pairs of a scene and a target whose object is known, one pair per row."""

    image: np.ndarray
    """int (m,): the number of the scene."""
    covered: np.ndarray
    """float64 (m, P): the share of each patch that the target's object fills; it is at least a half in some patch."""
    maps: dict[str, np.ndarray]
    """Method or baseline -> float (m, P)."""

    def where(self, chosen: np.ndarray) -> "Cases":
        """The cases that `chosen`, bool (m,), marks."""
        return Cases(self.image[chosen], self.covered[chosen], {name: m[chosen] for name, m in self.maps.items()})


class Measured(NamedTuple):
    """What `measure` returns."""

    followers: dict[int, str]
    """The latents that follow a word -> the word."""
    latents: Cases
    words: Cases
    mixed: np.ndarray
    """bool (scenes,): whether the scene shows more than one object."""

    def tables(self) -> dict[str, Cases]:
        """The cases by kind of target and scene, under their titles."""
        return {
            f"{title}, {kind} scenes": cases.where(self.mixed[cases.image]) if kind == "mixed" else cases
            for title, cases in (("latents", self.latents), ("words", self.words))
            for kind in ("all", "mixed")
        }


class Row(NamedTuple):
    """A line of the tables: a method with its options."""

    title: str
    method: str
    options: Options


def rows(methods: Sequence[str], options: Options = DEFAULT_OPTIONS) -> list[Row]:
    """A row for each method with the given options, then rows for the variants whose scores differ.

    Variants by norm are listed unless the options name a norm (`frozen` or `exact`).
    """
    listed = [Row(method, method, options) for method in methods]
    if "legrad" in methods and options.legrad_target == "mean":
        listed.append(Row("legrad of the embedding", "legrad", dataclasses.replace(options, legrad_target="cls")))
    if options.norm == "auto":
        for row in list(listed):
            if (norm := OTHER_NORM.get(options.norm_of(row.method))) is not None:
                title = f"{row.title}, {norm} norm"
                listed.append(Row(title, row.method, dataclasses.replace(row.options, norm=norm)))
    if "gradeclip" in methods and options.gradeclip_cosine == "inside":
        listed.append(
            Row("gradeclip, projected", "gradeclip", dataclasses.replace(options, gradeclip_cosine="projected"))
        )
    order = {method: number for number, method in enumerate(methods)}
    return sorted(listed, key=lambda row: order[row.method])


def nothing(count: int) -> None:
    """The default of `measure`, which reports no progress."""


@torch.inference_mode()
def measure(
    tower: ImageTower,
    sae: SAE,
    n_scenes: int,
    listed: Sequence[Row] = tuple(rows(OF_EVERY_TOWER)),
    tell: Callable[[int], object] = nothing,
    head: Head | None = None,
) -> Measured:
    """Maps of every latent that follows a word, and of every colour and shape as a text, in `n_scenes` scenes.

    As many other scenes serve to choose the latents. tower, sae: the demo's. listed: rows that
    `saecore.relevance.explain.check_fits` lets pass. tell: is called after each batch with its number of scenes.
    """
    following = followers(tower, sae, sample(n_scenes, FIRST_CHOSEN))
    latents, texts = torch.tensor(list(following)), [*FACETS["colour"], *FACETS["shape"]]
    words = word_targets(sae, embed_texts(load_text_tower("demo"), texts, BATCH), len(texts), 0, False)
    seen = sample(n_scenes, FIRST_MEASURED)
    fires: list[np.ndarray] = []
    parts: dict[str, list[np.ndarray]] = {row.title: [] for row in listed}
    for at in range(0, n_scenes, BATCH):
        pixels = torch.from_numpy(seen.pixels[at : at + BATCH])
        code = sae.encode_sparse(tower.embed(pixels))
        fires.append(((code.latents == latents[:, None, None]) & (code.activations > 0)).any(-1).T.numpy())
        for options in {row.options: None for row in listed}:  # One forward for all methods with the same options.
            titles = {row.method: row.title for row in listed if row.options == options}
            maps = explain_latents(
                tower, sae, pixels, latents.expand(len(pixels), -1), tuple(titles), options, words, head=head
            )
            for method, title in titles.items():
                parts[title].append(maps[method].relevance.numpy())
        tell(len(pixels))
    shown = covered(seen.scenes, [*following.values(), *texts], tower.grid)
    known = np.any(shown >= localisation.ON, axis=-1)
    known[:, : len(latents)] &= np.concatenate(fires)
    edges = localisation.edges(seen.pixels, tower.grid)

    def cases(targets: slice) -> Cases:
        image, target = np.nonzero(known[:, targets])
        maps = {name: np.concatenate(batches)[:, targets][image, target] for name, batches in parts.items()}
        maps["centre"] = localisation.centre(len(image), tower.grid)
        maps["edges"] = edges[image]
        maps["random"] = localisation.noise(len(image), tower.grid)
        return Cases(image, shown[:, targets][image, target], maps)

    mixed = np.array([len(scene.things) > 1 for scene in seen.scenes])
    return Measured(following, cases(slice(len(latents))), cases(slice(len(latents), None)), mixed)


def scores(cases: Cases) -> dict[str, dict[str, np.ndarray]]:
    """Score -> method -> float (m,): scores of `saecore.evaluation.localisation`, and rank agreement with `REFERENCE`."""
    named = {
        "pointing": localisation.pointing,
        "mass": localisation.mass,
        "average precision": localisation.average_precision,
    }
    scores = {
        title: {name: score(m, cases.covered) for name, m in cases.maps.items()} for title, score in named.items()
    }
    if (reference := cases.maps.get(REFERENCE)) is not None:
        others = {name: m for name, m in cases.maps.items() if name != REFERENCE}
        scores[f"agrees with {REFERENCE}"] = {name: localisation.agreement(m, reference) for name, m in others.items()}
    return scores


class Cell(NamedTuple):
    """One score of one method."""

    mean: Mean
    best: bool
    """Whether it is the column's best, or cannot be told from the best: the interval of their difference holds 0."""


def table(cases: Cases) -> dict[str, dict[str, Cell]]:
    """Score -> method -> the mean over cases, with an interval over scenes."""
    rows = {}
    for title, values in scores(cases).items():
        means = {name: mean_over_images(of_cases, cases.image) for name, of_cases in values.items()}
        best = values[max(means, key=lambda name: means[name].value)]
        rows[title] = {
            name: Cell(means[name], mean_over_images(best - of_cases, cases.image).low <= 0)
            for name, of_cases in values.items()
        }
    return rows


def markdown(cases: Cases) -> str:
    """The table in Markdown: means +- half of each interval, bold where `Cell.best`."""
    columns = table(cases)
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in cases.maps:
        cells = [_written(column[method]) if method in column else "" for column in columns.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _written(cell: Cell) -> str:
    text = f"{cell.mean.value:.3f} ± {(cell.mean.high - cell.mean.low) / 2:.3f}"
    return f"**{text}**" if cell.best else text
