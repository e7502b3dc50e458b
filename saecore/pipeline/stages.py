"""The steps of the jobs as plain callables: an Arrow table in, a new Arrow table out. No Ray, no files written.

    RAW -> Decode -> DECODED -> Explain -> EXPLAINED        (schemas in `saecore.schema`)
                             -> Embed -> IMAGES

A refused image passes through with its reason. No stage keeps anything from one call to the next, so that batches can
come in any order, any size, and twice. Decode does not load PyTorch: workers that decode would wait seconds for it.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saecore import schema
from saecore.images import decode as images
from saecore.methods import BLANK_TEXT, DEFAULT_OPTIONS, KEPT, Options, Wanted

if TYPE_CHECKING:
    from saecore.pipeline.inference import Embedder, Inference
    from saecore.relevance.targets import Words
    from saecore.sae.model import SAE
    from saecore.towers.tower import ImageTower


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Everything `Embed` needs to build itself in another process."""

    clip: str
    """CLIP or SigLIP: a Hub id, a local directory in transformers format, or `demo`."""
    batch_size: int = 64
    """Images per forward. Changes speed and memory, not results."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    threads: int = 0
    """CPU threads of the forward; 0 leaves PyTorch's own choice (Ray sets OMP_NUM_THREADS to an actor's num_cpus)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainConfig(EmbedConfig):
    """Everything `Explain` needs, which begins with the embedding."""

    sae: str
    """SAE: a folder, a file, a Hub address, or `demo`."""
    site: str = ""
    """Where it reads, where its files do not say."""
    k: int
    """Latents kept per image."""
    methods: tuple[str, ...] = ("contrib",)
    """How maps are computed."""
    targets: Wanted = KEPT
    """What they explain."""
    concept_latents: int = 8
    """Latents that make up a concept."""
    concept_positive: bool = False
    """Whether a concept takes latents with a positive weight only."""
    options: Options = DEFAULT_OPTIONS
    """What the methods leave open."""
    embeddings: bool = False
    """Whether the CLIP embedding is written too."""


def load_models(clip: str, sae: str, site: str = "") -> "tuple[ImageTower, SAE]":
    """CLIP and SAE on the CPU; ValueError if one cannot be loaded, or if they do not fit each other."""
    from saecore.sae.checkpoints import load_embedding_sae
    from saecore.towers.clip import load_tower

    autoencoder, tower = load_embedding_sae(sae, site), load_tower(clip)
    check_widths(sae, autoencoder, clip, tower)
    return tower, autoencoder


def check_widths(sae_address: str, sae: "SAE", clip: str, tower: "ImageTower") -> None:
    """ValueError if an SAE does not take embeddings as wide as a tower makes them."""
    if sae.config.n_inputs != tower.n_outputs:
        raise ValueError(
            f"{sae_address} takes embeddings of width {sae.config.n_inputs}, and the model {clip} makes them "
            f"{tower.n_outputs} wide: they do not belong together"
        )


def load_words(config: ExplainConfig, tower: "ImageTower", sae: "SAE") -> "Words | None":
    """What the model's text tower is needed for: targets that are texts or concepts, and the text that says nothing.

    None if it is needed for nothing; ValueError if it is needed and cannot be had.
    """
    from saecore.pipeline.inference import needs_blank
    from saecore.relevance.targets import words_of

    wanted, blank = config.targets, needs_blank(tower, config.methods, config.options)
    if not (wanted.words or blank):
        return None
    from saecore.towers.text import embed_texts, load_text_tower

    try:
        text = load_text_tower(config.clip)
    except ValueError as error:
        if wanted.words:
            raise
        need = (
            "legrad needs the text tower, to find patches that any text lights, unless --no-legrad-correction is given"
        )
        raise ValueError(f"{error}; {need}") from error
    embeddings = embed_texts(text, [*wanted.words, *[BLANK_TEXT] * blank], config.batch_size)
    n_words, of_concepts = len(wanted.words), (config.concept_latents, config.concept_positive)
    return words_of(sae, embeddings[:n_words], len(wanted.texts), *of_concepts, embeddings[n_words:])


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


class Embed:
    """DECODED -> IMAGES with the embedding, and nothing of an SAE. Holds CLIP."""

    step = "embed"

    def __init__(self, config: EmbedConfig) -> None:
        from saecore.pipeline.inference import Embedder
        from saecore.towers.clip import load_tower

        _use_threads(config.threads)
        self.config = config
        self.infer = Embedder(load_tower(config.clip), config.device)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        shown, found = _find(self.infer, decoded, self.config.batch_size)
        return _table({"embedding": _embeddings(found["embedding"], shown)}, decoded, schema.IMAGES)


