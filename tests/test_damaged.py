"""Damaged and hostile model files: each ends in one sentence that names the file, soon, and nothing in them runs."""

import json
import os
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers import CLIPConfig, CLIPModel

from jobs import explain, measure, name
from saecore.hub import DEMO_CLIP
from saecore.images.preprocess import load_preprocess
from saecore.naming.vocabulary import read_texts
from saecore.pipeline.models import load_models
from saecore.sae.checkpoints import load_sae
from saecore.towers.loading import load_text_tower, load_tower
from tests.helpers.mistakes import mistake
from tests.helpers.towers import fill, random_sae
from tests.sae import test_checkpoints as msae
from tests.sae import test_formats as foreign

Damage = Callable[[Path], Path | None]
"""Makes a damaged model in an empty folder, or damages the one that is there; gives its address, if it is not the folder's."""

NAN, INF = float("nan"), float("inf")
DEEP = b"[" * 100_000
SOON = 20.0
"""Seconds. Each takes far less than one; a million layers took 60, and allocating what 1e9 inputs need 22."""


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP of a few kilobytes, with the embedded one's tokenizer and preprocessing."""
    folder = tmp_path_factory.mktemp("whole") / "clip"
    both = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 52, "max_position_embeddings": 40, "eos_token_id": 51, "bos_token_id": 2, "pad_token_id": 0}
    vision = {"image_size": 64, "patch_size": 16}
    config = CLIPConfig(
        text_config={**both, **text, "projection_dim": 24},
        vision_config={**both, **vision, "projection_dim": 24},
        projection_dim=24,
    )
    model = CLIPModel(config)
    fill(model)
    model.save_pretrained(folder)
    for file in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_CLIP / file, folder / file)
    return folder


def told(load: Callable[[str], Any], address: Path, names: str, complaint: str) -> None:
    """`load` refuses that address in one sentence, with the file's name and the complaint in it."""
    started = time.perf_counter()
    with pytest.raises(ValueError, match=complaint) as caught:
        load(str(address))
    assert time.perf_counter() - started < SOON
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    assert names in str(caught.value)
    assert len(str(caught.value)) < 1200


# ---- Ways of damaging.


