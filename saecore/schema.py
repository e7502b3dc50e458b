"""What travels between the stages and what a run leaves on disk: the Arrow schema of every table.

The flow, left to right; each arrow is a stage of `saecore.pipeline.stages` or a function of `saecore.images.chunks` and
`saecore.runs.run`:

    PLAN row (a chunk) -> RAW (bytes) -> DECODED (pixels) -> EXPLAINED (latents and maps) -> IMAGES, ACTIVATIONS, MAPS files

Glossary. One word, one meaning, in code, columns, logs and pages:

    shard           a unit of input: a tar, a Parquet file, a group of files of a folder
    chunk           a range of images of one shard: the unit of work, of retry and of commitment
    plan            the chunks of a run, written before the first one is computed
    image           one picture, one row
    numbering       the arithmetic on the plan that gives an image its number (image_id), its chunk and its place
    place           the position of an image in the order of the plan, from 0
    latent          one unit of the SAE
    pre-activation  a latent's value before the activation function
    activation      its value after it
    kept            one of the k latents with the largest activations, written for an image
    patch grid      the tower's H x W tokens
    target          the value that a map explains: a latent's pre-activation, a text's fit, a concept's sum of latents
    target request  the targets that a run is asked for, the same request for every image
    word target     a target that words name, the same for every image: a text or a concept
    target axis     the order of an image's targets: kept latents, latents asked for by number, texts, concepts
    method          a way to make maps, with its own norm, units and options
    relevance map   one value per patch for one target; the method says in which units
    decomposition   a method whose map and remainder add up to the pre-activation
    remainder       what of the pre-activation no patch accounts for
    sink            a token that hoards attention and says nothing about its place
    vocabulary      a list of words with CLIP text embeddings
    name            the words nearest a latent
    run             one output folder
    record          run.json: what made a run, and what came of it
    claim           the file of a process that writes into a run folder, or asks to
    lease           the right to write into a run folder, which ends if it is not renewed
    commit          the file that says that a chunk is done, and which files hold its rows
    preview         a picture of a run's first images, each with its strongest maps
    site            where an SAE reads: the embedding, or a layer's residual stream or MLP, on CLS or patch tokens
    pool            how what an SAE makes of tokens becomes one value for an image: max, mean, sum, or CLS's own
    replica         one actor that holds the models
    fingerprint     the hash of what changes results

Only plain Arrow types appear here, no extension types: DuckDB, pandas, Polars and pyarrow read every table as it is.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa

VERSION = 2
"""Version of these schemas; part of every fingerprint."""

# One row per chunk. `offset` and `members` say where its images are, so that a worker reads them without a new scan.
PLAN = pa.schema(
    [
        pa.field("chunk_id", pa.int64(), nullable=False),
        pa.field("shard_id", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),  # of the shard
        pa.field("kind", pa.string(), nullable=False),  # tar, tar.gz, folder, parquet
        pa.field("start", pa.int64(), nullable=False),  # first image's index in the shard
        pa.field("end", pa.int64(), nullable=False),  # one past the last
        pa.field("bytes", pa.int64(), nullable=False),  # size of the shard's file, or of all its files
        pa.field("mtime_ns", pa.int64(), nullable=False),  # when the shard's file, or its newest, last changed
        pa.field("offset", pa.int64()),  # tar: byte at which the chunk's first member header starts, uncompressed
        pa.field("members", pa.list_(pa.string())),  # folder: the files' names inside it
        pa.field("column", pa.string()),  # parquet: the column that holds the images
        pa.field("damage", pa.string()),  # why the shard ends here; its last index then stands for what was lost
    ]
)

# A plan of some images of each chunk: those that a run refused, or a sample.
PART = pa.schema([*PLAN, pa.field("only", pa.list_(pa.int64()))])  # their indices in the shard

GROWTHS = b"growths"
"""The key of a plan's metadata under which its growths are listed (`saecore.pipeline.growth`), as JSON."""

_IDENTITY = [
    pa.field("image_id", pa.int64(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("key", pa.string(), nullable=False),  # the name inside the shard; another shard may have the same
]
_ERROR = [
    pa.field("error", pa.string()),  # why the row has nothing else: a short stable reason; null if all is well
    pa.field("error_detail", pa.string()),
]
_GEOMETRY = [
    pa.field("width", pa.int32()),  # after EXIF rotation, as viewers show it
    pa.field("height", pa.int32()),
    pa.field("format", pa.string()),  # JPEG, PNG, WEBP, GIF, BMP, TIFF
    pa.field("crop_left", pa.int32()),  # the area that CLIP saw, in decoded pixels; maps cover this area
    pa.field("crop_top", pa.int32()),
    pa.field("crop_right", pa.int32()),  # one past the last pixel
    pa.field("crop_bottom", pa.int32()),
]

# Encoded images as they lie in the shard; `data` is null where `error` says why.
RAW = pa.schema([*_IDENTITY, *_ERROR, pa.field("data", pa.large_binary())])

# `pixels`: uint8, row-major (crop height, crop width, 3); null for a refused image.
DECODED = pa.schema([*_IDENTITY, *_GEOMETRY, *_ERROR, pa.field("pixels", pa.large_binary())])

# The k kept latents of each image, strongest first.
ACTIVATIONS = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("rank", pa.int16(), nullable=False),  # 0 is the strongest
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("activation", pa.float32(), nullable=False),
        pa.field("pre_activation", pa.float32(), nullable=False),
    ]
)


