"""The stages of the jobs as plain callables: an Arrow table in, a new Arrow table out. No Ray, no files written.

    RAW -> Decode -> DECODED -> Explain -> EXPLAINED        (schemas in `saecore.schema`)
                             -> Embed -> IMAGES

A refused image passes through with its reason. No stage keeps anything from one call to the next, so that tables can come in
any order, in any size, and twice. Decode does not load PyTorch, for which workers that decode would wait seconds.
"""

import copy
import functools
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saecore import schema
from saecore.images.decode import Decoded, ImageError, decode_image
from saecore.images.effort import MAX_PIXELS
from saecore.images.preprocess import Preprocess, Resize
from saecore.methods import SHAPLEY
from saecore.pipeline.config import EmbedConfig, ExplainConfig, SiteConfig, at_once
from saecore.pipeline.decoder import Limited
from saecore.pipeline.models import as_far_as, load_fitting_head, load_models, load_word_targets
from saecore.sae import sites

if TYPE_CHECKING:
    from saecore.pipeline.inference import OnDevice


class StoppedError(BaseException):
    """Nobody waits for what is decoded. No Exception: the image is not at fault."""


class Decode:
    """RAW -> DECODED: from encoded bytes to the uint8 pixels that the tower takes."""

    def __init__(
        self, preprocess: Preprocess, max_pixels: int = MAX_PIXELS, seconds: float = 0.0, resize: Resize = "exact"
    ) -> None:
        self.preprocess = preprocess
        decode = functools.partial(decode_image, preprocess=preprocess, max_pixels=max_pixels, resize=resize)
        # Without a limit it is done in this process.
        self.decode: Callable[[bytes], Decoded] = Limited(decode, seconds) if seconds else decode

    def __call__(self, raw: pa.Table) -> pa.Table:
        rows = [self._row(row) for row in raw.to_pylist()]
        return pa.Table.from_pylist(rows, schema=schema.DECODED)

    def until(self, stopped: threading.Event) -> "Decode":
        """The same in a thread that is to end: once `stopped` is set, the next image raises `StoppedError`."""

        def decode(data: bytes) -> Decoded:
            if stopped.is_set():
                raise StoppedError
            return self.decode(data)

        ending = copy.copy(self)
        ending.decode = decode
        return ending

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        data = row.pop("data")
        if row["error"] is not None:
            return row
        try:
            decoded = self.decode(data)
        except ImageError as error:
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


class Embed:
    """DECODED -> IMAGES with the embedding, or vectors inside the tower, without the columns of an SAE. Holds CLIP."""

    step = "embed"

    def __init__(self, config: EmbedConfig) -> None:
        from saecore.pipeline.inference import Embedder
        from saecore.towers.loading import load_tower

        use_threads(config.threads)
        self.config = config
        tower = load_tower(config.clip)
        if isinstance(config, SiteConfig):
            tower = as_far_as(sites.parse(config.site), tower)
        self.infer = Embedder(tower, config.device, precision=config.precision)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        config, size = self.config, at_once(self.config.batch_size, self.config.device)
        if isinstance(config, SiteConfig) and sites.reads_tokens(config.site):
            # A batch at a time: all tokens of a chunk are a gigabyte, of which a few may be drawn.
            batches = (decoded.slice(start, size) for start in range(0, max(1, decoded.num_rows), size))
            return pa.concat_tables([self._tokens(batch, config) for batch in batches])
        shown, batch = in_batches(self.infer, decoded, size)
        return table_of({"embedding": _embeddings(batch["embedding"], shown)}, decoded, schema.IMAGES)

    def _tokens(self, decoded: pa.Table, config: SiteConfig) -> pa.Table:
        """One batch -> TOKEN_IMAGES, with the tokens that are drawn of each image."""
        shown, batch = in_batches(self.infer, decoded, max(1, decoded.num_rows))
        vectors, ids = batch["embedding"], decoded["image_id"].to_numpy()[shown].tolist()
        n_tokens = vectors.shape[1]
        n = config.tokens_per_image or n_tokens
        drawn = np.array([drawn_tokens(config.seed, image_id, n_tokens, n) for image_id in ids], np.int64).reshape(
            -1, n
        )
        vectors = np.take_along_axis(vectors, drawn[:, :, None], 1)
        columns = {
            "embedding": _embeddings(vectors.reshape(len(vectors), n * vectors.shape[2]), shown),
            "tokens": _lists(pa.array(drawn.ravel(), pa.int16()), shown, np.full(*drawn.shape), pa.list_(pa.int16())),
        }
        return table_of(columns, decoded, schema.TOKEN_IMAGES)