def edit(file: str, **changes: Any) -> Damage:
    """A JSON file with other values: `vision_config__hidden_size=0` is the value inside the section; ... leaves it out."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for key, value in changes.items():
            *sections, last = key.split("__")
            section = content
            for one in sections:
                section = section[one]
            if value is ...:
                del section[last]
            else:
                section[last] = value
        (folder / file).write_text(json.dumps(content))

    return damage


def put(file: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes(content)

    return damage


def cut(file: str) -> Damage:
    def damage(folder: Path) -> None:
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[: len(whole) // 2])

    return damage


def header(content: Any, length: int | None = None) -> bytes:
    """A safetensors file of that header and four bytes; `length` is what it claims to be long."""
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + b"1234"


def one_tensor(**fields: Any) -> bytes:
    return header({"encoder": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}})


def weights(file: str, value: float, among: str = "") -> Damage:
    """All weights with that in their name are this number."""

    def damage(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / file)
        changed = {key: torch.full_like(t, value) if among in key else t for key, t in tensors.items()}
        assert any(among in key for key in tensors)
        safetensors.torch.save_file(changed, folder / file, {"format": "pt"})

    return damage


def together(folder: Path) -> None:
    """Each of them may be; a reconstruction would be 1e30 / 1e-14."""
    weights(SAE, 1e15, "coder")(folder)
    weights(SAE, 1e-14, "scale")(folder)


def integers(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "sae.safetensors")
    safetensors.torch.save_file(tensors | {"encoder": tensors["encoder"].long()}, folder / "sae.safetensors")


# ---- Our own folders.

SAE, CONFIG = "sae.safetensors", "config.json"
OWN: dict[str, tuple[Damage, str, str]] = {
    **{
        f"{field} {value!r}": (edit(CONFIG, **{field: value}), CONFIG, complaint)
        for field, value, complaint in [
            ("n_inputs", "128", "n_inputs is '128', expected a whole number"),
            ("n_inputs", -1, "n_inputs is -1"),
            ("n_inputs", 10**9, "n_inputs is 1000000000"),
            ("n_inputs", 24.0, "n_inputs is 24.0"),
            ("n_inputs", True, "n_inputs is True"),
            ("n_latents", None, "n_latents is None"),
            ("n_latents", 10**12, "n_latents is 1000000000000"),
            ("n_latents", 10**300, "n_latents is a number of more than 30 digits"),
            ("n_latents", ..., "n_latents"),
            ("k", 2.5, "k is 2.5"),
            ("k", NAN, "k is nan"),
            ("k", -1, "k is -1"),
            ("k", 97, "96 latents cannot let k = 97"),
            ("soft_cap", "x", "soft_cap is 'x', expected a finite number"),
            ("soft_cap", -1, "soft_cap is -1"),
            ("soft_cap", INF, "soft_cap is inf"),
            ("nested", "abc", "nested is 'abc', expected a list"),
            ("nested", 5, "nested is 5, expected a list"),
            ("nested", [4, "8"], "a level of SAE nested is '8'"),
            ("nested", [8, 4], r"nested \(8, 4\) does not ascend"),
            ("nested", [8, 97], "a level of SAE nested is 97"),
            ("tied", "no", "tied is 'no', expected true or false"),
            ("by_magnitude", 1, "by_magnitude is 1, expected true or false"),
            ("architecture", ["topk"], r"architecture is \['topk'\], expected a text"),
            ("source", 5, "source is 5, expected a text"),
        ]
    },
    **{
        f"config {content[:9]!r}": (put(CONFIG, content), CONFIG, complaint)
        for content, complaint in [
            (b"", "config.json is not JSON"),
            (b"hello", "config.json is not JSON"),
            (b"\xff\xfe\xff", "config.json is not JSON"),
            (DEEP, "nested too deeply"),
            (b"[]", "holds a JSON list"),
            (b"null", "holds a JSON NoneType"),
        ]
    },
    **{
        f"safetensors {what}": (put(SAE, content), SAE, "cannot be read as safetensors")
        for what, content in {
            "empty": b"",
            "short": b"abc",
            "that claim a header of 1e18 bytes": header({}, 10**18),
            "that claim a header of 1e6 bytes": header({}, 10**6),
            "whose header is a list": header([]),
            "of an unknown type": one_tensor(dtype="F99"),
            "of 1e14 numbers in 4 bytes": one_tensor(shape=[10**12, 128]),
            "of a shape that overflows": one_tensor(shape=[2**62, 4]),
            "of a negative shape": one_tensor(shape=[-1]),
            "beyond their file": one_tensor(data_offsets=[0, 400]),
        }.items()
    },
    "safetensors cut": (cut(SAE), SAE, "cannot be read as safetensors"),
    "integers": (integers, "encoder", "holds int64, expected floating-point numbers"),
    **{
        f"{among or 'all'} {value:g}": (weights(SAE, value, among), among, complaint)
        for among, value, complaint in [
            ("encoder", NAN, "not finite"),
            ("latent_bias", INF, "not finite"),
            ("encoder", 1e38, "whose products overflow"),
            ("decoder", -1e20, "whose products overflow"),
            ("", 1e38, "whose products overflow"),
            ("encoder", 0.0, "holds zeros only: every image would have the same latents"),
            ("decoder", 0.0, "holds zeros only: every image would have the same reconstruction"),
            ("scale", 0.0, "is 0, expected a positive number"),
            ("scale", -1.0, "is -1, expected a positive number"),
            ("scale", 1e-38, "is 1e-38, expected a positive number, at least 1e-15"),
            ("scale", NAN, "not finite"),
            ("", 0.0, "expected a positive number"),
            ("mean", 1e38, "whose products overflow"),
        ]
    },
    "10^6 inputs": (edit(CONFIG, n_inputs=10**6), "sae", r"expected shape \(96, 1000000\), found \(96, 24\)"),
    "2 10^9 latents": (
        edit(CONFIG, n_latents=2 * 10**9),
        "sae",
        r"expected shape \(2000000000, 24\), found \(96, 24\)",
    ),
    "values that overflow together": (
        together,
        "sae",
        "computes numbers that are not finite for an ordinary embedding",
    ),
}


@pytest.mark.parametrize("case", OWN)
def test_a_damaged_sae_of_ours(case: str, tmp_path: Path) -> None:
    damage, names, complaint = OWN[case]
    random_sae().save(tmp_path / "sae")
    load_sae(str(tmp_path / "sae"))
    damage(tmp_path / "sae")
    told(load_sae, tmp_path / "sae", names, complaint)


# ---- Other people's.


def checkpoint(**changes: Any) -> Damage:
    """An MSAE checkpoint whose content, or whose `model` where the name says so, differs."""

    def damage(folder: Path) -> Path:
        path = folder / msae.NAME
        content = msae.write_msae(path)
        for key, value in changes.items():
            section = content["model"] if key.startswith("model__") else content
            section[key.removeprefix("model__")] = value
        torch.save(content, path)
        return path

    return damage


def raw(content: bytes, file: str = msae.NAME) -> Damage:
    def damage(folder: Path) -> Path:
        (folder / file).write_bytes(content)
        return folder / file

    return damage


def compressed(folder: Path) -> Path:
    """200 kilobytes that torch would make 200 megabytes of, or a thousand times more."""
    path = folder / msae.NAME
    torch.save({"model": {"encoder": torch.zeros(1000)}}, folder / "whole")
    with zipfile.ZipFile(folder / "whole") as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as smaller:
        for entry in whole.infolist():
            smaller.writestr(entry.filename, whole.read(entry))
    return path


def evil(folder: Path) -> Path:
    torch.save({"model": Evil()}, folder / msae.NAME)
    return folder / msae.NAME


def beside(**spec: Any) -> Damage:
    """A specification beside an MSAE file."""

    def damage(folder: Path) -> Path:
        msae.write_msae(folder / msae.NAME)
        (folder / f"{msae.NAME}.json").write_text(json.dumps(spec))
        return folder / msae.NAME

    return damage


def half(folder: Path) -> Path:
    msae.write_msae(folder / msae.NAME)
    cut(msae.NAME)(folder)
    return folder / msae.NAME


def written(write: Callable[..., foreign.Written], *how: Any, **changes: Any) -> Damage:
    return lambda folder: write(folder, *how, **changes)[0]


def state(change: dict[str, Any], write: Callable[..., foreign.Written], file: str, *how: Any) -> Damage:
    """Other tensors in a foreign torch file."""

    def damage(folder: Path) -> Path:
        address = write(folder, *how)[0]
        torch.save(torch.load(folder / file, weights_only=True) | change, folder / file)
        return address

    return damage


def scaler(content: str) -> Damage:
    def damage(folder: Path) -> Path:
        address = foreign.write_saelens(folder, "jumprelu", "expected_average_only_in")[0]
        (folder / "activation_scaler.json").write_text(content)
        return address

    return damage


def first_line(**changes: Any) -> Damage:
    """A saev file whose header differs."""

    def damage(folder: Path) -> Path:
        path = foreign.write_saev(folder)[0]
        line, _, rest = path.read_bytes().partition(b"\n")
        content = json.loads(line)
        content["cfg"] = changes.pop("cfg", content["cfg"])
        if isinstance(content["cfg"], dict):
            content["cfg"] |= changes
        path.write_bytes(json.dumps(content).encode() + b"\n" + rest)
        return path

    return damage


PTH = msae.NAME
SMALL = torch.zeros(1)
FOREIGN: dict[str, tuple[Damage, str, str]] = {
    "an empty .pth": (raw(b""), PTH, r"damaged, or no file of torch.save \(EOFError\)"),
    "a text": (raw(b"hello"), PTH, "damaged, or no file of torch.save"),
    "zeros": (raw(bytes(100)), PTH, "damaged, or no file of torch.save"),
    "an empty zip": (raw(b"PK\x03\x04"), PTH, "damaged, or no file of torch.save"),
    "a brace": (raw(b"{"), PTH, "the first line of .* is not JSON"),
    "a compressed file": (compressed, PTH, "it is compressed, as torch.save never does"),
    "half a file": (half, PTH, "damaged, or no file of torch.save"),
    "a command": (evil, PTH, "it holds posix.system, which is no tensor, and what could run code is not opened"),
    "no model": (checkpoint(model=None), PTH, "model in .* is None, expected names with values"),
    "a text for a model": (checkpoint(model="x"), PTH, "model in .* is 'x', expected names with values"),
    "a text for a tensor": (checkpoint(model__encoder="x"), PTH, "'encoder' .* is 'x', expected a tensor"),
    "None for a tensor": (checkpoint(model__encoder=None), PTH, "'encoder' .* is None, expected a tensor"),
    "None for the mean": (checkpoint(mean_center=None), PTH, "'mean' .* is None, expected a tensor"),
    "a text for a threshold": (
        checkpoint(**{"model__activation.log_threshold": "x"}),
        PTH,
        "log_threshold to be a tensor",
    ),
    "a sparse tensor": (checkpoint(model__encoder=torch.zeros(24, 96).to_sparse()), PTH, "expected a plain one"),
    "a tensor without numbers": (checkpoint(model__encoder=torch.zeros(24, 96, device="meta")), PTH, "a plain one"),
    "a complex tensor": (checkpoint(model__encoder=torch.zeros(24, 96, dtype=torch.complex64)), PTH, "holds complex64"),
    "one number that claims to be many": (checkpoint(model__encoder=SMALL.expand(24, 96)), PTH, "claims 2,304 numbers"),
    "a million by a million": (checkpoint(model__encoder=SMALL.expand(10**6, 10**6)), PTH, "claims 1,000,000,000,000"),
    **{
        f"scaling_factor {value!r}": (checkpoint(scaling_factor=value), PTH, complaint)
        for value, complaint in [
            (NAN, "scaling_factor in .* is nan, expected a finite number"),
            (INF, "scaling_factor in .* is inf"),
            (0.0, "'scale' .* is 0, expected a positive number"),
            (-2.0, "'scale' .* is -2, expected a positive number"),
            (1e300, "not finite"),
            (None, "scaling_factor in .* is None"),
            ("abc", "scaling_factor in .* is 'abc'"),
            (torch.ones(3), r"scaling_factor in .* is an array of shape \(3,\)"),
        ]
    },
    "a specification of texts": (beside(n_inputs="24", n_latents=96, k=8), f"{PTH}.json", "n_inputs is '24'"),
    "a specification of nothing": (beside(), f"{PTH}.json", "does not hold the fields of an SAEConfig"),
    "a name of absurd sizes": (raw(b"", "96_24_TopKReLU_8_False_False_0.0.pt"), ".pt", "damaged"),
    "SAELens d_in float": (written(foreign.write_saelens, d_in=12.0), "n_inputs", "n_inputs is 12.0"),
    "SAELens d_in 1e12": (written(foreign.write_saelens, d_in=10**12), "sae_weights.safetensors", "expected shape"),
    "SAELens k 2.5": (written(foreign.write_saelens, k=2.5), "k", "k is 2.5"),
    "SAELens k text": (written(foreign.write_saelens, k="x"), "k", "k is 'x'"),
    "SAELens metadata text": (written(foreign.write_saelens, metadata="x"), "cfg.json", "metadata in .* is 'x'"),
    **{
        f"SAELens scaler {value}": (scaler(f'{{"scaling_factor": {value}}}'), "activation_scaler.json", "finite number")
        for value in ('"x"', "NaN", "[1]")
    },
    "SAELens scaler 0": (scaler('{"scaling_factor": 0}'), "scale", "is 0, expected a positive number"),
    "SAELens scaler empty": (scaler(""), "activation_scaler.json", "activation_scaler.json is not JSON"),
    "ViT-Prisma k -1": (
        written(foreign.write_prisma, activation_fn_str="topk", activation_fn_kwargs={"k": -1}),
        "k",
        "k is -1",
    ),
    "ViT-Prisma d_in text": (written(foreign.write_prisma, d_in="12"), "n_images", r"expected shape \(40, '12'\)"),
    **{
        f"dictionary_learning {field} {value!r}": (
            state({field: value}, foreign.write_dictionary, "ae.pt"),
            "ae.pt",
            complaint,
        )
        for field, value, complaint in [
            ("k", "x", "k is 'x', expected a whole number"),
            ("k", torch.ones(3), "k is an array"),
            ("threshold", "x", "threshold is 'x', expected a finite number"),
            ("threshold", None, "threshold is None"),
            ("threshold", torch.tensor(INF), "threshold is inf"),
            ("b_dec", "x", "'b_dec' is 'x', expected a tensor"),
        ]
    },
    **{
        f"dictionary_learning groups {value!r}": (
            state({"group_sizes": value}, foreign.write_dictionary, "ae.pt", "MatryoshkaBatchTopKSAE"),
            "ae.pt",
            "group_sizes is .*expected a",
        )
        for value in ("x", torch.tensor([4.5, 35.5]), torch.tensor([50, -10]), torch.tensor([]))
    },
    "clipscope state text": (
        state({"model_state_dict": "x"}, foreign.write_clipscope, "1200013184.pt"),
        "1200013184.pt",
        "is 'x', expected names",
    ),
    "clipscope n tensor": (
        state({"n_features": torch.tensor(40)}, foreign.write_clipscope, "1200013184.pt"),
        "1200013184.pt",
        "n_latents is an array",
    ),
    "sparsify latents float": (written(foreign.write_sparsify, num_latents=40.0), "n_latents", "n_latents is 40.0"),
    "sparsify factor text": (
        written(foreign.write_sparsify, num_latents=0, expansion_factor="x"),
        "cfg.json",
        "expansion_factor in .* is 'x'",
    ),
    "saev cfg text": (first_line(cfg="x"), "sae.pt", "expected a value for"),
    "saev d_sae 1e15": (first_line(d_sae=10**15), "sae.pt", "expected shape"),
    "saev d_sae null": (first_line(d_sae=None), "sae.pt", "expected shape"),
    "saev empty": (raw(b"", "sae.pt"), "sae.pt", "damaged, or no file of torch.save"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_damaged_sae_of_others(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    damage, names, complaint = FOREIGN[case]
    (tmp_path / "sae").mkdir()
    address = damage(tmp_path / "sae")
    assert address is not None
    told(load_sae, address, names, complaint)
    assert not Path("ran").exists()


# ---- CLIP: configuration, weights, preprocessing.


def pickled(content: Any) -> Damage:
    """Weights as torch saves them, and no others."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(content, folder / "pytorch_model.bin")

    return damage


