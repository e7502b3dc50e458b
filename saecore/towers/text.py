"""Words -> text embeddings of CLIP or SigLIP, by the text tower of transformers, and by templates around the words.

The forward is transformers' own, in float32 everywhere: a vocabulary is small and embedded once. SigLIP's embedding is read
off the last of its 64 places, whatever stands there, so texts are padded to all of them and nothing is masked, as in training.
SigLIP's texts are lower-cased here: both SigLIPs were trained so, and not every tokenizer that comes with SigLIP 2 does it.

Left out: loading (`saecore.towers.loading`), an exact account of a text (relevance over its tokens), bfloat16.

Shapes: N texts, E embedding width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import CLIPTextModelWithProjection, SiglipTextModel

from saecore.towers.tower import hash_of


class TextTower(torch.nn.Module):
    """The text side of a CLIP or SigLIP model: texts in, embeddings out."""

    def __init__(self, model: CLIPTextModelWithProjection | SiglipTextModel, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        config = model.config
        self.siglip = config.model_type == "siglip_text_model"
        # Not the tokenizer's own limit: some checkpoints do not state it, and others state a larger one.
        self.n_tokens: int = config.max_position_embeddings
        self.n_outputs: int = config.projection_size if self.siglip else config.projection_dim

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts -> float32 (N, E), not L2-normalised. The tokenizer cuts texts that have more tokens than the tower."""
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
    by_template = [embed_texts(tower, [t.replace("{}", word) for word in words], batch_size, device) for t in templates]
    if len(by_template) == 1:
        return by_template[0]
    return normalize(torch.from_numpy(np.stack(by_template)), dim=-1).mean(0).numpy()
