"""Where an SAE reads: its `site`, and the text form in which people type it and files hold it.

    embedding                    the image embedding as the tower gives it
    embedding:l2                 the same, each vector brought to length 1 first
    layer10.residual:patches     the residual stream after layer 10, on the patch tokens
    layer3.mlp:cls               what the MLP of layer 3 adds to it, on the CLS token

    SITE = embedding[:l2]  or  layerN[.residual|.mlp][:cls|:patches|:all][:l2|:mean]

Layers count from 0, as in `encoder.layers[N]` of transformers and `blocks.N` of hook names. `l2` and `mean` say what is done to
the input before the SAE sees it: each vector to length 1, or the mean over these tokens, one vector for an image. Some files
say less than all of it, so the middle parts may be missing: a layer without its part, a part without its tokens.

SAEs run on the embedding, and on the residual stream after a layer: of CLS, of the patches, or of all tokens. Left out:
attention outputs, heads, the stream in the middle of a layer.
"""

import dataclasses
import re

PARTS = ("residual", "mlp")
TOKENS = ("cls", "patches", "all")
FIRST = ("l2", "mean")

POOLS = ("max", "mean", "sum", "cls")
"""How what an SAE makes of an image's tokens becomes one value, see `saecore.relevance.pooling`; `cls` of all tokens only."""

GRAMMAR = "embedding[:l2] or layerN[.residual|.mlp][:cls|:patches|:all][:l2|:mean]"

EXAMPLES = "embedding, embedding:l2, layer10.residual:patches"

_FORM = re.compile(
    r"(?:embedding|layer(?P<layer>0|[1-9]\d{0,3})(?:\.(?P<part>residual|mlp))?(?::(?P<tokens>cls|patches|all))?)"
    r"(?::(?P<first>l2|mean))?"
)


@dataclasses.dataclass(frozen=True)
class Site:
    """Where an SAE reads; `str()` of it is its text form, and `parse` reads that."""

    layer: int | None = None
    """Counted from 0; None is the embedding."""
    part: str = ""
    """`residual`, the stream after the layer, or `mlp`, what its MLP adds; empty as `tokens` may be."""
    tokens: str = ""
    """`cls`, `patches` or `all`; empty of the embedding, and where a file does not say."""
    first: str = ""
    """What is done to the input first: nothing, `l2` or `mean`."""

    def __post_init__(self) -> None:
        if _FORM.fullmatch(str(self)) is None or (self.layer is None and (self.part or self.tokens)):
            raise ValueError(f"no site is {self.layer, self.part, self.tokens, self.first}; a site is {GRAMMAR}")
        if self.layer is None and self.first == "mean":
            raise ValueError(f"{str(self)!r} is no site: an embedding has no tokens to take the mean of")

    def __str__(self) -> str:
        place = "embedding" if self.layer is None else f"layer{self.layer}" + (f".{self.part}" if self.part else "")
        return ":".join([place, *filter(None, (self.tokens, self.first))])

    def admits(self, other: "Site") -> bool:
        """Whether `other` says what this one says, and perhaps more. Of the embedding there is no more to say."""
        if self.layer is None:
            return self == other
        return self.layer == other.layer and all(
            getattr(self, field) in ("", getattr(other, field)) for field in ("part", "tokens", "first")
        )


EMBEDDING = Site()


def parse(text: str) -> Site:
    """The site that a text names; ValueError shows the grammar."""
    match = _FORM.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is no site; a site is {GRAMMAR}")
    layer, part, tokens, first = match.group("layer", "part", "tokens", "first")
    return Site(None if layer is None else int(layer), part or "", tokens or "", first or "")


# ---- What is done with them.


def settled(said: str, given: str) -> str:
    """The site of an SAE whose file says `said` and whose user says `given`, either of which may be empty.

    ValueError if neither says it, or if the two contradict each other.
    """
    if not given:
        if said:
            return said
        raise ValueError(
            "its file does not say where the SAE reads, and its width cannot tell; give its site, which is "
            f"{GRAMMAR}, for example {EXAMPLES}"
        )
    wanted = parse(given)
    if said and not parse(said).admits(wanted):
        raise ValueError(f"its file says that the SAE reads {said}, which is not the same as the given site {given}")
    return str(wanted)


def check_runs(site: str, model: str) -> None:
    """ValueError for an SAE that reads where none can run yet, or whose site is not told in full."""
    at = parse(site)
    if at.layer is None or (at.part == "residual" and at.tokens and at.first != "mean"):
        return
    raise ValueError(
        f"it reads {site}{_of(model)}, inside the tower; SAEs run where they read the image embedding (site embedding or "
        "embedding:l2), or the residual stream after a layer, of CLS, of the patches or of all tokens (such as "
        "layer10.residual:cls or layer10.residual:patches)"
    )


def reads_tokens(site: str) -> bool:
    """Whether an SAE there reads several tokens of an image, each by itself, so that their values must be pooled."""
    return parse(site).tokens in ("patches", "all")


def check_pool(pool: str, tokens: str) -> None:
    """ValueError unless `pool` says how the tokens of a site become one value, or is empty where the site reads none."""
    if tokens not in ("patches", "all"):
        if pool:
            raise ValueError(f"pool {pool}: the SAE reads one vector for each image, so there is nothing to pool")
        return
    choices = POOLS if tokens == "all" else POOLS[:-1]
    if pool not in choices:
        given = f"pool {pool!r}" if pool else "pool"
        raise ValueError(
            f"{given}: the SAE reads {tokens} tokens, and one value of each image must be made of them; must be one of "
            f"{', '.join(choices)}"
        )


def check_vectors(site: str) -> None:
    """ValueError for a site whose vectors cannot be written to train on."""
    at = parse(site)
    if at.first == "l2":
        raise ValueError(
            f"{site}: vectors are written at their own length; an SAE that is to see them all at one length is trained with "
            "normalise constant_norm"
        )
    if at.first:
        raise ValueError(f"{site}: the vectors of tokens are written one by one, and no means over them")
    if at.layer is not None and (at.part != "residual" or not at.tokens):
        raise ValueError(
            f"{site}: vectors are written of the embedding, and of the residual stream after a layer, of cls, patches or all "
            "tokens (such as layer10.residual:patches)"
        )


def check_reads(site: str, model: str, at: str) -> None:
    """ValueError for an SAE that reads elsewhere than `at`, the site of the vectors that it is to be given."""
    reads, given = parse(site), parse(at)
    if given.layer is None:
        check_embedding(site, model)
    elif reads not in (given, dataclasses.replace(given, first="l2")):
        raise ValueError(f"it reads {site}{_of(model)}, and these are vectors of {at}")


def check_embedding(site: str, model: str) -> None:
    """ValueError for an SAE that reads inside the tower, where it takes one that reads the image embedding."""
    if parse(site).layer is not None:
        raise ValueError(
            f"it reads {site}{_of(model)}, inside the tower; this takes SAEs that read the image embedding only (site "
            "embedding or embedding:l2)"
        )


def _of(model: str) -> str:
    return f" of {model}" if model else ""
