"""Other people's SAEs: files made here in the published form, against each format's own rule in plain NumPy.

Each `write_...` returns the address and what that format computes of some embeddings: activations, reconstruction. What its
files say of the site is in the examples as it is in published files.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from saecore.sae.checkpoints import load_sae
from saecore.sae.model import SAE

D, N, K = 12, 40, 5
DATACOMP = "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K"
Computed = tuple[np.ndarray, np.ndarray]
Written = tuple[Path, Computed]


def embeddings() -> np.ndarray:
    return np.random.default_rng(0).normal(0.7, 1.3, (9, D))


def weights() -> dict[str, np.ndarray]:
    """Weights in which biases matter and decoder rows have different norms."""
    random = np.random.default_rng(1)
    w = {"E": random.normal(0, 0.5, (D, N)), "D": random.normal(0, 0.5, (N, D))}
    return w | {"c": random.normal(0, 0.5, N), "b": random.normal(0, 0.5, D)}


def tensors(**arrays: Any) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(np.asarray(a), dtype=torch.float32).contiguous() for name, a in arrays.items()}


def relu(p: np.ndarray) -> np.ndarray:
    return np.maximum(p, 0)


def top(p: np.ndarray, k: int = K) -> np.ndarray:
    """1 at the k largest of each row."""
    return (p >= np.sort(p, axis=-1)[:, [-k]]).astype(float)


def load(path: Path) -> SAE:
    """The SAE there, told that it reads the embedding where its files do not say where."""
    try:
        return load_sae(str(path))
    except ValueError as error:
        if "does not say where" not in str(error):
            raise
        return load_sae(str(path), "embedding")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# ---- saev.


def write_saev(
    folder: Path, schema: int | None = 5, activation: str = "TopK", k: int = K, threshold: float = 0.6
) -> Written:
    w, x = weights(), embeddings()
    params = {} if activation == "Relu" else {"top_k": k, "key": "k", "aux": {"cls": "AuxK", "params": {}}}
    header: dict[str, Any] = {
        "schema": schema,
        "cfg": {"d_model": D, "d_sae": N, "activation": {"cls": activation, "params": params}},
        "commit": "unknown",
        "lib": "0.1.0",
    }
    if schema is None:
        header = {"d_vit": D // 2, "exp_factor": 4, "sparsity_coeff": 1e-4, "ghost_grads": False}
        w = {
            "E": w["E"][: D // 2, : 2 * D],
            "D": w["D"][: 2 * D, : D // 2],
            "c": w["c"][: 2 * D],
            "b": w["b"][: D // 2],
        }
        x = x[:, : D // 2]
    state = tensors(W_enc=w["E"], b_enc=w["c"], W_dec=w["D"], b_dec=w["b"])
    if activation == "BatchTopK":
        state["activation.threshold"] = torch.tensor(threshold)
    with (folder / "sae.pt").open("wb") as file:
        file.write((json.dumps(header) + "\n").encode())
        torch.save(state, file)
    p = (x - w["b"] if schema is None else x) @ w["E"] + w["c"]
    a = {"Relu": relu(p), "TopK": p * top(p, k), "BatchTopK": p * (p > np.float32(threshold))}[activation]
    return folder / "sae.pt", (a, a @ w["D"] + w["b"])


# ---- ViT-Prisma.


def write_prisma(folder: Path, activation: str = "relu", normalise: str = "none", **changes: Any) -> Written:
    w, x = weights(), embeddings()
    config = {
        "architecture": "standard",
        "d_in": D,
        "d_sae": N,
        "activation_fn_str": activation,
        "activation_fn_kwargs": {"k": K} if activation == "topk" else {},
        "normalize_activations": normalise,
        "dtype": {"__type__": "torch.dtype", "value": "torch.float32"},
        "model_name": DATACOMP,
        "hook_point_layer": 3,
        "layer_subtype": "hook_resid_post",
        "cls_token_only": False,
        "use_patches_only": True,
        "cached_activations_path": "activations/blocks.9.hook_mlp_out",  # of another layer, as published files have it
    }
    write_json(folder / "config.json", config | changes)
    torch.save(tensors(W_enc=w["E"], b_enc=w["c"], W_dec=w["D"], b_dec=w["b"]), folder / "n_images_2600058.pt")
    shift, spread_in, spread_out = normalisation(x, normalise)
    p = ((x - shift) / spread_in - w["b"]) @ w["E"] + w["c"]
    a = relu(p) * (top(p) if activation == "topk" else 1)
    return folder, (a, (a @ w["D"] + w["b"]) * spread_out + shift)


def normalisation(x: np.ndarray, name: str) -> tuple[Any, Any, Any]:
    if name == "layer_norm":
        spread = x.std(-1, ddof=1, keepdims=True)
        return x.mean(-1, keepdims=True), spread + 1e-5, spread
    if name == "constant_norm_rescale":
        spread = np.linalg.norm(x, axis=-1, keepdims=True) / D**0.5
        return 0, spread, spread
    return 0, 1, 1


# ---- dictionary_learning.


def write_dictionary(folder: Path, kind: str = "BatchTopKSAE", threshold: float = 0.6, **changes: Any) -> Written:
    w, x = weights(), embeddings()
    trainer: dict[str, Any] = {"dict_class": kind, "trainer_class": "Trainer", "activation_dim": D, "dict_size": N}
    trainer |= {"k": K, "layer": "", "lm_name": "", "submodule_name": ""}  # as sae-for-vlm writes them
    write_json(folder / "config.json", {"trainer": trainer | changes, "buffer": {"d_submodule": D}})
    p = (x - w["b"]) @ w["E"] + w["c"]
    linear = {"encoder.weight": w["E"].T, "encoder.bias": w["c"], "decoder.weight": w["D"].T}
    batch = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
    plain = tensors(W_enc=w["E"], b_enc=w["c"], W_dec=w["D"], b_dec=w["b"])
    if kind == "AutoEncoder":
        state, a = tensors(bias=w["b"], **linear), relu(p)
    elif kind == "AutoEncoderTopK":
        state, a = tensors(b_dec=w["b"], **linear) | batch, relu(p) * top(p)
    elif kind == "BatchTopKSAE":
        state, a = tensors(b_dec=w["b"], **linear) | batch, p * (relu(p) > np.float32(threshold))
    elif kind in ("MatryoshkaBatchTopKSAE", "MatroyshkaBatchTopKSAE"):
        state, a = plain | batch | {"group_sizes": torch.tensor([4, 6, 30])}, p * (relu(p) > np.float32(threshold))
    else:  # JumpReluAutoEncoder: no bias off the input, rows of norm 1
        w["D"] /= np.linalg.norm(w["D"], axis=-1, keepdims=True)
        th = np.linspace(-0.2, 1, N)
        state = plain | tensors(W_dec=w["D"], threshold=th)
        p = x @ w["E"] + w["c"]
        a = relu(p * (p > th))
    torch.save(state, folder / "ae.pt")
    return folder, (a, a @ w["D"] + w["b"])


# ---- SAELens.


def write_saelens(folder: Path, architecture: str = "topk", normalise: str = "none", **changes: Any) -> Written:
    w, x = weights(), embeddings()
    config = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": N,
        "k": K,
        "apply_b_dec_to_input": True,
        "normalize_activations": normalise,
        "metadata": {"sae_lens_version": "6.54.0", "hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2"},
    }
    config = {name: value for name, value in (config | changes).items() if value != "absent"}
    write_json(folder / "cfg.json", config)
    state = tensors(W_enc=w["E"], b_enc=w["c"], W_dec=w["D"], b_dec=w["b"])
    th = np.linspace(-0.2, 1, N)
    if architecture == "jumprelu":
        state["threshold"] = torch.tensor(th)  # in double precision, as it averages BatchTopK's
    safetensors.torch.save_file(state, folder / "sae_weights.safetensors")
    shift, spread_in, spread_out = normalisation(x, normalise)
    if normalise == "expected_average_only_in":
        write_json(folder / "activation_scaler.json", {"scaling_factor": 0.35})
        spread_in = spread_out = 1 / 0.35
    p = ((x - shift) / spread_in - w["b"] * config.get("apply_b_dec_to_input", True)) @ w["E"] + w["c"]
    norms = np.linalg.norm(w["D"], axis=-1) if config.get("rescale_acts_by_decoder_norm") else 1
    p = p * norms
    if architecture == "jumprelu":
        a = relu(p) * (p > th)
    else:
        a = relu(p) * (top(p) if "k" in config or "activation_fn_kwargs" in config else 1)
    return folder, (a, (a / norms @ w["D"] + w["b"]) * spread_out + shift)


# ---- sparsify, clipscope.


def write_sparsify(folder: Path, skip: float | None = None, **changes: Any) -> Written:
    w, x = weights(), embeddings()
    config = {"activation": "topk", "expansion_factor": 32, "num_latents": N, "k": K, "transcode": False, "d_in": D}
    write_json(folder / "cfg.json", config | changes)
    state = tensors(W_dec=w["D"], b_dec=w["b"]) | tensors(**{"encoder.weight": w["E"].T, "encoder.bias": w["c"]})
    if skip is not None:
        state["W_skip"] = torch.full((D, D), skip)
    safetensors.torch.save_file(state, folder / "sae.safetensors")
    p = relu((x - w["b"]) @ w["E"] + w["c"])
    a = p * top(p)
    return folder, (a, a @ w["D"] + w["b"])


def write_clipscope(folder: Path, k: int = K) -> Written:
    w, x = weights(), embeddings()
    content = {"n_features": N, "d_in": D, "k": k, "model_state_dict": tensors(enc=w["E"], dec=w["D"], pre_b=w["b"])}
    torch.save(content, folder / "1200013184.pt")
    p = (x - w["b"]) @ w["E"]
    a = p * top(p, k)  # no ReLU
    return folder / "1200013184.pt", (a, a @ w["D"] + w["b"])


# ---- SEM, DN-CBM, TopKSAE: on the final embedding.


def write_sem(folder: Path, name: str = f"MSAE_ViT-B-16_{D}_{N}_{K}x{2 * K}_reverse.pth") -> Written:
    w, x = weights(), embeddings()
    state = {"bpre": w["b"], "encoder.weight": w["E"].T, "encoder.bias": w["c"], "decoder.weight": w["D"].T}
    torch.save(tensors(**state), folder / name)
    p = (x - w["b"]) @ w["E"] + w["c"]
    a = relu(p * top(p))  # at the first level
    return folder / name, (a, a @ w["D"] + w["b"])


def write_dncbm(
    folder: Path, name: str = "clip_ViT-B_16_sparse_autoencoder_final.pt", components: int | None = 1, mark: str = "_"
) -> Written:
    w, x = weights(), embeddings()
    state = {f"encoder.{mark}weight": w["E"].T, f"encoder.{mark}bias": w["c"], f"decoder.{mark}weight": w["D"].T}
    state |= dict.fromkeys(
        ("tied_bias", "pre_encoder_bias._bias_reference", "post_decoder_bias._bias_reference"), w["b"]
    )
    if components is not None:
        state = {key: np.stack([array] * components) for key, array in state.items()}
    torch.save(tensors(**state), folder / name)
    a = relu((x - w["b"]) @ w["E"] + w["c"])
    return folder / name, (a, a @ w["D"] + w["b"])


def write_topk_sae(folder: Path, k: int = K, **changes: Any) -> Written:
    """As PyTorchModelHubMixin saves it: its arguments and its state, counters among them."""
    w, x = weights(), embeddings()
    config = {"input_dim": D, "hidden_dim": N, "k": k, "normalize_decoder": True, "decoder_bias": True} | changes
    write_json(folder / "config.json", config)
    state = tensors(W_enc=w["E"], b_enc=w["c"], W_dec=w["D"], feature_counts=np.ones(N))
    state["total_samples"] = torch.tensor(7)
    bias = w["b"] if config["decoder_bias"] else np.zeros(D)
    if config["decoder_bias"]:
        state |= tensors(b_dec=bias)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    p = x @ w["E"] + w["c"]
    a = p * top(p, k)  # no ReLU, and no bias off the input
    atoms = w["D"] / np.linalg.norm(w["D"], axis=-1, keepdims=True) if config["normalize_decoder"] else w["D"]
    return folder, (a, a @ atoms + bias)


CASES: dict[str, Callable[[Path], Written]] = {
    "saev topk": write_saev,
    "saev topk with negative activations": lambda folder: write_saev(folder, k=30),
    "saev relu": lambda folder: write_saev(folder, 2, "Relu"),
    "saev batchtopk": lambda folder: write_saev(folder, 5, "BatchTopK"),
    "saev before schemas": lambda folder: write_saev(folder, None, "Relu"),
    "prisma relu": write_prisma,
    "prisma topk": lambda folder: write_prisma(folder, "topk"),
    "prisma layer_norm": lambda folder: write_prisma(folder, "relu", "layer_norm"),
    "dictionary relu": lambda folder: write_dictionary(folder, "AutoEncoder"),
    "dictionary topk": lambda folder: write_dictionary(folder, "AutoEncoderTopK"),
    "dictionary batchtopk": write_dictionary,
    "dictionary matryoshka": lambda folder: write_dictionary(folder, "MatryoshkaBatchTopKSAE"),
    "dictionary matryoshka in its first spelling": lambda folder: write_dictionary(folder, "MatroyshkaBatchTopKSAE"),
    "dictionary jumprelu": lambda folder: write_dictionary(folder, "JumpReluAutoEncoder"),
    "saelens standard": lambda folder: write_saelens(folder, "standard", k="absent"),
    "saelens topk": write_saelens,
    "saelens topk before 6.0": lambda folder: write_saelens(
        folder, "standard", k="absent", activation_fn_str="topk", activation_fn_kwargs={"k": K}, metadata="absent"
    ),
    "saelens topk by norm": lambda folder: write_saelens(folder, rescale_acts_by_decoder_norm=True),
    "saelens jumprelu": lambda folder: write_saelens(folder, "jumprelu", apply_b_dec_to_input=False),
    "saelens layer_norm": lambda folder: write_saelens(folder, "jumprelu", "layer_norm"),
    "saelens constant_norm": lambda folder: write_saelens(folder, "topk", "constant_norm_rescale"),
    "saelens scaled": lambda folder: write_saelens(folder, "jumprelu", "expected_average_only_in"),
    "sparsify": write_sparsify,
    "sparsify with an idle skip": lambda folder: write_sparsify(folder, skip=0.0),
    "clipscope topk": write_clipscope,
    "clipscope topk with negative activations": lambda folder: write_clipscope(folder, k=30),
    "sem": write_sem,
    "dn-cbm": write_dncbm,
    "dn-cbm without components": lambda folder: write_dncbm(folder, components=None, mark=""),
    "topksae": write_topk_sae,
    "topksae with negative activations": lambda folder: write_topk_sae(folder, k=30),
    "topksae without bias": lambda folder: write_topk_sae(folder, decoder_bias=False, normalize_decoder=False),
}


@pytest.mark.parametrize("case", CASES)
def test_computes_what_its_own_code_computes(tmp_path: Path, case: str) -> None:
    path, (activations, reconstruction) = CASES[case](tmp_path)
    sae = load(path)
    x = torch.tensor(embeddings()[:, : sae.config.n_inputs], dtype=torch.float32)
    found = sae.encode_sparse(x).dense(sae.config.n_latents).numpy()
    np.testing.assert_array_equal(np.count_nonzero(found, axis=-1), np.count_nonzero(activations, axis=-1))  # L0
    np.testing.assert_allclose(found, activations, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.reconstruct(x).numpy(), reconstruction, rtol=1e-5, atol=1e-5)
    assert case.split()[0] in sae.config.source.lower()


def test_the_cases_differ_where_rules_do(tmp_path: Path) -> None:
    """Negative activations, thresholds and k must show in the examples, or the test above could not fail."""
    for name in ("saev topk", "saelens topk", "clipscope topk"):
        assert (np.count_nonzero(CASES[name](tmp_path)[1][0], axis=-1) == K).all()
    for name in ("saev", "clipscope"):
        found = CASES[f"{name} topk with negative activations"](tmp_path)[1][0]
        assert (found < 0).any()
    for name in ("saev batchtopk", "dictionary batchtopk", "saelens jumprelu"):
        counts = np.count_nonzero(CASES[name](tmp_path)[1][0], axis=-1)
        assert 0 < counts.min() < counts.max() < N


@pytest.mark.parametrize("kind", ["MatryoshkaBatchTopKSAE", "MatroyshkaBatchTopKSAE"])
def test_prefixes_are_the_sums_of_group_sizes(tmp_path: Path, kind: str) -> None:
    config = load(write_dictionary(tmp_path, kind)[0]).config
    assert (config.nesting, config.nested, config.k) == ("prefixes", (4, 10, 40), K)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_dictionary(folder, threshold=-1.0),
        lambda folder: write_dictionary(folder, "MatryoshkaBatchTopKSAE", threshold=-1.0),
        lambda folder: write_saev(folder, 5, "BatchTopK", threshold=0.0),
    ],
)
def test_a_threshold_never_calibrated_stays_unknown(tmp_path: Path, write: Callable[[Path], Written]) -> None:
    sae = load(write(tmp_path)[0])
    assert (sae.config.architecture, sae.config.k) == ("batchtopk", K)
    with pytest.raises(ValueError, match="no threshold"):
        sae.encode_sparse(torch.zeros(1, D))


WRONG: dict[str, tuple[Callable[[Path], Written], str]] = {
    "saev schema": (lambda folder: write_saev(folder, 1), "saev schema 1 is not supported; supported: none, 2"),
    "prisma gated": (lambda folder: write_prisma(folder, architecture="gated"), "'gated' is not supported"),
    "prisma function": (
        lambda folder: write_prisma(folder, activation_fn_str="leaky_relu"),
        "activation_fn_str 'leaky_relu' is not supported; supported: relu, topk",
    ),
    "prisma scale": (
        lambda folder: write_prisma(folder, normalize_activations="expected_average_only_in"),
        "'expected_average_only_in' is not supported",
    ),
    "prisma transcoder": (lambda folder: write_prisma(folder, is_transcoder=True), "found a transcoder"),
    "dictionary gated": (lambda folder: write_dictionary(folder, dict_class="GatedAutoEncoder"), "'GatedAutoEncoder'"),
    "dictionary k": (lambda folder: write_dictionary(folder, k=7), "says k = 7, .*ae.pt says 5"),
    "dictionary transposed": (
        lambda folder: write_dictionary(folder, activation_dim=N, dict_size=D),
        r"'b_dec': expected shape \(40,\), found \(12,\)",
    ),
    "dictionary mislabelled": (
        lambda folder: write_dictionary(folder, "AutoEncoderTopK", dict_class="AutoEncoder"),
        "'b_dec': expected no such tensor",
    ),
    "saelens gated": (lambda folder: write_saelens(folder, "gated"), "architecture 'gated' is not supported"),
    "saelens temporal": (lambda folder: write_saelens(folder, "temporal"), "architecture 'temporal'"),
    "saelens transcoder": (lambda folder: write_saelens(folder, "transcoder"), "architecture 'transcoder'"),
    "saelens hooks": (
        lambda folder: write_saelens(folder, metadata={"hook_name": "a", "hook_name_out": "b"}),
        "found one from a to b",
    ),
    "saelens width": (lambda folder: write_saelens(folder, d_in="absent"), "expected a value for 'd_in', found none"),
    "saelens shape": (
        lambda folder: write_saelens(folder, d_sae=41),
        r"'W_dec': expected shape \(41, 12\), found \(40, 12\)",
    ),
    "saelens lacks": (
        lambda folder: write_saelens(folder, "standard", activation_fn="topk", k="absent"),
        "expected a value for 'k'",
    ),
    "sparsify skip": (lambda folder: write_sparsify(folder, skip=0.1), "W_skip"),
    "sparsify transcoder": (lambda folder: write_sparsify(folder, transcode=True), "transcode"),
    "sparsify group-max": (lambda folder: write_sparsify(folder, activation="groupmax"), "'groupmax'"),
    "clipscope switch": (lambda folder: write_switch(folder), "'enc': expected shape"),
    "sem renamed": (lambda folder: write_sem(folder, "sem.pth"), "expected MSAE_MODEL_WIDTH_LATENTS_KxK"),
    "sem of another width": (
        lambda folder: write_sem(folder, f"MSAE_ViT-B-16_{D + 1}_{N}_5x10_reverse.pth"),
        r"'bpre': expected shape \(13,\), found \(12,\)",
    ),
    "dn-cbm of two components": (lambda folder: write_dncbm(folder, components=2), "expected one component, found 2"),
    "another model's folder": (
        lambda folder: write_topk_sae(folder, model_type="clip", input_dim=None),
        "expected a value for 'input_dim'",
    ),
    "prisma of cls and patches": (lambda folder: write_prisma(folder, cls_token_only=True), "found both set"),
    "prisma inside attention": (
        lambda folder: write_prisma(folder, layer_subtype="attn.hook_z"),
        r"says that its SAE reads 'blocks\.3\.attn\.hook_z', a place that has no name here",
    ),
    "sparsify of attention": (
        lambda folder: write_sparsify(made(folder / "layers.3.attention")),
        r"reads 'layers\.3\.attention', a place that has no name here",
    ),
}


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


# What each format's files say of the site and the model: the table in docs/saes.md.
SAID: dict[str, tuple[Callable[[Path], Written], str, str]] = {
    "saev": (write_saev, "", ""),
    "prisma on patches": (write_prisma, "layer3.residual:patches", DATACOMP),
    "prisma on cls": (
        lambda folder: write_prisma(
            folder, use_patches_only=False, cls_token_only=True, layer_subtype="hook_mlp_out", hook_point_layer=11
        ),
        "layer11.mlp:cls",
        DATACOMP,
    ),
    "prisma on all tokens": (
        lambda folder: write_prisma(folder, use_patches_only=False),
        "layer3.residual:all",
        DATACOMP,
    ),
    "prisma, old": (
        lambda folder: write_prisma(
            folder, hook_point="blocks.9.hook_mlp_out", layer_subtype=None, use_patches_only=None, cls_token_only=None
        ),
        "layer9.mlp:all",
        DATACOMP,
    ),
    "saelens": (write_saelens, "layer3.residual", "gpt2"),
    "saelens before 6.0": (
        lambda folder: write_saelens(folder, metadata="absent", hook_name="blocks.10.hook_resid_pre", model_name="m"),
        "layer9.residual",
        "m",
    ),
    "saelens before 3.0": (
        lambda folder: write_saelens(folder, metadata="absent", hook_point="blocks.10.hook_mlp_out"),
        "layer10.mlp",
        "",
    ),
    "saelens of an embedding": (
        lambda folder: write_saelens(folder, metadata={"hook_name": "embedding"}),
        "embedding",
        "",
    ),
    "saelens without a hook": (lambda folder: write_saelens(folder, metadata={}), "", ""),
    "dictionary as sae-for-vlm": (write_dictionary, "", ""),
    "dictionary": (
        lambda folder: write_dictionary(folder, layer=3, submodule_name="resid_post_layer_3", lm_name="some/model"),
        "layer3.residual",
        "some/model",
    ),
    "dictionary that names a layer alone": (lambda folder: write_dictionary(folder, layer=3), "layer3", ""),
    "sparsify": (lambda folder: write_sparsify(made(folder / "layers.3")), "layer3.residual", ""),
    "sparsify of an MLP": (lambda folder: write_sparsify(made(folder / "h.3.mlp")), "layer3.mlp", ""),
    "sparsify elsewhere": (lambda folder: write_sparsify(made(folder / "mine")), "", ""),
    "clipscope": (lambda folder: write_clipscope(made(folder / "22_resid")), "layer22.residual", ""),
    "clipscope elsewhere": (lambda folder: write_clipscope(made(folder / "mine")), "", ""),
    "sem": (write_sem, "embedding", "ViT-B-16"),
    "dn-cbm": (write_dncbm, "embedding", "ViT-B/16"),
    "dn-cbm that lost its name": (lambda folder: write_dncbm(folder, "sparse_autoencoder_final.pt"), "", ""),
    "topksae": (write_topk_sae, "", ""),
}


@pytest.mark.parametrize("case", SAID)
def test_the_site_is_what_the_files_say_and_never_guessed(tmp_path: Path, case: str) -> None:
    write, site, model = SAID[case]
    address = str(write(tmp_path)[0])
    if site:
        config = load_sae(address).config
        assert (config.site, config.model) == (site, model)
        assert load_sae(address, site).config == config
        with pytest.raises(
            ValueError, match=rf"the SAE reads {site}, which is not the same as the given site layer0\.mlp"
        ):
            load_sae(address, "layer0.mlp:cls")
    else:
        with pytest.raises(
            ValueError, match=r"does not say where .* for example embedding, .*, layer10\.residual:patches"
        ) as caught:
            load_sae(address)
        assert "\n" not in str(caught.value)
        for given in ("embedding:l2", "layer10.residual:patches"):
            assert load_sae(address, given).config.site == given


def test_what_a_file_leaves_open_may_be_said_but_not_denied(tmp_path: Path) -> None:
    address = str(write_saelens(tmp_path)[0])  # layer3.residual, on tokens that it does not say
    assert load_sae(address, "layer3.residual:patches:l2").config.site == "layer3.residual:patches:l2"
    for given in ("layer3.mlp", "layer4.residual:patches", "embedding"):
        with pytest.raises(ValueError, match=r"says that the SAE reads layer3\.residual, which is not the same"):
            load_sae(address, given)
    with pytest.raises(ValueError, match=r"'layer 3' is no site; a site is embedding\[:l2\] or layerN"):
        load_sae(address, "layer 3")
    embedding = str(write_sem(tmp_path)[0])
    with pytest.raises(ValueError, match="says that the SAE reads embedding, which is not the same"):
        load_sae(embedding, "embedding:l2")


def test_checkpoints_of_a_training_are_found(tmp_path: Path) -> None:
    """trainer_0/config.json, trainer_0/checkpoints/ae_100000.pt: as sae-for-vlm's scripts take them."""
    folder, (activations, _) = write_dictionary(made(tmp_path / "trainer_0"))
    (folder / "checkpoints").mkdir()
    file = (folder / "ae.pt").rename(folder / "checkpoints" / "ae_100000.pt")
    x = torch.tensor(embeddings(), dtype=torch.float32)
    for address in (folder, file):
        sae = load_sae(str(address), "embedding")
        np.testing.assert_allclose(
            sae.encode_sparse(x).dense(sae.config.n_latents).numpy(), activations, rtol=1e-5, atol=1e-5
        )
        assert sae.config.source == "dictionary_learning trainer_0"
    torch.save(torch.load(file, weights_only=True), folder / "checkpoints" / "ae_200000.pt")
    assert load_sae(str(file), "embedding").config.k == K
    with pytest.raises(ValueError, match=r"expected one checkpoints/ae_.* found 2; give the file"):
        load_sae(str(folder), "embedding")
    torch.save(torch.load(file, weights_only=True), folder / "ae.pt")  # the end of training goes before what led to it
    assert load_sae(str(folder), "embedding").config.k == K


