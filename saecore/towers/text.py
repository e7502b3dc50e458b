"""Words -> text embeddings of CLIP or SigLIP: the text tower from transformers, vocabulary files, templates.

The forward is transformers' own, in float32 everywhere: a vocabulary is embedded once, and small. SigLIP's embedding is read
off the last of its 64 places, whatever stands there, so texts are padded to all of them and nothing is masked, as in training.
Its texts are lower-cased here: both SigLIPs were trained so, and not every tokenizer that comes with SigLIP 2 does it.

Left out: an exact account of a text (relevance over its tokens), bfloat16.

Shapes: N texts, E embedding width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPTextModelWithProjection, SiglipTextModel

from saecore.schema import TEXTS, TEXTS_FILE
from saecore.storage import is_file, join_uri, read_bytes, read_parquet
from saecore.towers.clip import Halves, load_half
from saecore.towers.soundness import check_texts
from saecore.towers.tower import hash_of
from saecore.untrusted import read_json_file

DEMO_VOCABULARY = Path(__file__).parent.parent / "demo" / "vocabulary.txt"
"""The words of the drawn world: colours, shapes, textures, sizes, backgrounds."""


class Vocabulary(NamedTuple):
    """A file of words, one a line."""

    words: list[str]
    """In the file's order, each once, without blanks around it."""
    blank: int
    """Lines dropped since nothing is on them."""
    repeated: int
    """Lines dropped since their word came before."""


def read_vocabulary(uri: str, option: str = "--text") -> Vocabulary:
    """UTF-8, one word or phrase a line, or `demo`; ValueError if there is no such file, or nothing in it."""
    lines = read_lines(uri, option)
    words = list(dict.fromkeys(line for line in lines if line))
    if not words:
        raise ValueError(f"{option} {uri} holds no words")
    blank = lines.count("")
    return Vocabulary(words, blank, len(lines) - blank - len(words))


def read_lines(uri: str, option: str = "--text") -> list[str]:
    """Every line of such a file, without blanks around it; `option` is what the user gave it by, for the error."""
    file = str(DEMO_VOCABULARY) if uri == "demo" else uri
    try:
        lines = read_bytes(file).decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(f"{option} {uri} cannot be read: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option} {uri} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}"
        ) from error
    if lines[-1] == "":  # what follows the last line's end is no line
        lines.pop()
    return [line.strip() for line in lines]


class Texts(NamedTuple):
    """What `jobs.embed --text` left."""

    words: list[str]
    embeddings: np.ndarray
    """float32 (words, E)."""
    clip_sha256: str
    """What `TextTower.sha256` begins with; empty in a file that was made otherwise."""


def read_texts(folder: str) -> Texts:
    """Words and their embeddings in that folder; ValueError if there are none."""
    file = join_uri(folder, TEXTS_FILE)
    if not is_file(file):
        raise ValueError(f"--texts {folder}: no {TEXTS_FILE} there, as jobs.embed --text writes it")
    try:
        table = read_parquet(file, TEXTS.names)
        table = table.cast(TEXTS.with_metadata(table.schema.metadata))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"--texts {folder}: {TEXTS_FILE} cannot be read: {' '.join(str(error).split())}") from error
    widths = pc.list_value_length(table["embedding"]).unique().to_pylist()
    embeddings = table["embedding"].combine_chunks().flatten().to_numpy().copy()  # PyTorch wants it writable
    if len(widths) != 1 or not widths[0] or not np.isfinite(embeddings).all():
        raise ValueError(f"--texts {folder}: {TEXTS_FILE} holds no vectors, of unequal widths, or not finite ones")
    digest = (table.schema.metadata or {}).get(b"clip_sha256", b"").decode()
    return Texts(table["word"].to_pylist(), embeddings.reshape(table.num_rows, -1), digest)


class TextTower(torch.nn.Module):
    """The text side of a CLIP or SigLIP model: texts in, embeddings out."""

    def __init__(self, model: CLIPTextModelWithProjection | SiglipTextModel, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        config = model.config
        self.siglip = config.model_type == "siglip_text_model"
        # Not the tokenizer's own limit, which some checkpoints leave out and others have larger.
        self.n_tokens: int = config.max_position_embeddings
        self.n_outputs: int = config.projection_size if self.siglip else config.projection_dim

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts -> float32 (N, E), not L2-normalised. What is longer than the tower is cut by the tokenizer."""
        tokens = self.tokens(
            texts,
            padding="max_length" if self.siglip else True,
            truncation=True,
            max_length=self.n_tokens,
            return_tensors="pt",
        ).to(self.model.device)
        if self.siglip:
            embeds = self.model(tokens["input_ids"]).pooler_output
        else:
            embeds = self.model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).text_embeds
        assert isinstance(embeds, torch.Tensor)
        return embeds

    def too_long(self, texts: Sequence[str]) -> int:
        """How many texts are cut."""
        return sum(len(ids) > self.n_tokens for ids in self.tokens(texts, verbose=False)["input_ids"])

    def tokens(self, texts: Sequence[str], **how: Any) -> Any:
        """What the tokenizer makes of texts, with `input_ids` in it; `how` are its own options."""
        return self.tokenizer([text.lower() if self.siglip else text for text in texts], **how)

    def sha256(self) -> str:
        """Hash of everything that changes an embedding: weights, configuration, the tokenizer's vocabulary."""
        config = self.model.config
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        described = (
            config.num_attention_heads,
            config.layer_norm_eps,
            config.hidden_act,
            config.eos_token_id,
            vocabulary,
        )
        return hash_of(described, self.model)


def load_text_tower(model_id: str, revision: str | None = None) -> TextTower:
    """The text tower of a Hub id, a local directory, or `demo`; errors as `saecore.towers.clip.load_tower`'s."""
    halves: Halves[TextTower] = {
        "clip": (CLIPTextModelWithProjection, TextTower),
        "siglip": (SiglipTextModel, TextTower),
    }
    return load_half(halves, _load_tokenizer, check_texts, model_id, revision)


def _load_tokenizer(folder: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of transformers, of JSON, and of a library that raises Exception itself
        for name in ("tokenizer_config.json", "tokenizer.json"):
            if Path(folder, name).is_file():
                read_json_file(Path(folder, name))  # which one it is, where one is not JSON
        raise ValueError(f"its tokenizer cannot be loaded ({type(error).__name__}: {error})") from error


def embed_texts(tower: TextTower, texts: Sequence[str], batch_size: int = 64, device: str = "cpu") -> np.ndarray:
    """float32 (N, E), not L2-normalised."""
    tower = tower.to(device)
    with torch.inference_mode():
        parts = [tower(texts[start : start + batch_size]).cpu().numpy() for start in range(0, len(texts), batch_size)]
    return np.concatenate([np.zeros((0, tower.n_outputs), np.float32), *parts])


def embed_words(
    tower: TextTower, words: Sequence[str], templates: Sequence[str], batch_size: int = 64, device: str = "cpu"
) -> np.ndarray:
    """float32 (N, E): one template's embeddings as they are; of several, the mean of each one's L2-normalised embeddings.

    That mean is not normalised again: a word whose templates disagree has a shorter one.
    """
    # replace, not format: a word may hold braces.
    found = [embed_texts(tower, [t.replace("{}", word) for word in words], batch_size, device) for t in templates]
    if len(found) == 1:
        return found[0]
    return normalize(torch.from_numpy(np.stack(found)), dim=-1).mean(0).numpy()
