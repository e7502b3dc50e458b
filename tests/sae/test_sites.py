"""A site's text form, hook names, and what is made of them."""

import dataclasses
import itertools
import re

import pytest

from saecore.sae import hooks, sites
from saecore.sae.config import SAEConfig
from saecore.sae.sites import EMBEDDING, Site, parse

ALL = [
    Site(),
    Site(first="l2"),
    *(
        Site(*fields)
        for fields in itertools.product((0, 7, 23), ("", *sites.PARTS), ("", *sites.TOKENS), ("", *sites.FIRST))
    ),
]


def test_every_site_is_printed_and_read_again() -> None:
    texts = [str(site) for site in ALL]
    assert [parse(text) for text in texts] == ALL
    assert len(set(texts)) == len(ALL) == 110
    assert {"embedding:l2", "layer7.residual:patches", "layer0.mlp:cls:mean", "layer23"} <= set(texts)


@pytest.mark.parametrize(
    "text",
    [
        *("", "layer", "layer-1", "layer01", "layer3.attn", "layer3:l2:cls", "embedding:cls", "embedding:mean"),
        *("layer3.residual:patches ", "Embedding", "layer3.residual:l2:l2", "layer3.residual\n", "layer99999"),
    ],
)
def test_what_is_no_site_is_refused_with_the_grammar(text: str) -> None:
    grammar = r" is no site; a site is embedding\[:l2\] or layerN\[\.residual"
    with pytest.raises(ValueError, match="no tokens to take the mean of" if text.endswith(":mean") else grammar):
        parse(text)
    if text:
        with pytest.raises(ValueError, match="site"):
            SAEConfig(n_inputs=4, n_latents=8, k=2, site=text)


@pytest.mark.parametrize(
    "fields",
    [{"part": "mlp"}, {"tokens": "cls"}, {"first": "mean"}, {"layer": -1}, {"layer": 3, "part": "attention"}],
)
def test_sites_that_cannot_be_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no site"):
        dataclasses.replace(EMBEDDING, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.10.hook_resid_post", "layer10.residual"),
        ("blocks.10.hook_resid_pre", "layer9.residual"),
        ("blocks.3.hook_mlp_out", "layer3.mlp"),
        ("vision_model.encoder.layers.3", "layer3.residual"),
        ("model.layers.17.output", "layer17.residual"),
        ("layers.0.mlp", "layer0.mlp"),
        ("resid_post_layer_3", "layer3.residual"),
        ("mlp_out_layer_3", "layer3.mlp"),
    ],
)
def test_hook_names_become_sites(name: str, site: str) -> None:
    assert hooks.of_hook(name, "a file") == site


@pytest.mark.parametrize(
    "name",
    [
        *("blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", "blocks.3.ln2.hook_normalized", "blocks.3.attn.hook_z"),
        *("ln_final.hook_normalized", "layers.0.attention", "attention_out_layer_3", "embed_tokens", "layer10"),
    ],
)
def test_places_without_a_name_here_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"a file says that its SAE reads '{name}', a place that has no name here"):
        hooks.of_hook(name, "a file")


@pytest.mark.parametrize(
    ("site", "runs"),
    [
        ("embedding", True),
        ("embedding:l2", True),
        ("layer10.residual:cls", True),
        ("layer0.residual:cls:l2", True),
        ("layer10.residual:cls:mean", False),
        ("layer10.residual:patches", True),
        ("layer10.residual:all:l2", True),
        ("layer10.residual:all:mean", False),
        ("layer10.residual", False),  # it does not say which tokens
        ("layer10:cls", False),
        ("layer10.mlp:cls", False),
    ],
)
def test_where_saes_run(site: str, runs: bool) -> None:
    if runs:
        sites.check_runs(site, "some/model")
        return
    with pytest.raises(ValueError, match=f"it reads {re.escape(site)} of some/model, inside the tower; SAEs run where"):
        sites.check_runs(site, "some/model")


@pytest.mark.parametrize(
    ("reads", "fits"),
    [
        ("layer3.residual:patches", True),
        ("layer3.residual:patches:l2", True),  # the SAE brings each to length 1 itself
        ("layer3.residual:patches:mean", False),  # one vector of an image, which none of these is
        ("layer3.residual:all", False),
        ("layer3.residual", False),
        ("layer2.residual:patches", False),
        ("embedding", False),
    ],
)
def test_which_vectors_an_sae_reads(reads: str, fits: bool) -> None:
    if fits:
        sites.check_reads(reads, "m", "layer3.residual:patches")
        return
    with pytest.raises(
        ValueError, match=f"it reads {re.escape(reads)} of m, and these are vectors of layer3.residual:pat"
    ):
        sites.check_reads(reads, "m", "layer3.residual:patches")


def test_what_takes_embeddings_only() -> None:
    sites.check_embedding("embedding", "")
    sites.check_embedding("embedding:l2", "")
    with pytest.raises(ValueError, match=r"it reads layer3\.mlp:cls of some/model, inside the tower; this takes"):
        sites.check_embedding("layer3.mlp:cls", "some/model")