def write_switch(folder: Path) -> Written:
    """clipscope's mixture of experts: the same keys, one axis more."""
    path, computed = write_clipscope(folder)
    content = torch.load(path, weights_only=True)
    content["model_state_dict"]["enc"] = content["model_state_dict"]["enc"].reshape(2, D, N // 2)
    torch.save(content, path)
    return path, computed


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_supported_or_contradicts_itself_is_refused(tmp_path: Path, case: str) -> None:
    write, complaint = WRONG[case]
    path, _ = write(tmp_path)
    with pytest.raises(ValueError, match=complaint) as caught:
        load_sae(str(path))
    assert "\n" not in str(caught.value)


def test_jumprelu_with_decoder_norms_is_refused(tmp_path: Path) -> None:
    write_dictionary(tmp_path, "JumpReluAutoEncoder")
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    torch.save(state | {"W_dec": state["W_dec"] * 2}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="expected decoder rows of norm 1, found 2 to 2"):
        load_sae(str(tmp_path))


def test_a_scale_that_was_not_stored_is_refused(tmp_path: Path) -> None:
    write_saelens(tmp_path, "jumprelu", "expected_average_only_in")
    for content in ({"scaling_factor": None}, {}):
        write_json(tmp_path / "activation_scaler.json", content)
        with pytest.raises(ValueError, match=r"scaling factor .* found none"):
            load_sae(str(tmp_path))


def test_a_folder_that_could_be_two_is_refused(tmp_path: Path) -> None:
    write_saelens(tmp_path)
    write_sparsify(tmp_path)
    with pytest.raises(ValueError, match="found those of SAELens, sparsify"):
        load_sae(str(tmp_path))


def test_broken_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    write_saelens(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_sae(str(tmp_path))
    (tmp_path / "cfg.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"cfg.json holds a JSON list, expected an object"):
        load_sae(str(tmp_path))
    (tmp_path / "sae.pt").write_bytes(b"{'not': 'JSON'}\n")
    with pytest.raises(ValueError, match=r"the first line of sae\.pt is not JSON"):
        load_sae(str(tmp_path / "sae.pt"))


def test_a_checkpoint_on_the_hub_comes_with_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("saecore.hub.listing", lambda repository, revision: [])  # so that the Hub answers
    folder, _ = write_dictionary(made(tmp_path / "clip" / "trainer_0"))
    (folder / "checkpoints").mkdir()
    (folder / "ae.pt").rename(folder / "checkpoints" / "ae_5.pt")
    assert load_sae("hf://me/saes/clip/trainer_0/checkpoints/ae_5.pt", "embedding").config.k == K
    assert "clip/trainer_0/config.json" in asked[0]


def test_tied_biases_that_differ_are_refused(tmp_path: Path) -> None:
    path, _ = write_dncbm(tmp_path)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"tied_bias": state["tied_bias"] + 1}, path)
    with pytest.raises(ValueError, match="expected equal copies of tied_bias"):
        load_sae(str(path))


@pytest.mark.parametrize("write", [write_saev, write_prisma, write_dictionary, write_clipscope, write_dncbm])
def test_a_file_that_would_run_code_is_refused(tmp_path: Path, write: Callable[[Path], Written]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (tmp_path / "ran",))

    path, _ = write(tmp_path)
    (file,) = tmp_path.glob("*.pt")
    header = file.read_bytes().partition(b"\n")[0] + b"\n" if write is write_saev else b""
    with file.open("wb") as opened:
        opened.write(header)
        torch.save({"cfg": Evil(), "state_dict": {}}, opened)
    with pytest.raises(ValueError, match="cannot be read as a plain checkpoint"):
        load_sae(str(path))
    assert not (tmp_path / "ran").exists()