# The same where the SAE reads tokens; the activation is then pooled over them.
TOKEN_ACTIVATIONS = pa.schema(
    [
        *ACTIVATIONS,
        pa.field(
            "patch", pa.int16()
        ),  # where it is most active, row-major; null if that is CLS, or if it fires nowhere
        pa.field("patches", pa.int16(), nullable=False),  # at how many it fires
    ]
)

_AGREEMENT = [
    pa.field(
        "rank_correlation", pa.float32()
    ),  # of the map, before it is rounded, with the latent's activation at each patch; null where it has no meaning
    pa.field("peak_distance", pa.float32()),  # of the largest values of the two, in patches; likewise
]


def activations_schema(reads_tokens: bool) -> pa.Schema:
    """Of the kept latents of each image."""
    return TOKEN_ACTIVATIONS if reads_tokens else ACTIVATIONS


def maps_schema(n_patches: int, reads_tokens: bool = False, samples: bool = False) -> pa.Schema:
    """Relevance maps of an image's targets, for each method; value = int8 x `scale`, in the method's units.

    A target is a latent, kept or asked for by number, or a text or concept that `target` names: "text: a red square".

    Where the SAE reads tokens, two more columns say how far a map lies from the latent's activation. `samples`: one of the
    methods samples, and a column says how well.

    `map` is fixed-size binary because Parquet stores 8-bit list elements as 32-bit integers (35 to 40 % larger, 15 times
    slower to write). One line of NumPy decodes it: `np.frombuffer(map, np.int8).reshape(grid_height, grid_width) * scale`.
    """
    return pa.schema(
        [
            pa.field("image_id", pa.int64(), nullable=False),
            pa.field("latent", pa.int32()),  # null where the target is a text or a concept
            pa.field("target", pa.string()),  # null where the target is a latent
            pa.field("method", pa.string(), nullable=False),
            pa.field("map", pa.binary(n_patches), nullable=False),  # row-major
            pa.field("scale", pa.float32(), nullable=False),
            pa.field(
                "pre_activation", pa.float32(), nullable=False
            ),  # what the map and its remainder add up to; of a text, the cosine
            pa.field("remainder", pa.float32(), nullable=False),  # NaN if the method is no decomposition
            pa.field("sink_share", pa.float32(), nullable=False),  # the part of sum |map| that lies on sinks, in [0, 1]
            # Of the map's values, root mean square over patches; null if the method does not sample.
            *([pa.field("standard_error", pa.float32())] if samples else []),
            *(_AGREEMENT if reads_tokens else []),
        ]
    )


# One row for every image that was found, refused images too.
IMAGES = pa.schema(
    [
        *_IDENTITY,
        *_GEOMETRY,
        pa.field(
            "embedding", pa.list_(pa.float32())
        ),  # CLIP image embedding before any normalisation; null unless it was asked for
        pa.field("l0", pa.int32()),  # how many latents fire in all
        pa.field("cosine", pa.float32()),  # between the embedding and its SAE reconstruction
        pa.field("fvu", pa.float32()),  # |x - reconstruction|^2 / |x - training mean|^2 of this image
        pa.field("sinks", pa.list_(pa.int16())),  # the patches whose norm is an outlier, by number, row-major
        *_ERROR,
    ]
)


# The same of a run that writes vectors of tokens: an image's `embedding` has one after the other.
TOKEN_IMAGES = pa.schema(
    [
        *IMAGES,
        pa.field("tokens", pa.list_(pa.int16())),  # which tokens of those that the site has, from 0
    ]
)


_CASE = [
    pa.field("latent", pa.int32()),  # null where the target is a text or a concept
    pa.field("target", pa.string()),  # null where the target is a latent
    pa.field("model", pa.string(), nullable=False),  # trained, or one of the nulls: other rows, untrained
    pa.field("method", pa.string(), nullable=False),  # of maps, or a baseline: random, centre, edges, shapley values
]

# One row for each image, target, method and metric of a run of jobs.evaluate (`saecore.judging.judge` has the metrics).
FAITHFULNESS = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        *_CASE,
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float32(), nullable=False),
    ]
)

# One row for each image, target, method and way to take patches out: the target's value from all patches to none.
CURVES = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        *_CASE,
        pa.field("way", pa.string(), nullable=False),  # drop, mean or blur
        pa.field("mif", pa.list_(pa.float32()), nullable=False),  # the map's largest values first
        pa.field("lif", pa.list_(pa.float32()), nullable=False),  # its smallest first
    ]
)


TEXTS_FILE = "texts.parquet"

# One row per word of a vocabulary, in the vocabulary's order. The embedding is CLIP's, not normalised if one template made it.
TEXTS = pa.schema(
    [
        pa.field("word", pa.string(), nullable=False),
        pa.field("embedding", pa.list_(pa.float32()), nullable=False),
    ]
)

