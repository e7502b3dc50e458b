"""The stage of a run that judges maps: DECODED -> the rows of FAITHFULNESS and CURVES of each image, nested.

    DECODED -> Judge (models on a device) -> scores, curves -> an Arrow table, one row for each image

Left out: what the scores are (`saecore.judging.judge`), and what they come to (`saecore.judging.verdict`).
"""

from typing import Any

import numpy as np
import pyarrow as pa

from saecore import schema
from saecore.judging import places
from saecore.judging.settings import Settings
from saecore.judging.verdict import MODELS, TRAINED, Key
from saecore.pipeline.config import at_once
from saecore.pipeline.models import load_fitting_head, load_models, load_word_targets
from saecore.pipeline.stages import in_batches, nested_rows, table_of, use_threads


def judged_schema() -> pa.Schema:
    """One row per image: the IMAGES columns, and its rows of FAITHFULNESS and CURVES, nested (null if it is refused)."""
    of = {"faithfulness": schema.FAITHFULNESS, "curves": schema.CURVES}
    return pa.schema([*schema.IMAGES, *(pa.field(name, pa.list_(schema.nested(one))) for name, one in of.items())])


class Evaluate:
    """DECODED -> what `judged_schema` says. Holds CLIP and the SAE, and those that nobody trained."""

    step = "evaluate"

    def __init__(self, settings: Settings, cases: pa.Table | None = None) -> None:
        """cases: `saecore.judging.places.TABLE`, if there are masks."""
        from saecore.judging.judge import Judge
        from saecore.judging.subject import Subject

        use_threads(settings.threads)
        self.settings, self.cases = settings, cases
        tower, sae = load_models(settings.clip, settings.sae, settings.site)
        words = load_word_targets(settings, tower, sae)
        head = load_fitting_head(settings.head, settings.methods, tower)
        subject = Subject(tower, sae, settings.methods, settings.options, settings.pool, words, head)
        self.infer = Judge(subject, settings, settings.device, keep_maps=cases is not None)
        self.schema = judged_schema()

    def __call__(self, decoded: pa.Table) -> pa.Table:
        settings = self.settings
        shown, judged = in_batches(self.infer, decoded, at_once(settings.batch_size, settings.device))
        columns = dict[str, pa.Array]()
        score_keys, scores = self._placed(decoded["image_id"].to_numpy()[shown], judged)
        for name, keys, held in (
            ("faithfulness", score_keys, scores),
            ("curves", self.infer.curve_keys, judged["curves"]),
        ):
            has = ~np.isnan(held if name == "faithfulness" else held[..., 0, 0])
            image, key, target = np.nonzero(has)
            flat = self._of(keys, key, judged["latents"], image, target)
            if name == "faithfulness":
                flat["value"] = held[has]
            else:
                flat["way"] = flat["metric"]
                flat["mif"], flat["lif"] = (_lists(held[has][:, place]) for place in (0, 1))
            columns[name] = nested_rows(self.schema.field(name).type, flat, shown, has.sum((1, 2)))
        return table_of(columns, decoded, self.schema)

    def _placed(self, image_ids: np.ndarray, judged: dict[str, np.ndarray]) -> tuple[list[Key], np.ndarray]:
        """The keys and scores (B, S, n) of a batch, with those by masks."""
        keys, scores = list(self.infer.keys), judged["scores"]
        if self.cases is None:
            return keys, scores
        labels = self.settings.targets.labels()
        by_mask = places.scored(self.cases, image_ids, judged["latents"][:, 0], labels, judged["maps"])
        for metric, values in by_mask.items():
            keys += [Key(TRAINED, method, metric) for method in self.infer.sources]
            scores = np.concatenate([scores, values], 1)
        return keys, scores

    def _of(
        self, keys: list[Key], key: np.ndarray, latents: np.ndarray, image: np.ndarray, target: np.ndarray
    ) -> dict[str, Any]:
        """The columns that say what a row is of, from the number of its key, its image and its target."""
        models, methods, metrics = (pa.array(names).take(pa.array(key)) for names in zip(*keys, strict=True))
        latent = latents[image, np.array([MODELS.index(one.model) for one in keys])[key], target]
        # After the latents come the words, for the trained model only.
        labels = pa.array([None, *self.settings.targets.labels()], pa.string())
        n_latents = latents.shape[2] - len(labels) + 1
        label = labels.take(pa.array(np.where(latent < 0, target - n_latents + 1, 0)))
        return {
            "latent": pa.array(latent, mask=latent < 0),
            "target": label,
            "model": models,
            "method": methods,
            "metric": metrics,
        }


def _lists(values: np.ndarray) -> pa.ListArray:
    """(rows, numbers) -> a list for each row."""
    ends = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.ascontiguousarray(values).ravel()))
