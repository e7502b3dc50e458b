"""The stage of a run that judges maps: DECODED -> the rows of FAITHFULNESS and CURVES of each image, nested.

    DECODED -> Judge (models on a device) -> scores, curves -> an Arrow table, one row for each image

Left out: what the scores are (`saecore.judging.judge`), and what they come to (`saecore.judging.verdict`).
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from saecore import schema
from saecore.judging.settings import Settings
from saecore.judging.verdict import MODELS
from saecore.pipeline.config import at_once
from saecore.pipeline.models import load_models, load_word_targets
from saecore.pipeline.stages import in_batches, nested_rows, table_of, use_threads

if TYPE_CHECKING:
    from saecore.judging.judge import Key


class Evaluate:
    """DECODED -> what `saecore.schema.judged_schema` says. Holds CLIP and the SAE, and those that nobody trained."""

    step = "evaluate"

    def __init__(self, settings: Settings) -> None:
        from saecore.judging.judge import Judge
        from saecore.judging.subject import Subject

        use_threads(settings.threads)
        self.settings = settings
        tower, sae = load_models(settings.clip, settings.sae, settings.site)
        words = load_word_targets(settings, tower, sae)
        subject = Subject(tower, sae, settings.methods, settings.options, settings.pool, words)
        self.infer = Judge(subject, settings, settings.device)
        self.schema = schema.judged_schema()

    def __call__(self, decoded: pa.Table) -> pa.Table:
        settings = self.settings
        shown, judged = in_batches(self.infer, decoded, at_once(settings.batch_size, settings.device))
        columns = dict[str, pa.Array]()
        for name, keys, held in (
            ("faithfulness", self.infer.keys, judged["scores"]),
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

    def _of(
        self, keys: list["Key"], key: np.ndarray, latents: np.ndarray, image: np.ndarray, target: np.ndarray
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
