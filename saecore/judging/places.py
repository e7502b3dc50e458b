"""Which maps ought to lie where, by masks that a user has: cases of an image, a target and the patches of its object.

    label      the latent that follows the label (`saecore.evaluation.masks`), which one half of the images chooses, and the
               other half judges; or the text target that is spelled as the label, judged on all images
    foreground masks without a label: every kept latent, which asks only whether maps lie on what the picture is of

A latent that follows its label by an area under the ROC curve below `FOLLOWS` is not judged: it stands for something else.

Shapes: B images, P patches.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saecore.evaluation import masks
from saecore.evaluation.localisation import SCORES, halves
from saecore.evaluation.masks import FOREGROUND, Geometry
from saecore.runs.files import of_images, open_dataset

FOLLOWS = 0.95
"""The least area under the ROC curve by which a latent follows a label. In the demo's world the latents of colours have 0.99,
and the best ones of shapes and textures 0.72 to 0.91."""

METRICS = {score.lower().replace(" ", "_"): function for score, function in SCORES.items()}
"""The scores of a map by a mask, by their names as metrics; `_foreground` is added where the mask has no label."""

TABLE = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("latent", pa.int32()),  # null where the target is a text
        pa.field("target", pa.string()),  # null where it is a latent
        pa.field("label", pa.string(), nullable=False),
        pa.field("shares", pa.list_(pa.float32()), nullable=False),  # of each patch, what the object covers
    ]
)


class Places(NamedTuple):
    """Cases, and in words how many there are."""

    table: pa.Table
    """`TABLE`, a row for each case."""
    said: str

    @property
    def sha256(self) -> str:
        """Hash of all cases: another file of masks is another judgement."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, TABLE) as writer:
            writer.write_table(self.table)
        return hashlib.sha256(sink.getvalue()).hexdigest()


class Sight(NamedTuple):
    """What a tower sees of a picture."""

    size: tuple[int, int]
    """Height and width in pixels."""
    grid: tuple[int, int]
    """Rows and columns of patches. Pixels at the edges may fill none."""
    patch: int
    """The side of a patch in pixels."""


def places_of(uri: str, address: str, image_ids: np.ndarray, texts: Sequence[str], sight: Sight, seed: int) -> Places:
    """The cases of some images of a run by the masks at an address; `texts` are its text targets, without `text: `.

    ValueError for what is wrong with the masks.
    """
    wanted = of_images(image_ids)
    columns = ["image_id", "key", "width", "height", "crop_left", "crop_top", "crop_right", "crop_bottom"]
    images = open_dataset(uri, "images").to_table(columns=columns, filter=wanted).sort_by("image_id").to_pylist()
    keys = [row["key"] for row in images]
    geometries = [
        Geometry(
            row["width"], row["height"], (row["crop_left"], row["crop_top"], row["crop_right"], row["crop_bottom"])
        )
        for row in images
    ]
    found = masks.covered(masks.open_masks(address, keys), keys, geometries, *sight)
    kept = open_dataset(uri, "activations").to_table(filter=wanted)
    kept = kept.sort_by([("image_id", "ascending"), ("rank", "ascending")])
    latents, activations, pre = (
        kept[name].to_numpy().reshape(len(images), -1) for name in ("latent", "activation", "pre_activation")
    )
    choosing = halves(len(images), seed)
    following = masks.followers(found, latents, activations, choosing)
    sure = np.nan_to_num(following.auc) >= FOLLOWS
    following = following._replace(latent=np.where(sure, following.latent, -1))
    cases = masks.cases(found, following, latents, pre, ~choosing)
    rows: list[tuple[int, int | None, str | None, int]] = [
        (int(image), int(latents[image, rank]), None, int(pair))
        for image, rank, pair in zip(cases.image, cases.rank, cases.pair, strict=True)
    ]
    rows += [
        (int(image), None, f"text: {found.labels[label]}", pair)
        for pair, (image, label) in enumerate(zip(found.image, found.label, strict=True))
        if found.labels[label] in texts
    ]
    table = pa.Table.from_pylist(
        [
            {"image_id": images[image]["image_id"], "latent": latent, "target": target}
            | {"label": found.labels[found.label[pair]], "shares": found.shares[pair]}
            for image, latent, target, pair in rows
        ],
        schema=TABLE,
    )
    labels = [label for label in found.labels if label != FOREGROUND]
    followed = [label for label, is_sure in zip(found.labels, sure, strict=True) if is_sure]
    said = f"{table.num_rows:,} cases; of {len(labels)} labels, latents follow {len(followed)}"
    said += f" ({', '.join(followed[:8])}{', ..' * (len(followed) > 8)})" if followed else ""
    return Places(table, said)


def scored(
    table: pa.Table, image_ids: np.ndarray, latents: np.ndarray, labels: Sequence[str], maps: np.ndarray
) -> dict[str, np.ndarray]:
    """Metric -> scores float32 (B, M, n) of maps (B, M, n, P), NaN without a case; a target with several has their mean.

    latents int (B, n): the targets that are latents, -1 for those that are words, which have `labels` in the table MAPS.
    """
    sums, counts = dict[str, np.ndarray](), dict[str, np.ndarray]()
    place = {int(image_id): number for number, image_id in enumerate(image_ids)}
    n_latents = latents.shape[1] - len(labels)
    for row in table.filter(pc.is_in(table["image_id"], pa.array(image_ids))).to_pylist():
        image = place[row["image_id"]]
        if row["latent"] is not None:
            (targets,) = np.nonzero(latents[image] == row["latent"])
        else:
            targets = np.array([n_latents + list(labels).index(row["target"])])
        for target in targets:
            own = maps[image, :, target]  # M, P
            if np.isnan(own).any():
                continue
            shares = np.tile(np.array(row["shares"]), (len(own), 1))
            for metric, function in METRICS.items():
                name = metric if row["label"] != FOREGROUND else f"{metric}_foreground"
                sums.setdefault(name, np.zeros(maps.shape[:3]))[image, :, target] += function(own, shares)
                counts.setdefault(name, np.zeros(maps.shape[:3]))[image, :, target] += 1
    with np.errstate(invalid="ignore"):
        return {name: (sums[name] / counts[name]).astype(np.float32) for name in sums}