def drawn_tokens(seed: int, image_id: int, n_tokens: int, n: int) -> np.ndarray:
    """n of an image's tokens, in their order, int64 (n,): drawn without replacement, whatever its chunk, batch or replica."""
    if n == n_tokens:
        return np.arange(n_tokens)
    draw = np.random.Generator(np.random.Philox(key=[seed, image_id]))
    return np.sort(draw.choice(n_tokens, n, replace=False))


class Explain:
    """DECODED -> EXPLAINED: latents, quality of the reconstruction, and relevance maps. Holds CLIP and the SAE.

    `saecore.pipeline.inference` computes the values, and says in which precision.
    """

    step = "explain"

    def __init__(self, config: ExplainConfig) -> None:
        from saecore.pipeline.inference import Inference
        from saecore.pipeline.token_inference import TokenInference
        from saecore.towers.tokens import TokenTower

        use_threads(config.threads)
        self.config = config
        tower, sae = load_models(config.clip, config.sae, config.site)
        self.infer: Inference | TokenInference
        if isinstance(tower, TokenTower):
            asked = (config.targets, config.options, config.precision, config.embeddings)
            self.infer = TokenInference(tower, sae, config.k, config.methods, config.device, config.pool, *asked)
        else:
            words = load_word_targets(config, tower, sae)
            how = (
                config.methods,
                config.device,
                config.targets,
                words,
                config.options,
                config.precision,
                config.embeddings,
                load_fitting_head(config.head, config.methods, tower),
            )
            self.infer = Inference(tower, sae, config.k, *how)
        self.n_patches = tower.grid[0] * tower.grid[1]
        self.reads_tokens = isinstance(tower, TokenTower)
        self.samples = SHAPLEY in config.methods
        self.schema = schema.explained_schema(self.n_patches, self.reads_tokens, self.samples)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        shown, batch = in_batches(self.infer, decoded, at_once(self.config.batch_size, self.config.device))
        return table_of(self._columns(batch, shown), decoded, self.schema)

    def _columns(self, batch: dict[str, np.ndarray], shown: np.ndarray) -> dict[str, pa.Array]:
        """Columns inferred for the images that were decoded -> columns for all rows, null for refused images."""
        k, n_shown = self.config.k, int(shown.sum())
        columns: dict[str, pa.Array] = {}
        # The position of each row among the shown rows; null for the others, whose columns then become null too.
        position = pa.array(np.cumsum(shown) - 1, mask=~shown)
        for name in ("l0", "cosine", "fvu", "completeness"):
            columns[name] = pa.array(batch[name]).take(position)
        kept: dict[str, Any] = {
            "rank": np.tile(np.arange(k, dtype=np.int16), n_shown),
            **{
                name: batch[name].ravel()
                for name in ("latent", "activation", "pre_activation", "patches")
                if name in batch
            },
        }
        if "patch" in batch:
            patch = batch["patch"].ravel()
            kept["patch"] = pa.array(patch, mask=patch < 0)
        columns["activations"] = self._nested("activations", kept, shown, np.full(n_shown, k))
        columns["maps"] = self._maps(batch, shown)
        sinks = pa.array(np.nonzero(batch["sinks"])[1], pa.int16())
        columns["sinks"] = _lists(sinks, shown, batch["sinks"].sum(1), self.schema.field("sinks").type)
        if self.config.embeddings:
            columns["embedding"] = _embeddings(batch["embedding"], shown)
        return columns

    def _maps(self, batch: dict[str, np.ndarray], shown: np.ndarray) -> pa.Array:
        """The rows of MAPS of each shown image: by method, then by target."""
        axis, latents = self.infer.axis, batch["target_latent"]
        written = np.broadcast_to(axis.written(latents)[:, None], batch["scale"].shape)
        image, method, target = np.nonzero(written)
        latent, label = axis.columns(latents)
        of_targets = pa.array(image * axis.n_targets(latents) + target)
        maps = np.ascontiguousarray(batch["map"][written])
        flat: dict[str, Any] = {
            "latent": latent.take(of_targets),
            "target": label.take(of_targets),
            "method": pa.array(self.config.methods, pa.string()).take(pa.array(method)),
            "map": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(self.n_patches), len(maps), [None, pa.py_buffer(maps)]
            ),
            "pre_activation": batch["map_pre_activation"][image, target],
            **{name: batch[name][written] for name in ("scale", "remainder", "sink_share")},
        }
        apart = ("rank_correlation", "peak_distance") if self.reads_tokens else ()
        for name in (*apart, *(["standard_error"] if self.samples else [])):
            flat[name] = pa.array(batch[name][written], from_pandas=True)  # null for NaN
        return self._nested("maps", flat, shown, written.sum((1, 2)))

    def _nested(self, name: str, flat: dict[str, Any], shown: np.ndarray, lengths: np.ndarray) -> pa.Array:
        return nested_rows(self.schema.field(name).type, flat, shown, lengths)


