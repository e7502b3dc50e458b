"""One picture explained in Python, without a run folder: which latents fire for it, and where in it they come from.

    models = load("demo", "demo")
    explained = explain_image("photo.jpg", models)
    explained.latents               # a table: latent, name, activation, pre_activation
    explained.maps.shape            # (targets, H, W), float32, in units of the pre-activation
    explained.overlay(9)            # latent 9 over the picture, a PIL image

The picture goes the same way as an image of a run: the same decoder, tower, SAE and method, always in float32. Its maps are
not rounded to 8 bits. This module may use every wing, and no wing may use it.

Left out: many pictures (`jobs.explain`), and the names of latents, which only a run has; they can be given as a mapping.

Shapes: n targets of maps, k kept latents, H x W the patch grid.
"""

import base64
import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from saecore.images.decode import Decoded, ImageError, decode_image, open_rgb
from saecore.images.preprocess import default_resize
from saecore.methods import ACTIVATION, DEFAULT_OPTIONS, METHODS, Options, methods_for
from saecore.pipeline.config import ExplainConfig
from saecore.pipeline.models import (
    check_latents,
    check_words,
    head_for,
    load_fitting_head,
    load_models,
    load_word_targets,
)
from saecore.relevance.explain import check_fits, explain_forward, trace_needs
from saecore.relevance.maps import Maps
from saecore.relevance.targets import TargetAxis, Targets, no_word_targets
from saecore.relevance.tokens import explain_pooled
from saecore.report import display
from saecore.requests import parse_targets
from saecore.sae import sites
from saecore.sae.model import SAE
from saecore.towers.tokens import TokenTower
from saecore.towers.tower import ImageTower

LOSSLESS = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Modes of PIL that a PNG stores without a change."""

SHOWN = 6
"""How many maps a notebook shows if a cell ends in an `ExplainedImage`."""


class Models(NamedTuple):
    """A CLIP and an SAE that fit each other, on one device."""

    clip: str
    """The address of CLIP, from which its text tower is loaded when a text is explained."""
    tower: ImageTower
    sae: SAE


def load(clip: str, sae: str, site: str = "", device: str = "cpu") -> Models:
    """The models at these addresses, which may be all that `relmap explain` takes.

    ValueError if a model cannot be loaded, or if the two do not fit.
    """
    tower, autoencoder = load_models(clip, sae, site)
    return Models(clip, tower.to(device), autoencoder.to(device))


@dataclasses.dataclass(frozen=True)
class ExplainedImage:
    """The latents of one picture, and its relevance maps."""

    crop: Image.Image
    """The part of the picture that CLIP saw, in the file's own pixels."""
    latents: pa.Table
    """One row for each kept latent, strongest first: latent, name (if names were given), activation, pre_activation."""
    targets: list[str]
    """n names of targets, one for each map: `latent 9`, `text: a red square`, `concept: red`."""
    maps: np.ndarray
    """float32 (n, H, W), in the method's units."""
    remainders: np.ndarray
    """float32 (n,): what no patch accounts for. A map's sum + its remainder = the pre-activation. NaN if the method is no
    decomposition."""
    pre_activations: np.ndarray
    """float32 (n,): the values that the maps explain; of a text, the cosine."""
    method: str
    """The name of the method that made the maps."""

    def overlay(self, target: int | str | None = None, side: int = 448) -> Image.Image:
        """One target's map over the picture, with a colour bar.

        target: a latent's number, or an entry of `targets`; by default the first entry. side: pixels along the longer side. All
        overlays of a picture share one scale. ValueError if the target has no map.
        """
        row = self._row(target)
        picture = display.resized(np.asarray(self.crop), side)
        limit = display.shared_limit(list(self.maps))
        tile = display.overlay(picture, self.maps[row], limit)
        bar = display.colour_bar(
            limit, tile.shape[1], signed=self.method != ACTIVATION and bool(METHODS[self.method].units)
        )
        caption = f"{self.targets[row]}   {self.pre_activations[row]:.3g}"
        foot = f"{self.method}, {METHODS[self.method].units or 'no units'}"
        return display.mosaic([[(tile, caption)], [(bar, "")]], foot=foot)

    def _row(self, target: int | str | None) -> int:
        name = self.targets[0] if target is None else f"latent {target}" if isinstance(target, int) else target
        if name not in self.targets:
            raise ValueError(f"{name} has no map here; there are maps of {', '.join(self.targets)}")
        return self.targets.index(name)

    def _repr_html_(self) -> str:
        """The latents and the first maps as HTML, which a notebook shows."""
        rows = "".join(
            "<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row.values()) + "</tr>"
            for row in self.latents.to_pylist()
        )
        heads = "".join(f"<th>{html.escape(name)}</th>" for name in self.latents.column_names)
        pictures = "".join(
            f'<img alt="map of {html.escape(target)}" src="data:image/png;base64,{_encoded(self.overlay(target, 224))}">'
            for target in self.targets[:SHOWN]
        )
        return f"<div>{pictures}</div><table><tr>{heads}</tr>{rows}</table>"


