"""The steps of the main job as plain callables: an Arrow table in, a new Arrow table out. No Ray, no files written.

    RAW -> Decode -> DECODED -> Explain -> EXPLAINED        (schemas in `saecore.schema`)

A refused image passes through with its reason. Neither stage keeps anything from one call to the next, so that batches can
come in any order, any size, and twice.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from saecore import images, relevance, schema
from saecore.checkpoints import load_sae
from saecore.clip import ImageTower, load_tower
from saecore.sae import SAE

METHODS = {"contrib": relevance.contrib}

INT8_MAX = 127


@dataclasses.dataclass(frozen=True)
class ExplainConfig:
    """Everything `Explain` needs to build itself in another process."""

    clip: str
    """CLIP: a Hub id, a local directory in transformers format, or `demo`."""
    sae: str
    """SAE: a folder, a file, a Hub address, or `demo`."""
    k: int
    """Latents kept per image."""
    batch_size: int = 64
    """Images per forward. Changes speed and memory, not results."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    method: str = "contrib"
    """How maps are computed."""
    embeddings: bool = False
    """Whether the CLIP embedding is written too."""
    threads: int = 0
    """CPU threads of the forward; 0 leaves PyTorch's own choice (Ray sets OMP_NUM_THREADS to an actor's num_cpus)."""


def load_models(clip: str, sae: str) -> tuple[ImageTower, SAE]:
    """CLIP and SAE on the CPU; ValueError if one cannot be had or they do not fit each other."""
    tower, autoencoder = load_tower(clip), load_sae(sae)
    if autoencoder.config.n_inputs != tower.n_outputs:
        raise ValueError(
            f"--sae {sae} takes embeddings of width {autoencoder.config.n_inputs}, "
            f"--clip {clip} makes them {tower.n_outputs} wide: they do not belong together"
        )
    return tower, autoencoder


class Decode:
    """RAW -> DECODED: encoded bytes to the uint8 pixels that the tower takes."""

    def __init__(self, preprocess: images.Preprocess, max_pixels: int = images.MAX_PIXELS) -> None:
        self.preprocess = preprocess
        self.max_pixels = max_pixels

    def __call__(self, raw: pa.Table) -> pa.Table:
        rows = [self._row(row) for row in raw.to_pylist()]
        return pa.Table.from_pylist(rows, schema=schema.DECODED)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        data = row.pop("data")
        if row["error"] is not None:
            return row
        try:
            decoded = images.decode(data, self.preprocess, self.max_pixels)
        except images.ImageError as error:
            return {**row, "error": error.reason, "error_detail": error.detail}
        left, top, right, bottom = decoded.crop
        return {
            **row,
            "width": decoded.width,
            "height": decoded.height,
            "format": decoded.format,
            "crop_left": left,
            "crop_top": top,
            "crop_right": right,
            "crop_bottom": bottom,
            "pixels": decoded.pixels.tobytes(),
        }


class _Explained(NamedTuple):
    """NumPy results for B images with k kept latents and P patches."""

    embedding: np.ndarray  # float32 (B, E)
    l0: np.ndarray  # int32 (B,)
    cosine: np.ndarray  # float32 (B,)
    fvu: np.ndarray  # float32 (B,)
    completeness: np.ndarray  # float32 (B,)
    latent: np.ndarray  # int32 (B, k)
    activation: np.ndarray  # float32 (B, k)
    pre_activation: np.ndarray  # float32 (B, k)
    map: np.ndarray  # int8 (B, k, P)
    scale: np.ndarray  # float32 (B, k)
    remainder: np.ndarray  # float32 (B, k)
    sink_share: np.ndarray  # float32 (B, k)