def nested_rows(kind: pa.ListType, flat: Mapping[str, Any], shown: np.ndarray, lengths: np.ndarray) -> pa.Array:
    """Columns of a nested table, the type of whose rows is `kind` -> one list per row, with these lengths for shown images."""
    fields = list(kind.value_type)
    columns = [_typed(flat[field.name], field.type) for field in fields]
    return _lists(pa.StructArray.from_arrays(columns, fields=fields), shown, lengths, kind)


def _typed(values: Any, kind: pa.DataType) -> pa.Array:
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)


def use_threads(threads: int) -> None:
    """So many CPU threads for this process; 0 leaves PyTorch's own choice."""
    import torch

    if threads:
        torch.set_num_threads(threads)


def in_batches(infer: "OnDevice[Any]", decoded: pa.Table, batch_size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Which rows are shown, that is hold pixels, and the columns inferred for them in batches of `batch_size` images."""
    shown = decoded["error"].is_null().to_numpy()
    pixels = _pixels(decoded, (*infer.tower.preprocess.size, 3))
    batches = infer.in_batches(pixels, batch_size)
    return shown, {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in batches[0]._fields}


def table_of(columns: dict[str, pa.Array], decoded: pa.Table, table_schema: pa.Schema) -> pa.Table:
    """A table with the columns of a schema: the given columns, those of the decoder, and null for all others."""
    known = {**{name: decoded[name] for name in decoded.column_names}, **columns}
    arrays = [
        known[field.name] if field.name in known else pa.nulls(decoded.num_rows, field.type) for field in table_schema
    ]
    return pa.Table.from_arrays(arrays, schema=table_schema)


def _pixels(decoded: pa.Table, shape: tuple[int, ...]) -> np.ndarray:
    """The pixels of the rows that are not null: a read-only uint8 view (n, *shape) of Arrow's buffer."""
    column = pc.drop_null(decoded["pixels"]).combine_chunks()
    if not len(column):
        return np.zeros((0, *shape), np.uint8)
    _, offsets, values = column.buffers()
    first = np.frombuffer(offsets, np.int64)[column.offset]
    size = len(column) * int(np.prod(shape))
    return np.frombuffer(values, np.uint8)[first : first + size].reshape(len(column), *shape)


def _lists(values: pa.Array, shown: np.ndarray, lengths: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    """One list for every shown row, with `lengths` values each, and null for the other rows."""
    of_rows = np.zeros(len(shown), np.int64)
    of_rows[shown] = lengths
    offsets = np.concatenate([[0], np.cumsum(of_rows)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind, mask=pa.array(~shown))


def _embeddings(rows: np.ndarray, shown: np.ndarray) -> pa.ListArray:
    return _lists(pa.array(rows.ravel()), shown, np.full(*rows.shape), schema.IMAGES.field("embedding").type)