def indexed(content: str) -> Damage:
    """Weights in parts, under that index."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(content)

    return damage


def without(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


MODEL, PREPROCESS = "model.safetensors", "preprocessor_config.json"
CLIPS: dict[str, tuple[Damage, str, str]] = {
    **{
        f"{field} {value!r}": (edit(CONFIG, **{field: value}), CONFIG, complaint)
        for field, value, complaint in [
            ("vision_config__hidden_size", 0, "hidden_size of vision_config in config.json is 0"),
            ("vision_config__hidden_size", "128", "hidden_size .* is '128'"),
            ("vision_config__hidden_size", None, "hidden_size"),
            ("vision_config__hidden_size", 10**9, r"of shape \(1000000000,\), model.safetensors holds .*\(16,\)"),
            ("vision_config__patch_size", 7, r"of shape \(16, 3, 7, 7\), model.safetensors holds .*\(16, 3, 16, 16\)"),
            ("vision_config__patch_size", 0, "patch_size .* is 0"),
            ("vision_config__patch_size", 1000, r"of shape \(16, 3, 1000, 1000\)"),
            ("vision_config__patch_size", [8, 8], "patch_size .* is"),
            ("vision_config__image_size", 10**9, "position_embedding"),
            ("vision_config__image_size", 80, r"of shape \(26, 16\)"),
            ("vision_config__num_hidden_layers", 10**6, "claims 1,000,000 layers, model.safetensors holds 2"),
            ("vision_config__num_hidden_layers", 1, "claims 1 layers, model.safetensors holds 2"),
            ("vision_config__num_hidden_layers", -1, "num_hidden_layers .* is -1"),
            ("vision_config__num_attention_heads", 0, "num_attention_heads .* is 0"),
            ("vision_config__num_attention_heads", 3, "not a multiple of the number of attention heads"),
            ("vision_config__intermediate_size", 10**9, r"of shape \(1000000000, 16\)"),
            ("vision_config__num_channels", 10**9, r"of shape \(16, 1000000000, 16, 16\)"),
            ("vision_config__hidden_act", "x", "hidden_act .* is 'x'"),
            ("vision_config__layer_norm_eps", NAN, "layer_norm_eps .* is nan"),
            ("vision_config__layer_norm_eps", -1.0, "layer_norm_eps .* is -1"),
            ("vision_config__projection_dim", "24", "projection_dim of vision_config in config.json is '24'"),
            ("vision_config", "x", "vision_config in config.json is 'x'"),
            ("vision_config", ..., "claims 12 layers, model.safetensors holds 2"),
            (
                "projection_dim",
                12,
                r"visual_projection.weight of shape \(12, 16\), model.safetensors holds .*\(24, 16\)",
            ),
            ("projection_dim", "x", "projection_dim of config.json is 'x'"),
            ("model_type", None, "model_type None"),
            ("model_type", ["clip"], r"model_type \['clip'\]"),
            ("model_type", "x", "describes a 'x' model"),
        ]
    },
    **{
        f"{file} {content[:9]!r}": (put(file, content), file, complaint)
        for file in (CONFIG, PREPROCESS)
        for content, complaint in [
            (b"", f"{file} is not JSON"),
            (b"\xff\xfe\xff", f"{file} is not JSON"),
            (DEEP, "nested too deeply"),
            (b"[]", f"{file} holds a JSON list"),
            (b"null", f"{file} holds a JSON NoneType"),
        ]
    },
    **{f"no {file}": (without(file), file, f"no {file}") for file in (CONFIG, PREPROCESS)},
    "no weights": (without(MODEL), MODEL, "no weights in .* expected model.safetensors or pytorch_model.bin"),
    "safetensors empty": (put(MODEL, b""), MODEL, "cannot be read as safetensors"),
    "safetensors cut": (cut(MODEL), MODEL, "cannot be read as safetensors"),
    "a header of 1e18 bytes": (put(MODEL, header({}, 10**18)), MODEL, "cannot be read as safetensors"),
    "a header that is a list": (put(MODEL, header([])), MODEL, "cannot be read as safetensors"),
    "other tensors": (put(MODEL, one_tensor()), MODEL, "claims 2 layers, model.safetensors holds 0"),
    **{
        f"{among or 'all'} {value:g}": (weights(MODEL, value, among), MODEL, complaint)
        for among, value, complaint in [
            ("vision_model", NAN, "not finite"),
            ("visual_projection", INF, "not finite"),
            ("", 1e38, "whose products overflow"),
            ("visual_projection", 0.0, "embeddings of a black and a random picture are the same"),
            ("patch_embedding", 0.0, "embeddings of a black and a random picture are the same"),
            ("", 0.0, "embeddings of a black and a random picture are the same"),
        ]
    },
    "pickled, empty": (pickled(b""), "pytorch_model.bin", "damaged, or no file of torch.save"),
    "pickled, a text": (pickled(b"hello"), "pytorch_model.bin", "damaged, or no file of torch.save"),
    "pickled, a list": (pickled([1]), "pytorch_model.bin", "holds a list"),
    "pickled, None": (pickled({"a": None}), "pytorch_model.bin", "'a' is None, expected a tensor"),
    "pickled, a command": (pickled({"a": Evil()}), "pytorch_model.bin", "it holds posix.system"),
    **{
        f"an index {content}": (indexed(content), "model.safetensors.index.json", complaint)
        for content, complaint in [
            ("", "is not JSON"),
            ("[]", "holds a JSON list"),
            ("{}", "weight_map in .* is None"),
            (
                '{"weight_map": {"a": "none.safetensors"}}',
                "names 'none.safetensors', expected a file in the same folder",
            ),
            (
                '{"weight_map": {"a": "../../../../etc/passwd"}}',
                "names '../../../../etc/passwd', expected a file in the same folder",
            ),
        ]
    },
    **{
        f"preprocess {field} {value!r}": (edit(PREPROCESS, **{field: value}), PREPROCESS, complaint)
        for field, value, complaint in [
            ("image_mean", "abc", "image_mean .* is 'abc', expected three numbers"),
            ("image_mean", ["a", "b", "c"], "image_mean .* is 'a', expected a finite number"),
            ("image_mean", 0.5, "image_mean .* is 0.5, expected three numbers"),
            ("image_mean", [NAN] * 3, "image_mean .* is nan"),
            ("image_mean", [10**400] * 3, "image_mean .* is a number of more than 30 digits"),
            ("image_std", [0, 0, 0], "image_std .* is 0, expected a number above 0"),
            ("image_std", [None, 1, 1], "image_std .* is None"),
            ("size", {"shortest_edge": -1}, "size .* is -1"),
            ("size", {"shortest_edge": 10**9}, "is refused"),
            ("size", {"shortest_edge": "64"}, "size .* is '64'"),
            ("size", {"shortest_edge": 64.5}, "size .* is 64.5"),
            ("crop_size", {"height": -1, "width": 64}, "crop_size .* is -1"),
            ("crop_size", {"height": 10**9, "width": 10**9}, "is refused"),
            ("crop_size", [1], r"crop_size .* is \[1\]"),
            ("resample", 99, "99 is not a valid Resampling"),
            ("resample", "x", "resample .* is 'x'"),
            ("rescale_factor", 0, "rescale_factor .* is 0, expected a number above 0"),
            ("rescale_factor", NAN, "rescale_factor .* is nan"),
            ("rescale_factor", "x", "rescale_factor .* is 'x'"),
            ("do_resize", "no", "do_resize .* is 'no', expected true or false"),
            ("image_processor_type", 5, "type 5 is not supported"),
            ("image_processor", "x", "image_processor is 'x'"),
        ]
    },
    "preprocess rescale_factor 1e38": (
        edit(PREPROCESS, rescale_factor=1e38),
        "",
        "embeddings of a black and a random picture are not finite",
    ),
}


@pytest.mark.parametrize("case", CLIPS)
def test_a_damaged_clip(case: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    damage, names, complaint = CLIPS[case]
    shutil.copytree(clip, tmp_path / "clip")
    damage(tmp_path / "clip")
    told(load_tower, tmp_path / "clip", names, complaint)
    assert not Path("ran").exists()


# ---- CLIP: its text side.


def tokenizer(**changes: Any) -> Damage:
    return edit("tokenizer.json", **changes)


def shifted(folder: Path) -> None:
    """A tokenizer of another model: its words have other numbers."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokenizer(model__vocab={word: number + 1000 for word, number in vocabulary.items()})(folder)


