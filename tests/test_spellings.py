"""Names of models: which differ for sure, which are the same, and which do not tell."""

import json
from pathlib import Path

import pytest

from saecore.spellings import Model, check_same, differ, telling

B16, B32 = "openai/clip-vit-base-patch16", "openai/clip-vit-base-patch32"
L14 = "openai/clip-vit-large-patch14"
DATACOMP = "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (f"open-clip:{DATACOMP}", B16),
        (f"open-clip:{DATACOMP}", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        (f"open-clip:{DATACOMP}", B32),  # the same shape, other weights
        (f"open-clip:{DATACOMP}", "demo"),
        ("demo", L14),
        ("ViT-L/14", B16),
        ("ViT-L-14", "google/siglip-base-patch16-224"),
        ("ViT-L/14@336px", "laion/CLIP-ViT-L-14-224"),
        ("ViT-g-14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
        ("RN50", B16),
        (L14, f"{L14}-336"),
        (B16, "google/siglip-base-patch16-224"),
        ("google/siglip-base-patch16-224", "google/siglip2-base-patch16-224"),
        ("google/siglip-so400m-patch14-384", "google/siglip-so400m-patch14-224"),
        ("facebook/dinov2-base", "google/siglip-base-patch16-224"),
        ("wkcn/TinyCLIP-ViT-40M-32-Text-19M-LAION400M", B32),
    ],
)
def test_names_that_differ(one: str, other: str) -> None:
    assert differ(one, other) is True
    assert differ(other, one) is True


@pytest.mark.parametrize(
    ("one", "other"),
    [("demo", "demo"), (f"open-clip:{DATACOMP}", DATACOMP), (B16, B16.upper()), ("Xenova/clip-vit-base-patch16", B16)],
)
def test_names_of_one_model(one: str, other: str) -> None:
    assert differ(one, other) is False
    assert differ(other, one) is False


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ViT-B/16", B16),  # OpenAI's own name for it, and of any other of this shape
        ("ViT-L-14", f"{L14}-336"),  # SEM's name for just that
        ("clip", B16),
        ("/models/mine", B16),
        ("/models/mine", "demo"),
        ("gpt2", B16),
    ],
)
def test_names_that_do_not_tell(one: str, other: str) -> None:
    assert differ(one, other) is None
    assert differ(other, one) is None


def test_a_folder_goes_by_what_its_files_or_its_name_tell(tmp_path: Path) -> None:
    for name in ("mine", "clip-vit-base-patch16", "models--openai--clip-vit-large-patch14"):
        (tmp_path / name / "snapshots" / "ab12").mkdir(parents=True)
    assert telling(B16) == B16
    assert telling("/openai/siglip/mine") == "mine"
    assert telling(str(tmp_path / "mine")) == ""
    assert telling(str(tmp_path / "clip-vit-base-patch16")) == "clip-vit-base-patch16"
    assert telling(str(tmp_path / "models--openai--clip-vit-large-patch14" / "snapshots" / "ab12")) == L14
    config = tmp_path / "mine" / "config.json"
    for content, told in [({"_name_or_path": B32}, B32), ({"_name_or_path": str(tmp_path)}, ""), ({}, ""), ([], "")]:
        config.write_text(json.dumps(content))
        assert telling(str(tmp_path / "mine")) == told
    config.write_text("not JSON")
    assert telling(str(tmp_path / "mine")) == ""


def test_an_sae_of_another_model_is_refused_unless_any_will_do() -> None:
    clip = f"--clip {B16}"
    said = Model(f"open-clip:{DATACOMP}")
    with pytest.raises(ValueError, match=rf"^x was trained on open-clip:{DATACOMP}, and {clip} is another model"):
        check_same(said, "x", clip, Model(B16), any_clip=False)
    assert "is another model; the job goes on" in check_same(said, "x", clip, Model(B16), any_clip=True)
    assert check_same(Model(B16), "x", clip, Model(B16), any_clip=False) == ""
    assert check_same(Model(), "x", clip, Model(B16), any_clip=False) == ""
    assert "do not tell" in check_same(Model("ViT-B/16"), "x", clip, Model(B16), any_clip=False)
    assert "do not tell" in check_same(Model("ViT-B/16"), "x", clip, Model(), any_clip=False)
    assert "do not tell" in check_same(Model("/siglip/mine"), "x", clip, Model(B16), any_clip=False)


def test_weights_tell_more_than_names() -> None:
    """Of a model whose hash is known on both sides, its name does not matter, and the same name does not help."""
    assert check_same(Model("/here/clip", "ab12"), "x", "--clip /there", Model("", "ab12"), any_clip=False) == ""
    with pytest.raises(ValueError, match=r"trained on demo \(ab12\), and --clip demo \(cd34\) is another model"):
        check_same(Model("demo", "ab12"), "x", "--clip demo", Model("demo", "cd34"), any_clip=False)