def explain_image(
    image: str | Path | bytes | Image.Image,
    models: Models,
    k: int = 8,
    method: str = "contrib",
    targets: Sequence[str] = ("kept",),
    options: Options = DEFAULT_OPTIONS,
    names: Mapping[int, str] | None = None,
    pool: str = "",
    head: str = "",
) -> ExplainedImage:
    """Explain one picture: a path, the bytes of a file, or a PIL image.

    k: how many of the strongest latents are kept; at most as many as the SAE lets fire. method: one of
    `saecore.methods.OF_EMBEDDING`, or `OF_TOKENS` for an SAE that reads tokens. targets: what the maps explain, as
    `saecore.requests.parse_targets` reads it: `kept`, `latents:3,17`, `text:a red square`, `concept:red`. names: the names of
    latents, by number. pool: how values at tokens become one, `saecore.sae.sites.POOLS`. ValueError for a picture that cannot
    be decoded, or for a wrong argument.
    """
    clip, tower, sae = models
    reads_tokens = sites.reads_tokens(sae.config.site)
    (name, *others), request = methods_for(method, reads_tokens), parse_targets(targets)
    if others:
        raise ValueError(f"method {method}: give one method, and explain the picture again for another")
    if k < 1:
        raise ValueError(f"k {k}: must be at least 1")
    options.check()
    sites.check_pool(pool, sites.parse(sae.config.site).tokens)
    check_fits(tower, (name,), options)
    check_latents(request, sae)
    check_words(request, sae.config.site)
    k = min(k, sae.config.n_latents if reads_tokens else sae.config.most_firing)
    head = head_for(clip, (name,), head)
    config = ExplainConfig(
        clip=clip, sae="", k=k, methods=(name,), targets=request, options=options, pool=pool, head=head
    )
    data = _bytes_of(image)
    decoded = _decoded(data, tower, image)
    axis = TargetAxis.of(request, k)
    with torch.inference_mode():
        pixels = torch.from_numpy(decoded.pixels[None].copy()).to(sae.encoder.device)
        found = (
            _of_tokens(models, pixels, config, axis) if reads_tokens else _of_embedding(models, pixels, config, axis)
        )
    written = axis.written(found.targets.cpu().numpy())[0]
    of_latents = [f"latent {latent}" for latent in found.targets[0].tolist()]
    kept = found.latents[0].tolist()
    columns = {
        "latent": pa.array(kept, pa.int32()),
        **({} if names is None else {"name": pa.array([names.get(latent) for latent in kept], pa.string())}),
        "activation": found.activations[0].cpu().numpy(),
        "pre_activation": found.pre_activations[0].cpu().numpy(),
    }
    return ExplainedImage(
        crop=open_rgb(data).image.crop(decoded.crop),
        latents=pa.table(columns),
        targets=[target for target, keep in zip([*of_latents, *axis.labels], written, strict=True) if keep],
        maps=found.maps.relevance[0].unflatten(-1, tower.grid).cpu().numpy()[written],
        remainders=found.maps.remainder[0].cpu().numpy()[written],
        pre_activations=found.values[0].cpu().numpy()[written],
        method=name,
    )


class _Found(NamedTuple):
    """What was computed of one picture, each with a leading dimension of 1."""

    latents: torch.Tensor
    """(1, k), with their activations and pre-activations."""
    activations: torch.Tensor
    pre_activations: torch.Tensor
    targets: torch.Tensor
    """The targets that are latents."""
    values: torch.Tensor
    """(1, n)."""
    maps: Maps


def _of_embedding(models: Models, pixels: torch.Tensor, config: ExplainConfig, axis: TargetAxis) -> _Found:
    _, tower, sae = models
    words = load_word_targets(config, tower, sae) or no_word_targets(sae)
    head = load_fitting_head(config.head, config.methods, tower)
    (name,), options, k = config.methods, config.options, config.k
    embedding, trace = tower(pixels, **trace_needs((name,), options, len(tower.path())))
    code = sae.encode_sparse(embedding, at_least=k)
    targets = Targets(sae, axis.latents(code.latents[:, :k]), words.to(pixels.device))
    maps = explain_forward((name,), tower, pixels, embedding, trace, targets, options, head=head)[name]
    values = targets.values(embedding[:, None])[:, 0]
    latents, activations, pre_activations = (part[:, :k] for part in code)
    return _Found(latents, activations, pre_activations, targets.latents, values, maps)


def _of_tokens(models: Models, pixels: torch.Tensor, config: ExplainConfig, axis: TargetAxis) -> _Found:
    _, tower, sae = models
    assert isinstance(tower, TokenTower)
    k = config.k
    found = explain_pooled(config.methods, tower, sae, pixels, config.pool, k, axis, config.options)
    latents, values, first = found.code.latents, found.values, found.first
    of_kept = (latents[:, :k], found.code.pooled[:, :k], values[:, :k])
    return _Found(*of_kept, latents[:, first:], values[:, first:], found.maps[config.methods[0]])


def _bytes_of(image: str | Path | bytes | Image.Image) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        sink = io.BytesIO()
        (image if image.mode in LOSSLESS else image.convert("RGB")).save(sink, "PNG", compress_level=1)
        return sink.getvalue()
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise ValueError(f"{image} cannot be read: {error.strerror}") from error


def _decoded(data: bytes, tower: ImageTower, image: str | Path | bytes | Image.Image) -> Decoded:
    try:
        return decode_image(data, tower.preprocess, resize=default_resize())
    except ImageError as error:
        name = image if isinstance(image, str | Path) else "the picture"
        raise ValueError(f"{name} cannot be decoded: {error.reason}, {error.detail}") from error


def _cell(value: object) -> str:
    return html.escape(f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value))


def _encoded(picture: Image.Image) -> str:
    return base64.b64encode(display.png(picture)).decode()