TEXTS: dict[str, tuple[Damage, str]] = {
    **{
        f"{field} {value!r}": (edit(CONFIG, **{field: value}), complaint)
        for field, value, complaint in [
            ("text_config__hidden_size", 0, "hidden_size of text_config in config.json is 0"),
            ("text_config__num_hidden_layers", 10**6, "claims 1,000,000 layers, model.safetensors holds 2"),
            ("text_config__vocab_size", 10**9, r"token_embedding.weight of shape \(1000000000, 16\)"),
            ("text_config__max_position_embeddings", 4, r"position_embedding.weight of shape \(4, 16\)"),
            ("text_config__eos_token_id", "x", "eos_token_id"),
            ("text_config__eos_token_id", 40, "embeddings of the texts .* are the same"),
            ("text_config", "x", "text_config in config.json is 'x'"),
        ]
    },
    **{
        f"{file} {content[:9]!r}": (put(file, content), complaint)
        for file in ("tokenizer.json", "tokenizer_config.json")
        for content, complaint in [
            (b"", f"{file} is not JSON"),
            (b"\xff\xfe\xff", f"{file} is not JSON"),
            (DEEP, f"{file} is not JSON: it is nested too deeply"),
            (b"[]", f"{file} holds a JSON list"),
        ]
    },
    "no tokenizer": (without("tokenizer.json"), "its tokenizer cannot be loaded"),
    "no model": (tokenizer(model=...), "its tokenizer cannot be loaded .*Model missing"),
    "no words": (tokenizer(model__vocab={}), r"its tokenizer cannot be (loaded|used)"),
    "words of another model": (shifted, "its tokenizer makes the token 1[0-9]*, and its text tower knows 52"),
    "no padding": (edit("tokenizer_config.json", pad_token=None), "its tokenizer cannot be used .*pad"),
    "padding that is no word": (edit("tokenizer_config.json", pad_token="<zzz>"), "makes the token 52"),
    "NaN": (weights(MODEL, NAN, "text_model"), "not finite"),
    "a projection of zeros": (weights(MODEL, 0.0, "text_projection"), "embeddings of the texts .* are the same"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_damaged_text_side(case: str, clip: Path, tmp_path: Path) -> None:
    damage, complaint = TEXTS[case]
    shutil.copytree(clip, tmp_path / "clip")
    damage(tmp_path / "clip")
    told(load_text_tower, tmp_path / "clip", str(tmp_path / "clip"), complaint)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"hello"])