class Explain:
    """DECODED -> EXPLAINED: latents, reconstruction quality and relevance maps. Holds CLIP, SAE and method.

    See `saecore.pipeline.inference` for what is computed, and in which precision.
    """

    step = "explain"

    def __init__(self, config: ExplainConfig) -> None:
        from saecore.pipeline.inference import Inference

        _use_threads(config.threads)
        self.config = config
        tower, sae = load_models(config.clip, config.sae, config.site)
        words = load_words(config, tower, sae)
        self.infer = Inference(
            tower, sae, config.k, config.methods, config.device, config.targets, words, config.options
        )
        self.n_patches = tower.grid[0] * tower.grid[1]
        self.schema = schema.explained_schema(self.n_patches)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        shown, found = _find(self.infer, decoded, self.config.batch_size)
        return _table(self._columns(found, shown), decoded, self.schema)

    def _columns(self, found: dict[str, np.ndarray], shown: np.ndarray) -> dict[str, pa.Array]:
        """Spread the findings of the shown images over all rows; refused rows get null."""
        k, n_shown = self.config.k, int(shown.sum())
        columns: dict[str, pa.Array] = {}
        # Row -> its place among the shown, null for the others: what takes values there and leaves null here.
        place = pa.array(np.cumsum(shown) - 1, mask=~shown)
        for name in ("l0", "cosine", "fvu", "completeness"):
            columns[name] = pa.array(found[name]).take(place)
        kept = {
            "rank": np.tile(np.arange(k, dtype=np.int16), n_shown),
            **{name: found[name].ravel() for name in ("latent", "activation", "pre_activation")},
        }
        columns["activations"] = self._nested("activations", kept, shown, np.full(n_shown, k))
        columns["maps"] = self._maps(found, shown)
        sinks = pa.array(np.nonzero(found["sinks"])[1], pa.int16())
        columns["sinks"] = _lists(sinks, shown, found["sinks"].sum(1), self.schema.field("sinks").type)
        if self.config.embeddings:
            columns["embedding"] = _embeddings(found["embedding"], shown)
        return columns

    def _maps(self, found: dict[str, np.ndarray], shown: np.ndarray) -> pa.Array:
        """MAPS of each shown image: by method, then by target."""
        _, n_methods, n_targets, _ = found["map"].shape
        labels = self.config.targets.labels()
        latent = np.broadcast_to(found["target"][:, None], found["scale"].shape)
        label = np.broadcast_to(np.arange(n_targets) - (n_targets - len(labels)), found["scale"].shape)
        method = np.broadcast_to(np.arange(n_methods)[:, None], found["scale"].shape)
        wanted = np.broadcast_to(found["wanted"][:, None], found["scale"].shape)
        pre = np.broadcast_to(found["map_pre_activation"][:, None], found["scale"].shape)[wanted]
        maps = np.ascontiguousarray(found["map"][wanted])
        flat = {
            "latent": pa.array(latent[wanted], mask=latent[wanted] < 0),
            "target": pa.array(labels, pa.string()).take(pa.array(label[wanted], mask=latent[wanted] >= 0)),
            "method": pa.array(self.config.methods, pa.string()).take(pa.array(method[wanted])),
            "map": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(self.n_patches), len(maps), [None, pa.py_buffer(maps)]
            ),
            "pre_activation": pre,
            **{name: found[name][wanted] for name in ("scale", "remainder", "sink_share")},
        }
        return self._nested("maps", flat, shown, wanted.sum((1, 2)))

    def _nested(self, name: str, flat: dict[str, Any], shown: np.ndarray, lengths: np.ndarray) -> pa.Array:
        """Columns of a table that travels nested -> its lists, of these lengths for the shown images."""
        kind = self.schema.field(name).type
        fields = list(kind.value_type)
        columns = [pa.array(flat[field.name], field.type) for field in fields]
        return _lists(pa.StructArray.from_arrays(columns, fields=fields), shown, lengths, kind)


def _use_threads(threads: int) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def _find(
    infer: "Embedder | Inference", decoded: pa.Table, batch_size: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Which rows are shown, and what is found in those, in batches."""
    shown = decoded["error"].is_null().to_numpy()
    pixels = _pixels(decoded, (*infer.tower.preprocess.size, 3))
    batches = [infer(pixels[start : start + batch_size]) for start in range(0, max(1, len(pixels)), batch_size)]
    return shown, {name: np.concatenate([getattr(found, name) for found in batches]) for name in batches[0]._fields}


def _table(columns: dict[str, pa.Array], decoded: pa.Table, wanted: pa.Schema) -> pa.Table:
    """What was found, what the decoder said as it is, null for what is neither."""
    known = {**{name: decoded[name] for name in decoded.column_names}, **columns}
    arrays = [known[field.name] if field.name in known else pa.nulls(decoded.num_rows, field.type) for field in wanted]
    return pa.Table.from_arrays(arrays, schema=wanted)


def _pixels(decoded: pa.Table, shape: tuple[int, ...]) -> np.ndarray:
    """The pixels of the rows that have some: a read-only uint8 view (n, *shape) of Arrow's buffer."""
    column = pc.drop_null(decoded["pixels"]).combine_chunks()
    if not len(column):
        return np.zeros((0, *shape), np.uint8)
    _, offsets, values = column.buffers()
    first = np.frombuffer(offsets, np.int64)[column.offset]
    size = len(column) * int(np.prod(shape))
    return np.frombuffer(values, np.uint8)[first : first + size].reshape(len(column), *shape)


def _lists(values: pa.Array, shown: np.ndarray, lengths: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    """One list for every shown row, of `lengths` values, null for the others."""
    of_rows = np.zeros(len(shown), np.int64)
    of_rows[shown] = lengths
    offsets = np.concatenate([[0], np.cumsum(of_rows)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind, mask=pa.array(~shown))


def _embeddings(found: np.ndarray, shown: np.ndarray) -> pa.ListArray:
    return _lists(pa.array(found.ravel()), shown, np.full(*found.shape), schema.IMAGES.field("embedding").type)
