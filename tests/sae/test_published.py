"""Every published form of a vision SAE: a file of its true shape loads with its own site, or is refused in the right words.

The real files are not here. What is written has their names of folders, files, tensors and settings, and small sizes; the table
of docs/saes.md says the same of the releases. What each format computes is in `tests/sae/test_formats.py` and, for MSAE, in
`tests/sae/test_checkpoints.py`.
"""

import dataclasses
import gzip
import pickle
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch

from saecore.sae import sites
from saecore.sae.checkpoints import load_embedding_sae, load_sae
from tests import test_docs
from tests.sae import test_checkpoints as msae
from tests.sae import test_formats as foreign
from tests.sae.test_formats import D, K, N, made

L14 = "clip-vit-large-patch14-336"
LAION = foreign.DATACOMP


class Published(NamedTuple):
    """A file in the form of a release."""

    write: Callable[[Path], Path]
    """Folder to write into -> its address."""
    site: str
    """What the file and the names of its folders say; empty where they do not."""
    model: str
    kind: str = "topk"
    """Its architecture, in our word."""
    as_given: str = ""
    """The site that its user has to give, if the file does not say it in full."""


# ---- Writers: the layout of each release, around the files of `tests/sae/test_formats.py`.


def write_msae(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = made(folder / "ViT-L_14" / "not_centered") / name
        msae.write_msae(path)
        return path

    return write


def single(write: Callable[..., foreign.Written], name: str) -> Callable[[Path], Path]:
    return lambda folder: write(folder, name)[0]


def prisma(repository: str, **changes: Any) -> Callable[[Path], Path]:
    """A repository on the Hub, with the fields that published configs have besides those that are read."""
    wrapped = {"device": {"__type__": "torch.device", "value": "cuda"}, "lr": 0.0004, "expansion_factor": 64}
    settings = {"use_patches_only": False, "cls_token_only": False, "normalise": "layer_norm", **wrapped, **changes}
    return lambda folder: foreign.write_prisma(made(folder / repository), **settings)[0]


def vanilla(layer: int, hook: str = "hook_resid_post", **changes: Any) -> Callable[[Path], Path]:
    name = f"sparse-autoencoder-clip-b-32-sae-vanilla-x64-layer-{layer}-{hook}-l1-1e-05"
    return prisma(name, hook_point_layer=layer, layer_subtype=hook, **changes)


def for_vlm(place: str, kind: str = "BatchTopKSAE", data: str = "imagenet") -> Callable[[Path], Path]:
    """sae-for-vlm: its folder is called after the activations; of its checkpoints the one of step 100000 is used."""
    rule = {"BatchTopKSAE": "batch_top_k", "MatroyshkaBatchTopKSAE": "matroyshka_batch_top_k"}[kind]

    def write(folder: Path) -> Path:
        name = f"{data}_train_activations_{place}_{rule}_20_x64"
        trainer, _ = foreign.write_dictionary(made(folder / f"{rule}_20_x64" / name / "trainer_0"), kind)
        file = made(trainer / "checkpoints") / "ae_100000.pt"
        return (trainer / "ae.pt").rename(file)

    return write


def saev(*folders: str) -> Callable[[Path], Path]:
    return lambda folder: foreign.write_saev(made(folder.joinpath("osunlp", *folders)), 5, "Relu")[0]


def in_folder(write: Callable[..., foreign.Written], name: str, **changes: Any) -> Callable[[Path], Path]:
    return lambda folder: write(made(folder / name), **changes)[0]


def dncbm_elsewhere(folder: Path) -> Path:
    return foreign.write_dncbm(folder, "sparse_autoencoder_final.pt")[0]


READ: dict[str, Published] = {
    "MSAE": Published(write_msae(msae.NAME), "embedding", "ViT-L/14"),
    "MSAE relu": Published(write_msae(f"96_24_ReLU_003_False_False_0.0_{msae.DATA}"), "embedding", "ViT-L/14", "relu"),
    "SEM": Published(
        single(foreign.write_sem, f"MSAE_ViT-L-14_{D}_{N}_{K}x{2 * K}_reverse.pth"), "embedding", "ViT-L-14"
    ),
    "DN-CBM ViT": Published(
        single(foreign.write_dncbm, "clip_ViT-L_14_sparse_autoencoder_final.pt"), "embedding", "ViT-L/14", "relu"
    ),
    "DN-CBM ResNet": Published(
        single(foreign.write_dncbm, "clip_RN50_sparse_autoencoder_final.pt"), "embedding", "RN50", "relu"
    ),
    "DN-CBM renamed": Published(dncbm_elsewhere, "", "", "relu", "embedding"),
    "TopKSAE": Published(in_folder(foreign.write_topk_sae, "clip-topk-sae"), "", "", as_given="embedding:l2"),
    "sae-for-vlm post-projection": Published(for_vlm(f"{L14}_-1_post_projection"), "embedding", L14, "batchtopk"),
    "sae-for-vlm post-projection, iNaturalist": Published(
        for_vlm(f"{L14}_-1_post_projection", "MatroyshkaBatchTopKSAE", "inat"), "embedding", L14, "batchtopk"
    ),
    "sae-for-vlm layer": Published(
        for_vlm(f"{L14}_22_post_mlp_residual"), "layer22.residual", L14, "batchtopk", "layer22.residual:cls"
    ),
    "sae-for-vlm layer, Matryoshka": Published(
        for_vlm(f"{L14}_11_post_mlp_residual", "MatroyshkaBatchTopKSAE"),
        "layer11.residual",
        L14,
        "batchtopk",
        "layer11.residual:all",
    ),
    "sae-for-vlm SigLIP": Published(
        for_vlm("siglip-so400m-patch14-384_-1_post_projection"), "embedding", "siglip-so400m-patch14-384", "batchtopk"
    ),
    "sae-for-vlm renamed": Published(in_folder(foreign.write_dictionary, "mine"), "", "", "batchtopk", "embedding"),
    "ViT-Prisma all tokens": Published(vanilla(10), "layer10.residual:all", LAION, "relu"),
    "ViT-Prisma MLP": Published(vanilla(8, "hook_mlp_out"), "layer8.mlp:all", LAION, "relu"),
    "ViT-Prisma CLS": Published(vanilla(11, cls_token_only=True), "layer11.residual:cls", LAION, "relu"),
    "ViT-Prisma CLS TopK": Published(
        prisma(
            "sae-top_k-64-cls_only-layer_9-hook_resid_post",
            activation="topk",
            cls_token_only=True,
            hook_point_layer=9,
        ),
        "layer9.residual:cls",
        LAION,
    ),
    "ViT-Prisma patches": Published(vanilla(7, use_patches_only=True), "layer7.residual:patches", LAION, "relu"),
    "ViT-Prisma DINO": Published(
        prisma("dino-b-32", hook_point_layer=5, model_name="facebook/dino-vitb32"),
        "layer5.residual:all",
        "facebook/dino-vitb32",
        "relu",
    ),
    "saev of one SAE": Published(
        saev("SAE_CLIP_24K_ViT-B-16_IN1K"), "", "", "relu", as_given="layer10.residual:patches"
    ),
    "saev of many SAEs": Published(
        saev("SAE_DINOv3_ViT-L-16_IN1K", "layer_23", "lnleoyf6"),
        "layer23",
        "",
        "relu",
        as_given="layer23.residual:patches",
    ),
    "clipscope": Published(
        in_folder(foreign.write_clipscope, "22_resid"), "layer22.residual", "", as_given="layer22.residual:all"
    ),
    "SAELens": Published(
        in_folder(
            foreign.write_saelens,
            "sae_clip",
            metadata={"hook_name": "blocks.9.hook_resid_post", "model_name": "a/model"},
        ),
        "layer9.residual",
        "a/model",
        as_given="layer9.residual:all",
    ),
    "sparsify": Published(
        in_folder(foreign.write_sparsify, "layers.3.mlp"), "layer3.mlp", "", as_given="layer3.mlp:patches"
    ),
}


@pytest.mark.parametrize("case", READ)
def test_a_published_form_loads_with_its_site_and_its_model(tmp_path: Path, case: str) -> None:
    release = READ[case]
    address = str(release.write(tmp_path))
    if release.site:
        config = load_sae(address).config
        assert (config.site, config.model, config.architecture) == (release.site, release.model, release.kind)
    else:
        with pytest.raises(ValueError, match=r"its file does not say where the SAE reads, .* give its site"):
            load_sae(address)
    if release.as_given:
        config = load_sae(address, release.as_given).config
        assert (config.site, config.model, config.architecture) == (release.as_given, release.model, release.kind)


# ---- No file at a site that is not its own.

SITES = [
    *("embedding", "embedding:l2", "layer3", "layer23", "layer8.mlp", "layer11:cls", "layer9.residual"),
    *("layer3.mlp:patches", "layer3.residual:patches", "layer8.mlp:all", "layer8.residual:all", "layer9.residual:cls"),
    *("layer10.residual:patches", "layer10.residual:all", "layer11.residual:cls", "layer11.mlp:cls:mean"),
    *("layer22.residual:cls:l2", "layer22.residual:all", "layer23.residual:patches:mean"),
]


def completes(given: str, said: str) -> bool:
    """Whether a site says all that a file says, and perhaps more. Of the embedding there is no more to say."""
    return not said or given == said or (said != "embedding" and given.startswith((f"{said}.", f"{said}:")))


@pytest.mark.parametrize("case", READ)
def test_no_file_runs_at_a_site_that_is_not_its_own(tmp_path: Path, case: str) -> None:
    """Whatever site is given, what the file says holds. Its user may complete it, and must where it says nothing."""
    release = READ[case]
    address, said = str(release.write(tmp_path)), release.site
    for given in {*SITES, release.as_given or said}:
        if completes(given, said):
            assert load_sae(address, given).config.site == given
        else:
            with pytest.raises(ValueError, match=f"says that the SAE reads {said}, .* given site {given}$"):
                load_sae(address, given)


@pytest.mark.parametrize("case", [case for case, release in READ.items() if release.site.startswith("layer")])
def test_an_sae_of_a_layer_is_never_taken_for_one_of_the_embedding(tmp_path: Path, case: str) -> None:
    address = str(READ[case].write(tmp_path))
    for given in ("", *SITES):
        with pytest.raises(ValueError, match=r"inside the tower; this takes|the SAE reads layer"):
            load_embedding_sae(address, given)


@pytest.mark.parametrize("case", [case for case in READ if case.startswith(("clipscope", "saev", "sae-for-vlm"))])
def test_a_file_in_the_cache_of_the_hub_is_known_by_its_folder(tmp_path: Path, case: str) -> None:
    """There a file is a link to blobs/HASH, which has neither the name nor the folder that say where its SAE reads."""
    release = READ[case]
    repository = made(tmp_path / "models--someone--saes")
    address = release.write(made(repository / "snapshots" / "0123abc"))
    for number, file in enumerate([path for path in repository.rglob("*") if path.is_file()]):
        blob = repository / "blobs" / f"{number:040x}"
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        file.symlink_to(blob)
    assert load_sae(str(address), release.as_given).config.site == (release.as_given or release.site)
    if release.site:
        assert load_sae(str(address)).config.site == release.site


@pytest.mark.parametrize("case", ["clipscope", "saev of one SAE", "saev of many SAEs", "SEM", "DN-CBM ViT"])
def test_a_file_on_an_object_store_is_known_by_its_folder(store: Path, case: str) -> None:
    release = READ[case]
    address = f"s3://bucket/{release.write(store).relative_to(store).as_posix()}"
    if release.site:
        assert load_sae(address).config.site == release.site
        with pytest.raises(ValueError, match=f"says that the SAE reads {release.site}, "):
            load_sae(address, "layer4.residual:all")
    assert load_sae(address, release.as_given).config.site == (release.as_given or release.site)


def test_a_link_to_a_checkpoint_finds_its_config(tmp_path: Path) -> None:
    file = READ["sae-for-vlm layer"].write(tmp_path)
    link = made(tmp_path / "links") / file.name
    link.symlink_to(file)
    assert load_sae(str(link)).config.site == "layer22.residual"


# ---- What is refused.


@dataclasses.dataclass
class ViTSAERunnerConfig:
    """The class of the settings that PatchSAE, ConceptScope and HugoFry pickle."""

    model_name: str = "openai/clip-vit-base-patch16"
    block_layer: int = -2
    d_in: int = D


def pickled(module: str, name: str, save: Callable[[Any, Path], None]) -> Callable[[Path], Path]:
    """{"cfg": an object of that project's class, "state_dict": tensors}."""

    def write(folder: Path) -> Path:
        w = foreign.weights()
        state = foreign.tensors(W_enc=w["E"], b_enc=w["c"], W_dec=w["D"], b_dec=w["b"])
        packages = [".".join(module.split(".")[: n + 1]) for n in range(module.count(".") + 1)]
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # the project's module is here while its file is written, and then gone
            for package in packages:
                patch.setitem(sys.modules, package, types.ModuleType(package))
            patch.setattr(sys.modules[module], "ViTSAERunnerConfig", ViTSAERunnerConfig, raising=False)
            patch.setattr(ViTSAERunnerConfig, "__module__", module)
            save({"cfg": ViTSAERunnerConfig(), "state_dict": state}, folder / name)
        return folder / name

    return write


def zipped(content: Any, path: Path) -> None:
    with gzip.open(path, "wb") as file:
        pickle.dump(content, file)


def saved(name: str, content: Callable[[], Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(content(), folder / name)
        return folder / name

    return write


def remote_code(folder: Path) -> Path:
    """A model of transformers whose class is in a file of its repository; the names of its tensors are not known here."""
    folder = made(folder / "RA-SAE-DINOv2-32k")
    auto = {"AutoModel": "modeling_sae.SAE"}
    foreign.write_json(folder / "config.json", {"model_type": "sae", "auto_map": auto, "num_concepts": N, "top_k": K})
    (folder / "modeling_sae.py").write_text("raise SystemExit('this must not be run')\n")
    safetensors.torch.save_file({"dictionary": torch.ones(N, D)}, folder / "model.safetensors")
    return folder


NOT_OPENED = (
    r"cannot be read as a plain checkpoint: it holds {}, which is no tensor, and what could run code is not opened"
)
NO_FORMAT = r"not an MSAE checkpoint, nor a single file of another format that is read; if a config\.json"

REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "PatchSAE": (
        pickled("src.sae_training.config", "patchsae_checkpoint.pt", torch.save),
        NOT_OPENED.format(r"src\.sae_training\.config\.ViTSAERunnerConfig"),
    ),
    "ConceptScope": (
        pickled("src.sae_training.config", "clip-vit-large-patch14_-2_resid_32768.pt", torch.save),
        NOT_OPENED.format(r"src\.sae_training\.config\.ViTSAERunnerConfig"),
    ),
    "HugoFry": (
        pickled("sae_training.config", "final_sparse_autoencoder.pt", torch.save),
        NOT_OPENED.format(r"sae_training\.config\.ViTSAERunnerConfig"),
    ),
    "HugoFry in gzip": (
        pickled("sae_training.config", "final_sparse_autoencoder.pkl.gz", zipped),
        r"expected a folder with config\.json, or a \.pth or \.pt file",
    ),
    "settings as a dictionary": (
        saved("settings.pt", lambda: {"cfg": {"d_in": D}, "state_dict": {"W_enc": torch.ones(D, N)}}),
        NO_FORMAT,
    ),
    "lasgroup on GitHub": (
        saved("clip_sae_checkpoint.pt", lambda: {"config": {"k": K}, "model_state_dict": {"W_enc": torch.ones(D, N)}}),
        NO_FORMAT,
    ),
    "a state dict of no known form": (
        saved(
            "Layer8_epoch100_lr1e-05.pth", lambda: {"encoder.weight": torch.ones(N, D), "encoder.bias": torch.ones(N)}
        ),
        NO_FORMAT,
    ),
    "a whole module": (
        saved("overcomplete.pth", lambda: torch.nn.Linear(D, N)),
        NOT_OPENED.format(r"torch\.nn\.modules\.linear\.Linear"),
    ),
    "a model with code of its own": (remote_code, "expected input_dim, hidden_dim and k, which describe a TopKSAE"),
    "Prisma transcoder": (prisma("transcoder", is_transcoder=True), "expected an autoencoder, found a transcoder"),
    "sae-for-vlm at a place without a name": (
        in_folder(foreign.write_dictionary, "mine", submodule_name="attention_out_layer_3"),
        "'attention_out_layer_3', a place that has no name here",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_in_one_sentence_at_every_site(tmp_path: Path, case: str) -> None:
    write, sentence = REFUSED[case]
    address = write(tmp_path)
    for given in ("", *SITES):
        with pytest.raises(ValueError, match=sentence) as caught:
            load_sae(str(address), given)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(address))


# ---- The table.


FORMS = {
    "dictionary_learning": "sae-for-vlm",
    **{form: form for form in ("MSAE", "SEM", "DN-CBM", "TopKSAE", "ViT-Prisma", "SAELens", "saev", "clipscope")},
}
"""Formats in the table, and how the names of their cases above begin."""


def test_the_table_of_releases_says_what_is_tested_and_can_be() -> None:
    page = test_docs.ROOT / "docs" / "saes.md"
    head = ("release", "model", "site", "format", "runs here?")
    table = test_docs.rows(test_docs.section(page, "Published SAEs"), *head)
    assert {row[3] for row in table} > FORMS.keys()
    assert all(any(case.startswith(form) for case in READ) for form in FORMS.values())
    for release, _, site, form, runs in table:
        at = [sites.parse(text.replace("N", "10")) for text in re.findall("`([^`]+)`", site)]
        assert runs.startswith(("yes", "no: ", "not confirmed: ")), release
        if runs.startswith("yes"):
            assert form in FORMS, release
            assert [place.part == "mlp" for place in at] == [False], release
            assert ("pooled" in runs) == (at[0].tokens in ("patches", "all")), release
