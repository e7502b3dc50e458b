"""What describes an SAE besides its tensors: the form to which every other format is converted, and which config.json holds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from saecore.sae import sites
from saecore.spellings import Model
from saecore.untrusted import about, number, shown, whole

CHOICES = {
    "architecture": ("relu", "topk", "batchtopk", "jumprelu"),
    "output": ("relu", "signed", "absolute"),
    "normalise": ("none", "layer_norm", "constant_norm"),
    "nesting": ("none", "levels", "prefixes"),
}

KINDS: dict[Any, tuple[type, str]] = {
    str: (str, "a text"),
    bool: (bool, "true or false"),
    tuple[int, ...]: (tuple, "a list"),
}
"""For each type of a field, the class of its values and the words for it. Numbers have ranges too, and are checked apart."""

MOST_INPUTS = 2**20
"""No embedding is wider. With 32-bit ids of latents, no size of a tensor overflows before it is compared with a file's."""


CARD = """---
{{ card_data }}
---

# Sparse autoencoder on CLIP

{{ description }}

```python
from saecore.sae.checkpoints import load_sae

sae = load_sae("hf://OWNER/REPOSITORY")   # or a local folder
code = sae.encode_sparse(vectors)         # of its site, as CLIP makes them: what the site asks for is done inside
code.latents, code.activations            # the latents that fire for each vector, strongest first, and how strongly
```

Made with Relevance Map SAE. `config.json` describes it, `sae.safetensors` holds its tensors, the mean and the scale of the
vectors included.
"""
"""The model card of a saved SAE."""


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """What the tensors alone do not say."""

    n_inputs: int
    """Width of what it reads: of the CLIP embedding, where that is its site."""
    n_latents: int
    """Number of latents."""
    k: int = 0
    """How many latents may fire for one image (topk), or fire on average (batchtopk, where known); 0 where neither applies."""
    architecture: str = "topk"
    """Which latents fire: relu, topk, batchtopk or jumprelu."""
    output: str = "relu"
    """What a latent that fires gives: `relu` max(p, 0), `signed` p, `absolute` |p|."""
    by_magnitude: bool = False
    """Whether latents compete, or reach their threshold, by |p| instead of p."""
    normalise: str = "none"
    """N: `none`, `layer_norm` (each sample to mean 0 and standard deviation 1) or `constant_norm` (to length sqrt(d))."""
    soft_cap: float = 0.0
    """C; 0 is none."""
    tied: bool = False
    """Whether D = E'."""
    nesting: str = "none"
    """Matryoshka training: nested `levels` of k, or nested `prefixes` of the dictionary."""
    nested: tuple[int, ...] = ()
    """The levels or prefixes, smallest first."""
    source: str = ""
    """Where the weights come from: a training command, or a foreign file and its format."""
    site: str = "embedding"
    """Where it reads, in the text form of `saecore.sae.sites`; empty where a file does not say."""
    model: str = ""
    """The model that it was trained on, as its file names it; empty where it does not."""
    model_sha256: str = ""
    """What that model's `ImageTower.sha256` begins with; empty where it is not known."""

    def __post_init__(self) -> None:
        nested: Any = self.nested
        if isinstance(nested, list):  # JSON knows lists only
            object.__setattr__(self, "nested", tuple(nested))
        self._check_types()
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"SAE {field} {getattr(self, field)!r} is not supported; supported: {', '.join(choices)}"
                )
        if self.site:
            sites.parse(self.site)
        least = 1 if self.architecture == "topk" else 0
        whole(self.n_inputs, "SAE n_inputs", most=MOST_INPUTS)
        whole(self.n_latents, "SAE n_latents")
        whole(self.k, "SAE k", least=0)
        if not least <= self.k <= self.n_latents:
            raise ValueError(f"an SAE of {self.n_latents} latents cannot let k = {self.k} of them fire")
        if number(self.soft_cap, "SAE soft_cap") < 0:
            raise ValueError(f"SAE soft_cap is {self.soft_cap}, expected a positive number, or 0 for none")
        for level in self.nested:
            whole(level, "a level of SAE nested", most=self.n_latents)
        if sorted(set(self.nested)) != list(self.nested):
            raise ValueError(f"SAE nested {self.nested} does not ascend")
        if self.by_magnitude and self.output == "relu" and self.architecture in ("relu", "topk"):
            raise ValueError(
                f"a {self.architecture} SAE that selects by magnitude gives signed or absolute activations"
            )

    def _check_types(self) -> None:
        """To Python a file's `nested: "abc"` is three levels, and its `tied: "no"` is true."""
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), KINDS.get(field.type)
            if kind is not None and not isinstance(value, kind[0]):
                raise ValueError(f"SAE {field.name} is {shown(value)}, expected {kind[1]}")

    @property
    def unit_length(self) -> bool:
        """Whether its inputs are brought to length 1 first."""
        return sites.parse(self.site).first == "l2"

    @property
    def most_firing(self) -> int:
        """How many latents can fire for one image, so that at most as many can be kept."""
        return self.k if self.architecture == "topk" else self.n_latents

    @property
    def trained_on(self) -> Model:
        """The model that it was trained on, as far as it is known."""
        return Model(self.model, self.model_sha256)

    def in_words(self) -> str:
        """What the card of an SAE says of it: its size, which latents fire, where it reads, where it comes from."""
        is_embedding = self.site.startswith("embedding")
        one = "a token" if self.site and sites.reads_tokens(self.site) else "an image"
        firing = {
            "topk": f", {self.k} of them may fire for {one}",
            "batchtopk": f", about {self.k} of them fire for {one}",
        }
        vectors = "embeddings" if is_embedding else "vectors"
        words = [f"{self.n_latents:,} latents on {vectors} of width {self.n_inputs}, architecture {self.architecture}"]
        words[0] += firing.get(self.architecture, "") + "."
        words.append(f"Site: `{self.site}`" + (f" of `{self.model}`." if self.model else "."))
        if self.nesting != "none":
            words.append(f"Trained at nested {self.nesting} ({', '.join(map(str, self.nested))}).")
        if self.source:
            words.append(f"Weights: `{self.source}`.")
        return " ".join(words)


def from_fields(fields: Mapping[str, Any], where: str) -> SAEConfig:
    """A config from what a file says; ValueError, which names the file, for a field too many, one too few, or a wrong value."""
    with about(where):
        try:
            return SAEConfig(**fields)
        except TypeError as error:  # Python's own sentence names the field
            raise ValueError(f"does not hold the fields of an SAEConfig: {error}") from error
