"""What travels between the stages and what a run leaves on disk: the Arrow schema of every table.

The flow, left to right; each arrow is a stage of `saecore.pipeline.stages` or a function of `saecore.images.chunks` and
`saecore.runs.run`:

    PLAN row (a chunk) -> RAW (bytes) -> DECODED (pixels) -> EXPLAINED (latents and maps) -> IMAGES, ACTIVATIONS, MAPS files

Glossary. One word, one meaning, in code, columns, logs and pages:

    shard           a unit of input: a tar, a Parquet file, a group of files of a folder
    chunk           a range of images of one shard: the unit of work, of retry and of commitment
    image           one picture, one row
    latent          one unit of the SAE
    pre-activation  a latent's value before the activation function
    activation      its value after it
    kept            one of the k latents with the largest activations, written for an image
    patch grid      the tower's H x W tokens
    relevance map   one signed value per patch, in pre-activation units
    remainder       what of the pre-activation no patch accounts for
    sink            a token that hoards attention and says nothing about its place
    vocabulary      a list of words with CLIP text embeddings
    name            the words nearest a latent
    run             one output folder
    site            where an SAE reads: the embedding, or a layer's residual stream or MLP, on CLS or patch tokens
    replica         one actor that holds the models
    fingerprint     the hash of what changes results

Only plain Arrow types appear here, no extension types: DuckDB, pandas, Polars and pyarrow read every table as it is.
"""

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
        pa.field("bytes", pa.int64(), nullable=False),  # size of the shard: of its file, or of all its files
        pa.field("mtime_ns", pa.int64(), nullable=False),  # of the shard: of its file, or of its newest file
        pa.field("offset", pa.int64()),  # tar: byte at which the chunk's first member header starts, uncompressed
        pa.field("members", pa.list_(pa.string())),  # folder: the files' names inside it
        pa.field("column", pa.string()),  # parquet: the column that holds the images
        pa.field("damage", pa.string()),  # why the shard ends here; its last index then stands for what was lost
    ]
)

