"""Random small CLIP and SigLIP towers of the true architecture, for tests that must not depend on one set of weights."""

from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel

from saecore.images.decode import decode_image
from saecore.images.preprocess import Preprocess
from saecore.removal.head import Head, config_for
from saecore.sae.model import SAE, SAEConfig
from saecore.towers.clip import ClipTower
from saecore.towers.loading import load_tower
from saecore.towers.siglip import SiglipTower
from saecore.towers.tower import ImageTower

SHAPES: list[dict[str, Any]] = [
    {"image_size": 32, "patch_size": 8, "width": 32, "heads": 4, "layers": 3, "activation": "quick_gelu"},
    {"image_size": 48, "patch_size": 8, "width": 48, "heads": 3, "layers": 1, "activation": "gelu"},
    {"image_size": 56, "patch_size": 14, "width": 64, "heads": 2, "layers": 6, "activation": "quick_gelu"},
]

SIGLIP_SHAPES: list[dict[str, Any]] = [
    {"image_size": 32, "patch_size": 8, "width": 32, "heads": 4, "layers": 3, "activation": "gelu_pytorch_tanh"},
    {"image_size": 48, "patch_size": 8, "width": 48, "heads": 3, "layers": 1, "activation": "gelu"},
    # 2 pixels that fill no patch
    {"image_size": 44, "patch_size": 14, "width": 64, "heads": 2, "layers": 6, "activation": "gelu_pytorch_tanh"},
]


def random_tower(
    image_size: int = 32,
    patch_size: int = 8,
    width: int = 32,
    heads: int = 4,
    layers: int = 3,
    activation: str = "quick_gelu",
    outputs: int = 24,
    seed: int = 0,
) -> tuple[CLIPVisionModelWithProjection, ClipTower]:
    """transformers' model and our tower over it, with weights large enough that every part matters (default inits do not)."""
    torch.manual_seed(seed)
    settings = dimensions(image_size, patch_size, width, heads, layers, activation)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings, projection_dim=outputs))
    fill(model)
    return model, ClipTower(model, preprocess(image_size))


def random_siglip(
    image_size: int, patch_size: int, width: int, heads: int, layers: int, activation: str, seed: int = 0
) -> tuple[SiglipVisionModel, SiglipTower]:
    """The same for SigLIP, whose embedding is as wide as its tower."""
    torch.manual_seed(seed)
    model = SiglipVisionModel(
        SiglipVisionConfig(**dimensions(image_size, patch_size, width, heads, layers, activation))
    )
    fill(model)
    return model, SiglipTower(model, preprocess(image_size))


def dimensions(
    image_size: int, patch_size: int, width: int, heads: int, layers: int, activation: str
) -> dict[str, Any]:
    """As transformers' configs call them."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_act": activation,
        "attn_implementation": "sdpa",
    }


def fill(model: torch.nn.Module) -> None:
    """Weights large enough that every part matters; biases included."""
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.ndim < 2 else 1.5 / parameter[0].numel() ** 0.5
        parameter.copy_(
            torch.randn_like(parameter) * spread + (1.0 if "norm.weight" in name or "norm1.w" in name else 0.0)
        )


def preprocess(image_size: int) -> Preprocess:
    """Of pixels already of that size."""
    return Preprocess(
        resize=image_size,
        crop=(image_size, image_size),
        resample=3,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        rescale_factor=1 / 255,
    )


def demo_tower() -> ClipTower:
    """The embedded model's."""
    tower = load_tower("demo")
    assert isinstance(tower, ClipTower)
    return tower


def random_sae(n_inputs: int = 24, n_latents: int = 96, k: int = 8, seed: int = 1) -> SAE:
    """An SAE whose mean, scale and biases all matter."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(SAEConfig(n_inputs=n_inputs, n_latents=n_latents, k=k))
    for tensor in sae.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    sae.scale.fill_(1.7)
    return sae.eval().requires_grad_(False)


def random_head(tower: ImageTower, width: int = 32, blocks: int = 1) -> Head:
    """A head for a tower, with weights that all matter."""
    torch.manual_seed(3)
    head = Head(config_for(tower, width, blocks))
    for tensor in head.state_dict().values():
        tensor.copy_(torch.randn_like(tensor) * (0.3 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5))
    return head.eval().requires_grad_(False)


def hidden_state(model: Any, tower: ImageTower, data: bytes, layer: int) -> np.ndarray:
    """What transformers' model makes of all tokens after a layer, float32 (N, D), of the bytes of an image."""
    pixels = decode_image(data, tower.preprocess, resize="fast").pixels[None].copy()
    with torch.inference_mode():
        normalised = tower.normalise(torch.from_numpy(pixels))
        states = model(pixel_values=normalised, output_hidden_states=True).hidden_states
    of_image: np.ndarray = states[layer + 1][0].numpy()
    return of_image


def random_pixels(tower: ImageTower, n: int, seed: int = 2) -> torch.Tensor:
    """uint8 (n, height, width, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, *tower.preprocess.size, 3), dtype=torch.uint8, generator=generator)