class Explain:
    """DECODED -> EXPLAINED: latents, reconstruction quality and relevance maps. Holds CLIP, SAE and method.

    The tower runs in bfloat16 on CUDA and float32 on the CPU; attention rows, sums of maps and the SAE are always float32.
    """

    def __init__(self, config: ExplainConfig) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.device = torch.device(config.device)
        tower, sae = load_models(config.clip, config.sae)
        self.tower = tower.to(self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.sae = sae.to(self.device)
        self.method = METHODS[config.method]
        self.n_patches = tower.grid[0] * tower.grid[1]
        self.schema = schema.explained_schema(self.n_patches)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        shown = decoded["error"].is_null().to_numpy()
        size = self.config.batch_size
        pixels = _pixels(decoded, (*self.tower.preprocess.size, 3))
        batches = [self._batch(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        if not batches:  # nothing to show: the shapes and types of no results are those of some, cut to none
            some = self._batch(np.zeros((1, *pixels.shape[1:]), np.uint8))
            batches = [_Explained(*(column[:0] for column in some))]
        return self._table(
            decoded, shown, _Explained(*(np.concatenate(column) for column in zip(*batches, strict=True)))
        )

    @torch.inference_mode()
    def _batch(self, pixels: np.ndarray) -> _Explained:
        # .copy(): Arrow's buffers are read-only, which PyTorch refuses to share.
        embedding, trace = self.tower(torch.from_numpy(pixels.copy()).to(self.device, non_blocking=True))
        code = self.sae.encode_sparse(embedding)
        reconstruction = self.sae.decode_sparse(code.latents, code.activations)
        k = self.config.k
        latents, pre_activations = code.latents[:, :k], code.pre_activations[:, :k]
        maps = self.method(self.tower, trace, *self.sae.read_outs(latents))
        scale = maps.relevance.abs().amax(-1) / INT8_MAX
        rounded = (maps.relevance / scale.clamp(min=torch.finfo(scale.dtype).tiny)[..., None]).round().to(torch.int8)
        squared_error = (embedding - reconstruction).square().sum(-1)
        results = _Explained(
            embedding=embedding,
            l0=(code.activations > 0).sum(-1, dtype=torch.int32),
            cosine=torch.cosine_similarity(embedding, reconstruction),
            fvu=squared_error / (embedding - self.sae.mean).square().sum(-1),
            completeness=relevance.completeness_error(maps, pre_activations).amax(-1),
            latent=latents.int(),
            activation=code.activations[:, :k],
            pre_activation=pre_activations,
            map=rounded,
            scale=scale,
            remainder=maps.remainder,
            sink_share=relevance.sink_share(maps, trace.sinks),
        )
        return _Explained(*(tensor.cpu().numpy() for tensor in results))

    def _table(self, decoded: pa.Table, shown: np.ndarray, found: _Explained) -> pa.Table:
        """Spread the results of the shown images over all rows; refused rows get null."""
        place = np.cumsum(shown) - 1  # row -> its position among the shown; meaningless where not shown
        kept = shown.sum() * self.config.k
        rank = np.tile(np.arange(self.config.k, dtype=np.int16), shown.sum())
        columns: dict[str, pa.Array] = {}
        for name in ("l0", "cosine", "fvu", "completeness"):
            values = getattr(found, name)
            spread = values[place.clip(min=0)] if len(values) else np.zeros(len(shown), values.dtype)
            columns[name] = pa.array(spread, mask=~shown)
        if self.config.embeddings:
            width = found.embedding.shape[1]
            columns["embedding"] = _lists(pa.array(found.embedding.ravel()), shown, width, pa.list_(pa.float32()))
        else:
            columns["embedding"] = pa.nulls(len(shown), pa.list_(pa.float32()))
        activation_rows = {
            "rank": pa.array(rank),
            "latent": pa.array(found.latent.ravel()),
            "activation": pa.array(found.activation.ravel()),
            "pre_activation": pa.array(found.pre_activation.ravel()),
        }
        map_bytes = pa.py_buffer(np.ascontiguousarray(found.map))
        map_rows = {
            "latent": activation_rows["latent"],
            "method": pa.array([self.config.method] * kept, pa.string()),
            "map": pa.FixedSizeBinaryArray.from_buffers(pa.binary(self.n_patches), kept, [None, map_bytes]),
            "scale": pa.array(found.scale.ravel()),
            "remainder": pa.array(found.remainder.ravel()),
            "sink_share": pa.array(found.sink_share.ravel()),
        }
        for name, rows in (("activations", activation_rows), ("maps", map_rows)):
            kind = self.schema.field(name).type
            structs = pa.StructArray.from_arrays(list(rows.values()), fields=list(kind.value_type))
            columns[name] = _lists(structs, shown, self.config.k, kind)
        # What the decoder said passes through as it is.
        arrays = [
            columns.get(name, decoded[name] if name in decoded.column_names else None) for name in self.schema.names
        ]
        return pa.Table.from_arrays(arrays, schema=self.schema)


def _pixels(decoded: pa.Table, shape: tuple[int, ...]) -> np.ndarray:
    """The pixels of the rows that have some: a read-only uint8 view (n, *shape) of Arrow's buffer."""
    column = pc.drop_null(decoded["pixels"]).combine_chunks()
    if not len(column):
        return np.zeros((0, *shape), np.uint8)
    _, offsets, values = column.buffers()
    first = np.frombuffer(offsets, np.int64)[column.offset]
    size = len(column) * int(np.prod(shape))
    return np.frombuffer(values, np.uint8)[first : first + size].reshape(len(column), *shape)


def _lists(values: pa.Array, shown: np.ndarray, length: int, kind: pa.DataType) -> pa.ListArray:
    """One list of `length` values for every shown row, null for the others."""
    ends = np.cumsum(shown) * length
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind, mask=pa.array(~shown))