_IDENTITY = [
    pa.field("image_id", pa.int64(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("key", pa.string(), nullable=False),  # the image's name inside the shard; alone it repeats across shards
]
_ERROR = [
    pa.field("error", pa.string()),  # why there is nothing else: a short stable reason, or null
    pa.field("error_detail", pa.string()),
]
_GEOMETRY = [
    pa.field("width", pa.int32()),  # after EXIF rotation, as viewers show it
    pa.field("height", pa.int32()),
    pa.field("format", pa.string()),  # JPEG, PNG, WEBP, GIF, BMP, TIFF
    pa.field("crop_left", pa.int32()),  # the area that CLIP saw, in decoded pixels: maps refer to it
    pa.field("crop_top", pa.int32()),
    pa.field("crop_right", pa.int32()),  # one past the last pixel
    pa.field("crop_bottom", pa.int32()),
]

# Encoded images as they lie in the shard; `data` is null where `error` says why.
RAW = pa.schema([*_IDENTITY, *_ERROR, pa.field("data", pa.large_binary())])

# `pixels`: uint8, row-major (crop height, crop width, 3), null where `error` is not.
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


def maps_schema(n_patches: int) -> pa.Schema:
    """Relevance maps of an image's targets, for each method; value = int8 x `scale`, in the method's units.

    A target is a latent, kept or asked for, or else named in `target`: "text: a red square", "concept: red".

    `map` is fixed-size binary because Parquet stores 8-bit list elements as 32-bit integers (35 to 40 % larger, 15 times
    slower to write). One line of NumPy decodes it: `np.frombuffer(map, np.int8).reshape(grid_height, grid_width) * scale`.
    """
    return pa.schema(
        [
            pa.field("image_id", pa.int64(), nullable=False),
            pa.field("latent", pa.int32()),  # null where the target is no latent
            pa.field("target", pa.string()),  # null where it is
            pa.field("method", pa.string(), nullable=False),
            pa.field("map", pa.binary(n_patches), nullable=False),  # row-major
            pa.field("scale", pa.float32(), nullable=False),
            pa.field(
                "pre_activation", pa.float32(), nullable=False
            ),  # what map and remainder add up to; of a text, the cosine
            pa.field("remainder", pa.float32(), nullable=False),  # NaN where the method is no decomposition
            pa.field("sink_share", pa.float32(), nullable=False),  # of sum |map|, in [0, 1]
        ]
    )


# One row for every image that was found, refused ones too.
IMAGES = pa.schema(
    [
        *_IDENTITY,
        *_GEOMETRY,
        pa.field(
            "embedding", pa.list_(pa.float32())
        ),  # CLIP image embedding before any normalisation; null unless asked
        pa.field("l0", pa.int32()),  # latents that fire in all
        pa.field("cosine", pa.float32()),  # between the embedding and its SAE reconstruction
        pa.field("fvu", pa.float32()),  # |x - reconstruction|^2 / |x - training mean|^2 of this image
        pa.field("sinks", pa.list_(pa.int16())),  # numbers of the patches whose norm is an outlier, row-major
        *_ERROR,
    ]
)


TEXTS_FILE = "texts.parquet"

# One row per word of a vocabulary, in its order. The embedding is CLIP's, before any normalisation where one template made it.
TEXTS = pa.schema(
    [
        pa.field("word", pa.string(), nullable=False),
        pa.field("embedding", pa.list_(pa.float32()), nullable=False),
    ]
)

# One row per latent, written by jobs.index; jobs.name adds what it is called. It fires for an image where it is kept with an
# activation other than zero.
LATENTS = pa.schema(
    [
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("images", pa.int64()),  # for which it fires
        pa.field("rate", pa.float64()),  # of all images that were not refused
        pa.field("dead", pa.bool_()),  # it fires for none
        pa.field("mean", pa.float32()),  # of its activations where it fires, as all that follow
        pa.field("max", pa.float32()),
        pa.field("q05", pa.float32()),  # quantiles
        pa.field("q25", pa.float32()),
        pa.field("median", pa.float32()),
        pa.field("q75", pa.float32()),
        pa.field("q95", pa.float32()),
        pa.field("maps", pa.int64()),  # with positive relevance
        pa.field(
            "extent", pa.float32()
        ),  # mean of these maps' extents (`saecore.query.indexing.extent`): 1 / P is one patch, 1 all
        pa.field("top_images", pa.list_(pa.int64())),  # image_id, strongest first
        pa.field("top_activations", pa.list_(pa.float32())),
        pa.field("co_latents", pa.list_(pa.int32())),  # that fire for the same images, by Jaccard index
        pa.field("co_share", pa.list_(pa.float32())),  # of this latent's images, those where the other fires too
        pa.field("co_lift", pa.list_(pa.float32())),  # times as often as if the two were independent
    ]
)


# What each latent is called, as columns of latents.parquet; what the scores are: `saecore.naming.names`. `name` is that by
# data where there is one, else that by direction, and the numbers up to `scores` belong to it. Null where no way gives a
# name.
NAMES = pa.schema(
    [
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("name", pa.string()),  # the vocabulary's nearest word
        pa.field("score", pa.float32()),  # by data: standard deviations over images; by direction: a cosine
        pa.field("runner_up", pa.string()),  # the second nearest
        pa.field("runner_up_score", pa.float32()),
        pa.field("margin", pa.float32()),  # score - runner_up_score
        pa.field("valid", pa.bool_()),  # passes the thresholds that the metadata names
        pa.field("by_data", pa.bool_()),  # whether `name` is the one by data
        pa.field("words", pa.list_(pa.string())),  # the nearest, `name` first
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("direction_name", pa.string()),
        pa.field("direction_score", pa.float32()),
        pa.field("direction_margin", pa.float32()),
        pa.field("data_name", pa.string()),
        pa.field("data_score", pa.float32()),
        pa.field("data_margin", pa.float32()),
    ]
)


def explained_schema(n_patches: int) -> pa.Schema:
    """One row per image: the IMAGES columns, and its rows of ACTIVATIONS and MAPS nested (null where refused).

    `completeness` is the worst `saecore.relevance.maps.completeness_error` of the image's maps, before these are rounded to
    8 bits: it feeds the run's record and is not stored per image.
    """
    return pa.schema(
        [
            *IMAGES,
            pa.field("completeness", pa.float32()),
            pa.field("activations", pa.list_(nested(ACTIVATIONS))),
            pa.field("maps", pa.list_(nested(maps_schema(n_patches)))),
        ]
    )


def nested(schema: pa.Schema) -> pa.StructType:
    """A table's columns without `image_id`, as the struct in which they travel inside EXPLAINED."""
    return pa.struct([field for field in schema if field.name != "image_id"])


def unnest(explained: pa.Table, column: str) -> pa.Table:
    """EXPLAINED rows -> the flat table that travelled nested in `column`, with its image_id in front."""
    lists = explained[column].combine_chunks()
    lengths = lists.value_lengths().fill_null(0).to_numpy()
    image_id = explained["image_id"].to_numpy().repeat(lengths)
    structs = lists.flatten()
    fields = [pa.field("image_id", pa.int64(), nullable=False), *structs.type]
    return pa.Table.from_arrays([pa.array(image_id), *structs.flatten()], schema=pa.schema(fields))


def pack(table: pa.Table) -> pa.LargeBinaryArray:
    """A table as the single value of a binary column, so that a chunk travels as one row that nothing can tear apart."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def unpack(column: pa.ChunkedArray) -> pa.Table:
    """The table that `pack` put into a one-row column, without a copy."""
    return pa.ipc.open_stream(column[0].as_buffer()).read_all()
