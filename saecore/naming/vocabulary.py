"""Words to name latents with: a file with one word a line, or words that jobs.embed has embedded.

    words.txt               read_vocabulary: each word once; read_lines: every line
    FOLDER/texts.parquet    read_texts: words with their embeddings (schema.TEXTS)

Errors are ValueErrors of one sentence that begins with the address.

Shapes: E embedding width.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saecore.hub import DEMO_VOCABULARY, embedded
from saecore.schema import TEXTS, TEXTS_FILE
from saecore.storage import is_file, join_uri, read_bytes, read_parquet


class Vocabulary(NamedTuple):
    """A file with one word a line."""

    words: list[str]
    """In the file's order, each once, without blanks around it."""
    blank: int
    """Lines that were dropped because they hold nothing."""
    repeated: int
    """Lines that were dropped because their word came before."""


def read_vocabulary(uri: str) -> Vocabulary:
    """The words of a UTF-8 file with one word or phrase a line, or of `demo`; ValueError if there is no file or no word."""
    lines = read_lines(uri)
    words = list(dict.fromkeys(line for line in lines if line))
    if not words:
        raise ValueError(f"{uri} holds no words")
    blank = lines.count("")
    return Vocabulary(words, blank, len(lines) - blank - len(words))


def read_lines(uri: str) -> list[str]:
    """Every line of such a file, without blanks around it."""
    try:
        lines = read_bytes(embedded(uri, DEMO_VOCABULARY)).decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(f"{uri} cannot be read: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{uri} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}") from error
    if lines[-1] == "":  # what follows the last line's end is no line
        lines.pop()
    return [line.strip() for line in lines]


class Texts(NamedTuple):
    """The words of a texts.parquet."""

    words: list[str]
    embeddings: np.ndarray
    """float32 (words, E)."""
    clip_sha256: str
    """What `TextTower.sha256` begins with; empty in a file that another program wrote."""


def read_texts(folder: str) -> Texts:
    """Words and their embeddings in a folder; ValueError if there are none."""
    file = join_uri(folder, TEXTS_FILE)
    if not is_file(file):
        raise ValueError(f"{folder}: no {TEXTS_FILE} there, as jobs.embed writes it of texts")
    try:
        table = read_parquet(file, TEXTS.names)
        table = table.cast(TEXTS.with_metadata(table.schema.metadata))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{folder}: {TEXTS_FILE} cannot be read: {' '.join(str(error).split())}") from error
    widths = pc.list_value_length(table["embedding"]).unique().to_pylist()
    embeddings = table["embedding"].combine_chunks().flatten().to_numpy().copy()  # PyTorch wants it writable
    if len(widths) != 1 or not widths[0] or not np.isfinite(embeddings).all():
        raise ValueError(f"{folder}: {TEXTS_FILE} holds no vectors, of unequal widths, or not finite ones")
    digest = (table.schema.metadata or {}).get(b"clip_sha256", b"").decode()
    return Texts(table["word"].to_pylist(), embeddings.reshape(table.num_rows, -1), digest)
