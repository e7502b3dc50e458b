"""What a run says about its latents: the embeddings of each latent's top images, and those of random images.

    activations of the run -> for each latent the K images with the largest activations -> their embeddings

Scores by data (`saecore.naming.scores.by_data`) compare the top images of a latent with random images of the run.

Left out: runs without embeddings, whose latents are named by direction.

Shapes: E embedding width, n latents, R images, S random images, K top images of a latent.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saecore.training.embeddings import open_embeddings
from saecore.training.survey import draw

if TYPE_CHECKING:
    from saecore.query.results import Results

TOP_IMAGES = 20
"""K: images that stand for a latent."""

SAMPLE_IMAGES = 4096
"""S: random images that say which scores are usual, mean and standard deviation to 1.6 %."""

TOP_OF_EACH_LATENT = """SELECT latent, image_id,
    row_number() OVER (PARTITION BY latent ORDER BY activation DESC, image_id) AS place
FROM activations WHERE activation > 0 QUALIFY place <= ?"""


class Evidence(NamedTuple):
    """Embeddings of images, in float32."""

    images: Tensor
    """(R, E): each image that is a top image of some latent."""
    top: Tensor
    """int64 (n, K): rows of `images`, strongest first; -1 where a latent has fewer."""
    sample: Tensor
    """(S, E): random images."""

    def to(self, device: str) -> "Evidence":
        """The same on a device."""
        return Evidence(*(tensor.to(device) for tensor in self))


def gather(run: "Results", seed: int) -> Evidence:
    """The evidence in a complete run that kept its embeddings."""
    strongest = run.sql(TOP_OF_EACH_LATENT, TOP_IMAGES)
    image_ids, row = np.unique(strongest["image_id"].to_numpy(), return_inverse=True)
    top = np.full((run.n_latents, TOP_IMAGES), -1)
    top[strongest["latent"].to_numpy(), strongest["place"].to_numpy() - 1] = row
    rows = run.tables.rows("images", pa.chunked_array([image_ids]), ["embedding"]).sort_by("image_id")
    images = rows["embedding"].combine_chunks().flatten().to_numpy().reshape(len(image_ids), -1)
    _, sample = draw(open_embeddings(run.uri), SAMPLE_IMAGES, seed)
    return Evidence(torch.from_numpy(images.copy()), torch.from_numpy(top), torch.from_numpy(sample))
