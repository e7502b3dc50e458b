"""What people run today instead of the job: short scripts in the ordinary way, each in a process of its own.

    python -m benchmarks.ordinary WAY '{"images": FOLDER, "clip": FOLDER, "sae": FOLDER, "k": 32, ...}'

The last line of output is one JSON object: the images that were embedded and the seconds of that, or the seconds of one map of
one image. Imports and the loading of models do not count. `WAYS` is the table of ways:

    embed         transformers' image processor by Pillow, `CLIPVisionModelWithProjection`, SAE, batches: embeddings and latents
    torchvision   the same with transformers' default processor, which torchvision backs
    each          maps: a forward and a backward pass for every latent (`benchmarks.naive_maps.each`), a few images at once
    rolled        maps: the same with rollout through all layers, one image at a time: the seed of this project
    daft          Daft's `embed_image`, a batch embedder from the package index: embeddings only, no SAE

Maps are timed for a few latents of a few images. Nothing is written to disk. What a way needs is imported inside it, since the
Python that has Daft need not have what this project needs.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Settings(NamedTuple):
    """What a script is told."""

    images: str
    """A folder of JPEGs."""
    clip: str
    """A folder in transformers' format."""
    sae: str
    k: int
    batch_size: int
    mapped_images: int
    """Images of which maps are timed."""
    mapped_latents: int
    """Latents of each of them."""


def embed(settings: Settings, processor: str = "CLIPImageProcessorPil") -> dict[str, Any]:
    """Embeddings and kept latents."""
    import torch

    process, model, sae = load(settings, processor)
    started = time.perf_counter()
    embeddings, latents = [], []
    with torch.inference_mode():
        for batch in batches(settings, settings.batch_size):
            embedding = model(pixel_values=process(batch)).image_embeds
            embeddings.append(embedding.numpy())
            latents.append(sae.encode_sparse(embedding, at_least=settings.k).latents[:, : settings.k].numpy())
    return {"images": sum(map(len, latents)), "seconds": time.perf_counter() - started}


def torchvision(settings: Settings) -> dict[str, Any]:
    """As `embed`, with the processor that transformers takes where torchvision is installed."""
    return embed(settings, "CLIPImageProcessor")


def each(settings: Settings) -> dict[str, Any]:
    """Maps of the kept latents, one latent after the other, the images of a batch together."""
    from benchmarks import naive_maps

    return _mapped(settings, naive_maps.each, settings.mapped_images)


def rolled(settings: Settings) -> dict[str, Any]:
    """Maps of the kept latents, one latent of one image after the other."""
    from benchmarks import naive_maps

    return _mapped(settings, naive_maps.rolled, 1)


def _mapped(settings: Settings, way: Callable[..., Any], batch_size: int) -> dict[str, Any]:
    """Maps of a few latents of a few images."""
    from benchmarks import naive_maps

    process, model, sae = load(settings, "CLIPImageProcessorPil")
    plain, seconds = naive_maps.with_plain_attention(model), list[float]()
    few = itertools.islice(batches(settings, batch_size), settings.mapped_images // batch_size)
    for pixels in [process(batch) for batch in few]:
        latents = sae.encode_sparse(model(pixel_values=pixels).image_embeds, at_least=settings.k).latents
        if not seconds:  # the first pass allocates the gradients, and is not counted
            way(plain, sae, pixels, latents[:, :1])
        started = time.perf_counter()
        way(plain, sae, pixels, latents[:, : settings.mapped_latents])
        seconds.append(time.perf_counter() - started)
    return {"map": sum(seconds) / (settings.mapped_images * settings.mapped_latents)}


def daft(settings: Settings) -> dict[str, Any]:
    """Embeddings by Daft, as its documentation shows it."""
    import daft
    from daft.functions import decode_image, embed_image

    started = time.perf_counter()
    files = daft.from_glob_path(f"{settings.images}/*.jpg")
    decoded = decode_image(files["path"].download()).convert_image("RGB")
    how = {"provider": "transformers", "model": settings.clip, "batch_size": settings.batch_size}
    embedded = files.with_column("embedding", embed_image(decoded, **how)).select("path", "embedding").to_arrow()
    # Daft loads the model with the first batch, so that cannot be told apart.
    return {"images": len(embedded), "seconds": time.perf_counter() - started}


WAYS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "embed": embed,
    "torchvision": torchvision,
    "each": each,
    "rolled": rolled,
    "daft": daft,
}


def load(settings: Settings, processor: str) -> tuple[Callable[[Sequence[Any]], Any], Any, Any]:
    """A call that prepares pictures, the model, and the SAE."""
    import transformers

    from saecore.sae.checkpoints import load_embedding_sae

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    prepare = getattr(transformers, processor).from_pretrained(settings.clip)
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(settings.clip).eval().requires_grad_(False)
    return lambda batch: prepare(batch, return_tensors="pt")["pixel_values"], model, load_embedding_sae(settings.sae)


def batches(settings: Settings, size: int) -> Iterator[list[Any]]:
    """The pictures of the folder, opened by Pillow, some at a time."""
    from PIL import Image

    files = iter(sorted(Path(settings.images).iterdir()))
    while names := [*itertools.islice(files, size)]:
        yield [Image.open(name).convert("RGB") for name in names]


def lacks(way: str) -> str:
    """The package that a way needs and that this Python does not have; "" if it has all."""
    import importlib.util

    needed = {"daft": "daft", "torchvision": "torchvision"}.get(way, "")
    return needed if needed and importlib.util.find_spec(needed) is None else ""


if __name__ == "__main__":
    if missing := lacks(sys.argv[1]):
        print(json.dumps({"lacks": missing}))
    else:
        print(json.dumps(WAYS[sys.argv[1]](Settings(**json.loads(sys.argv[2])))))