# One row per latent. jobs.index writes the table, and jobs.name adds the names. A latent fires for an image if it is kept with
# an activation other than zero.
LATENTS = pa.schema(
    [
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("images", pa.int64()),  # for how many images it fires
        pa.field("rate", pa.float64()),  # their share of all images that were not refused
        pa.field("dead", pa.bool_()),  # whether it fires for no image
        pa.field("mean", pa.float32()),  # of the activations where it fires, as are the six figures that follow
        pa.field("max", pa.float32()),
        pa.field("q05", pa.float32()),  # quantiles
        pa.field("q25", pa.float32()),
        pa.field("median", pa.float32()),
        pa.field("q75", pa.float32()),
        pa.field("q95", pa.float32()),
        pa.field("maps", pa.int64()),  # how many of its maps have a positive value
        pa.field(
            "extent", pa.float32()
        ),  # mean extent of these maps (`saecore.query.indexing.extent`): 1 / P is one patch, 1 is all patches evenly
        pa.field("top_images", pa.list_(pa.int64())),  # image_id, strongest first
        pa.field("top_activations", pa.list_(pa.float32())),
        pa.field("co_latents", pa.list_(pa.int32())),  # latents that fire for the same images, by Jaccard index
        pa.field("co_share", pa.list_(pa.float32())),  # share of this latent's images for which the other fires too
        pa.field("co_lift", pa.list_(pa.float32())),  # how many times as often as if the two were independent
    ]
)


# The same where the SAE reads tokens.
TOKEN_LATENTS = pa.schema(
    [
        *LATENTS,
        pa.field("patches", pa.float32()),  # at how many patches it fires: mean of the images for which it fires
        *_AGREEMENT,  # means of its maps by the run's first method that shows causes
    ]
)


# The names of latents, as columns of latents.parquet; `saecore.naming.names` says what the scores are. `name` is the name by
# data if there is one, otherwise the name by direction, and the columns up to `scores` belong to that name. They are null if
# neither way gives a name.
NAMES = pa.schema(
    [
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("name", pa.string()),  # the vocabulary's nearest word
        pa.field("score", pa.float32()),  # by data: standard deviations over images; by direction: a cosine
        pa.field("runner_up", pa.string()),  # the second nearest word
        pa.field("runner_up_score", pa.float32()),
        pa.field("margin", pa.float32()),  # score - runner_up_score
        pa.field("valid", pa.bool_()),  # whether the name passes the thresholds, which are in the metadata
        pa.field("by_data", pa.bool_()),  # whether `name` is the name by data
        pa.field("words", pa.list_(pa.string())),  # the nearest words, `name` first
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("direction_name", pa.string()),
        pa.field("direction_score", pa.float32()),
        pa.field("direction_margin", pa.float32()),
        pa.field("data_name", pa.string()),
        pa.field("data_score", pa.float32()),
        pa.field("data_margin", pa.float32()),
    ]
)


def growths_of(plan: pa.Table) -> list[dict[str, Any]]:
    """How a plan grew, an object for each time; empty for a plan that is as it was first written."""
    growths: list[dict[str, Any]] = json.loads((plan.schema.metadata or {}).get(GROWTHS, b"[]"))
    return growths


def explained_schema(n_patches: int, reads_tokens: bool = False, samples: bool = False) -> pa.Schema:
    """One row per image: the IMAGES columns, and its rows of ACTIVATIONS and MAPS, nested (null if the image is refused).

    `completeness` is the worst `saecore.relevance.maps.completeness_error` of the image's maps, before these are rounded to
    8 bits. It goes into the run's record and is not stored per image.
    """
    return pa.schema(
        [
            *IMAGES,
            pa.field("completeness", pa.float32()),
            pa.field("activations", pa.list_(nested(activations_schema(reads_tokens)))),
            pa.field("maps", pa.list_(nested(maps_schema(n_patches, reads_tokens, samples)))),
        ]
    )


def nested(schema: pa.Schema) -> pa.StructType:
    """A table's columns without `image_id`, as the struct in which they travel inside EXPLAINED."""
    return pa.struct([field for field in schema if field.name != "image_id"])


def unnest(explained: pa.Table, column: str) -> pa.Table:
    """Rows of EXPLAINED -> the flat table that is nested in `column`, with image_id as the first column."""
    lists = explained[column].combine_chunks()
    lengths = lists.value_lengths().fill_null(0).to_numpy()
    image_id = explained["image_id"].to_numpy().repeat(lengths)
    structs = lists.flatten()
    fields = [pa.field("image_id", pa.int64(), nullable=False), *structs.type]
    return pa.Table.from_arrays([pa.array(image_id), *structs.flatten()], schema=pa.schema(fields))


def pack(table: pa.Table) -> pa.LargeBinaryArray:
    """A table as the single value of a binary column, so that a chunk travels as one row, which Ray cannot split."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def unpack(column: pa.ChunkedArray) -> pa.Table:
    """The table that `pack` put into a one-row column, without a copy."""
    return pa.ipc.open_stream(column[0].as_buffer()).read_all()