def test_damaged_texts(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "texts.parquet").write_bytes(content)
    told(read_texts, tmp_path, "texts.parquet", "cannot be read")


# ---- What is whole still loads, quietly.


def test_the_whole_ones_load(clip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And transformers' table of the other half's weights is not printed, though its level is the user's own."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    try:
        assert load_tower(str(clip)).n_outputs == 24
        assert load_text_tower(str(clip)).n_outputs == 24
        assert logging.get_verbosity() == logging.WARNING
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")


def test_weights_in_parts_and_as_torch_saves_them_load(clip: Path, tmp_path: Path) -> None:
    expected = load_tower(str(clip)).sha256()
    tensors = safetensors.torch.load_file(clip / MODEL)
    shutil.copytree(clip, tmp_path / "pickled")
    pickled(tensors | {"vision_model.embeddings.position_ids": torch.arange(17)})(tmp_path / "pickled")
    assert load_tower(str(tmp_path / "pickled")).sha256() == expected
    shutil.copytree(clip, tmp_path / "parts")
    names = sorted(tensors)
    parts = {f"model-{i:05d}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, held in parts.items():
        safetensors.torch.save_file({key: tensors[key] for key in held}, tmp_path / "parts" / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, held in parts.items() for key in held}}
    (tmp_path / "parts" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "parts" / MODEL).unlink()
    assert load_tower(str(tmp_path / "parts")).sha256() == expected


def test_the_whole_models_projection_counts(clip: Path, tmp_path: Path) -> None:
    """LAION published configs whose sections say 512, and transformers' own classes for the halves refuse them."""
    shutil.copytree(clip, tmp_path / "clip")
    edit(CONFIG, vision_config__projection_dim=512, text_config__projection_dim=512)(tmp_path / "clip")
    assert load_tower(str(tmp_path / "clip")).sha256() == load_tower(str(clip)).sha256()
    assert load_text_tower(str(tmp_path / "clip")).n_outputs == 24


def test_demo_is_an_address_everywhere() -> None:
    tower, sae = load_models("demo", "demo")
    assert load_preprocess("demo") == tower.preprocess
    assert load_text_tower("demo").n_outputs == sae.config.n_inputs


# ---- On the command line.

MILLION = edit(CONFIG, vision_config__num_hidden_layers=10**6, text_config__num_hidden_layers=10**6)
COMMANDS: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "an empty .pth": ("sae", raw(b""), ("explain", "measure", "name")),
    "a config of texts": ("sae", edit(CONFIG, n_inputs="24"), ("explain", "measure", "name")),
    "weights of 1e38": ("sae", weights(SAE, 1e38), ("explain", "measure", "name")),
    "a million layers": ("clip", MILLION, ("explain", "name")),
    "no tokenizer": ("clip", without("tokenizer.json"), ("name",)),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_jobs_end_with_one_line_and_exit_code_2(
    case: str, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_sae().save(tmp_path / "sae")
    shutil.copytree(clip, tmp_path / "clip")
    torch.zeros(5, 24).numpy().tofile(tmp_path / "x_5_24.npy")
    (tmp_path / "images").mkdir()
    model, damage, jobs = COMMANDS[case]
    at = {name: str(tmp_path / name) for name in ("sae", "clip", "images", "run", "names.parquet", "x_5_24.npy")}
    at[model] = str(damage(tmp_path / model) or at[model])
    both = ["--sae", at["sae"], "--clip", at["clip"]]
    ways = {
        "explain": (explain.main, [*both, "--images", at["images"], "--out", at["run"], "--local"]),
        "measure": (measure.main, ["--sae", at["sae"], "--embeddings", at["x_5_24.npy"]]),
        "name": (name.main, [*both, "--out", at["names.parquet"], "--vocabulary", "demo"]),
    }
    for job in jobs:
        main, argv = ways[job]
        assert mistake(main, argv, capsys).startswith((f"--{model} {at[model]}: ", f"--{model} {at[model]}/"))
