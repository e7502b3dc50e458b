"""CLIP's image tower from transformers, run layer by layer so that what relevance maps need is a return value, not a hook.

The weights and modules are transformers' own (any CLIP with CLS pooling: OpenAI, LAION, MetaCLIP in that format); the forward
over them is ours. It computes, for layers l = 1..L over tokens x_0 (CLS), x_1..x_P (patches):

    x <- x + W_O concat_h(softmax(q k' / sqrt(Dh)) v) + b_O          x <- x + MLP(LN2(x))          e = W LN(x_0)

Two things differ from transformers' forward, neither changes the embedding: attention is always fused
(`scaled_dot_product_attention`; the one attention row that maps read is recomputed from q_CLS and K), and the last layer
computes only the CLS token, since no other token of it reaches the embedding: about 1/L of a forward saved.

Left out: the text tower (`saecore.text`), towers without a CLS token (SigLIP), position interpolation.

Shapes: B images, L layers, N = 1 + P tokens, P patches, H heads, Dh head width, D = H Dh width, E embedding width, k read-outs.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionModelWithProjection, PreTrainedModel

from saecore.images import Preprocess, load_preprocess

T = TypeVar("T")

DEMO = Path(__file__).parent / "demo" / "clip"

SINK_DEVIATIONS = 4.0
"""A patch is a sink if its norm lies this many standard deviations above the mean patch norm of its image."""


class Trace(NamedTuple):
    """What one forward leaves for relevance maps. Lists have one entry a layer, first layer first; those of values, attention,
    queries and keys begin at the first layer that was asked for, so count layers from the last."""

    values: list[Tensor]
    """(B, N, D) value vectors of all tokens, heads side by side."""
    cls_attention: list[Tensor]
    """float32 (B, H, N): the CLS token's attention over all tokens, after softmax."""
    cls_before: list[Tensor]
    """(B, D) CLS residual stream entering the layer."""
    cls_after: list[Tensor]
    """(B, D) CLS residual stream between attention and MLP."""
    cls_inner: list[Tensor]
    """(B, 4 D) the CLS token inside the MLP, before its activation function: one row, but a product with few rows is slow."""
    cls_final: Tensor
    """(B, D) CLS residual stream leaving the last layer, before the final LayerNorm."""
    sinks: Tensor
    """bool (B, P): patches whose norm was an outlier where they enter any layer of the upper half."""
    keys: list[Tensor]
    """(B, N, D) key vectors of all tokens; empty unless asked for, since they double what a trace holds."""
    cls_query: list[Tensor]
    """(B, D) the CLS token's query."""
    tokens: list[Tensor]
    """(B, N, D) residual streams entering each of the last layers, then that leaving the last; as many as were asked for."""


class PathLayer(NamedTuple):
    """One layer as the CLS token passes through it: o = concat_h(A v), y = x + W_O o + b_O, x' = y + MLP(LN2(y))."""

    norm1: nn.LayerNorm
    q: Tensor
    """(D, D), as nn.Linear holds it; k and v likewise."""
    k: Tensor
    v: Tensor
    out: Tensor
    out_bias: Tensor
    norm2: nn.LayerNorm
    mlp: Any
    """With fc1, activation_fn and fc2."""
    scale: float
    """Of queries times keys."""


class ReadOut(NamedTuple):
    """Linear read-outs of the embedding, pulled back to the CLS residual stream x_0 with the final LayerNorm frozen.

    read-out . e = direction . x_0 / sigma + constant, where sigma is the standard deviation of x_0 as LayerNorm takes it.
    """

    direction: Tensor
    """float32 (B, k, D), divided by sigma already."""
    constant: Tensor
    """float32 (B, k): what LayerNorm's shift contributes."""


class ImageTower(nn.Module):
    """The image side of a CLIP model: uint8 pixels in, embedding and `Trace` out."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: CLIPVisionModelWithProjection, preprocess: Preprocess) -> None:
        super().__init__()
        self.vision = model.vision_model
        self.projection = model.visual_projection
        self.preprocess = preprocess
        config = model.config
        self.n_heads: int = config.num_attention_heads
        self.n_layers: int = config.num_hidden_layers
        self.n_own = 1
        """Tokens before the patches: the CLS token."""
        self.n_outputs: int = config.projection_dim
        height, width = preprocess.size
        if (height, width) != (config.image_size, config.image_size):
            raise ValueError(
                f"the model's image processor makes {height} x {width} pixels, "
                f"its tower takes {config.image_size} x {config.image_size}"
            )
        self.grid = (height // config.patch_size, width // config.patch_size)
        self.register_buffer("mean", torch.tensor(preprocess.mean), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std), persistent=False)
        self.rescale = preprocess.rescale_factor

    def run_in(self, dtype: torch.dtype) -> None:
        """Run the layers in another precision. What surrounds them, one token or one subtraction, stays in float32."""
        for part in (self.vision.embeddings, self.vision.pre_layrnorm, self.vision.encoder):
            part.to(dtype)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, height, width, 3) -> (B, 3, height, width) in the tower's type, as the image processor normalises."""
        scaled = (pixels.float() * self.rescale - self.mean) / self.std
        return scaled.permute(0, 3, 1, 2).to(self.vision.embeddings.patch_embedding.weight.dtype)

    def forward(
        self, pixels: Tensor, layers: int | None = None, keys: bool = False, tokens: int = 0
    ) -> tuple[Tensor, Trace]:
        """uint8 pixels (B, height, width, 3) -> float32 embedding (B, E), not L2-normalised, and the trace.

        layers: of how many last layers the trace holds values, attention and queries; all, if None. keys: theirs too.
        tokens: how many last residual streams it holds; with any, the last layer computes all tokens.
        """
        trace = Trace([], [], [], [], [], pixels, pixels, [], [], [])
        layers = self.n_layers if layers is None else layers
        hidden, norms = self._run(self.first_tokens(pixels), trace, layers, keys, tokens)
        return self.embed_cls(hidden), trace._replace(cls_final=hidden, sinks=_outliers(norms))

    def embed(self, pixels: Tensor) -> Tensor:
        """The embedding alone: the plain forward that the cost of maps is measured against."""
        return self.embed_tokens(self.first_tokens(pixels))

    def first_tokens(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (B, height, width, 3) -> tokens (B, N, D) that enter the first layer, positions in them."""
        first: Tensor = self.vision.pre_layrnorm(self.vision.embeddings(self.normalise(pixels)))
        return first

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """First tokens (B, n, D), CLS and any of the patches -> embedding (B, E): what CLIP makes of only these."""
        return self.embed_cls(self._run(tokens)[0])

    def path(self) -> list[PathLayer]:
        """The layers as the CLS token passes through them, first layer first."""
        found = []
        for layer in self.vision.encoder.layers:
            at = layer.self_attn
            found.append(
                PathLayer(
                    norm1=layer.layer_norm1,
                    q=at.q_proj.weight,
                    k=at.k_proj.weight,
                    v=at.v_proj.weight,
                    out=at.out_proj.weight,
                    out_bias=at.out_proj.bias,
                    norm2=layer.layer_norm2,
                    mlp=layer.mlp,
                    scale=at.scale,
                )
            )
        return found

    def attended(self, index: int, hidden: Tensor) -> Tensor:
        """Tokens (B, N, D) that enter a layer -> the same between its attention and its MLP."""
        layer = self.vision.encoder.layers[index]
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        q, k, v = (self._split(part(normed)) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=attention.scale)
        after: Tensor = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        return after

    def attend_plainly(self, first: Tensor) -> tuple[Tensor, list[Tensor]]:
        """First tokens -> final CLS residual (B, D) and every layer's whole attention (B, H, N, N), in autograd's graph."""
        hidden, weights = first, []
        for layer in self.vision.encoder.layers:
            attention, normed = layer.self_attn, layer.layer_norm1(hidden)
            q, k, v = (self._split(part(normed)) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
            scores = (q @ k.transpose(2, 3)).float() * attention.scale
            weights.append(torch.softmax(scores, dim=-1))
            if not weights[-1].requires_grad:
                weights[-1].requires_grad_()  # the first layer's: nothing before it is differentiated
            hidden = hidden + attention.out_proj((weights[-1].to(v.dtype) @ v).transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        return hidden[:, 0], weights

    def _run(
        self, hidden: Tensor, trace: Trace | None = None, depth: int = 0, keys: bool = False, tokens: int = 0
    ) -> tuple[Tensor, list[Tensor]]:
        """CLS residual (B, D) after all layers, and patch norms of the upper half; fills the trace's lists."""
        layers = self.vision.encoder.layers
        norms: list[Tensor] = []
        for index, layer in enumerate(layers):
            left = len(layers) - index
            attention, mlp = layer.self_attn, layer.mlp
            normed = layer.layer_norm1(hidden)
            if trace is not None and index >= len(layers) // 2:
                norms.append(torch.linalg.vector_norm(hidden[:, 1:], dim=-1, dtype=torch.float32))
            if trace is not None and left < tokens:
                trace.tokens.append(hidden)
            if left == 1 and not tokens:
                hidden = hidden[:, :1]  # only CLS reaches the embedding; keys and values still need every token
            k, v = attention.k_proj(normed), attention.v_proj(normed)
            q = attention.q_proj(normed[:, : hidden.shape[1]])
            q_BHND, k_BHND, v_BHND = (self._split(t) for t in (q, k, v))
            mixed = nn.functional.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, scale=attention.scale)
            before = hidden
            hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
            after, inner = hidden, mlp.fc1(layer.layer_norm2(hidden))
            hidden = hidden + mlp.fc2(mlp.activation_fn(inner))
            if trace is None:
                continue
            # clones, since a view would keep every layer's whole residual stream in memory
            for column, stream in ((trace.cls_before, before), (trace.cls_after, after), (trace.cls_inner, inner)):
                column.append(stream[:, 0].clone())
            if left <= depth:
                # one row a head: as a product of matrices this would copy all keys
                scores = (k_BHND.float() * q_BHND[:, :, :1].float()).sum(-1) * attention.scale
                trace.cls_attention.append(torch.softmax(scores, dim=-1))
                trace.values.append(v)
                trace.cls_query.append(q[:, 0].clone())
                if keys:
                    trace.keys.append(k)
        if trace is not None and tokens:
            trace.tokens.append(hidden)
        return hidden[:, 0], norms

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, Dh)."""
        return tokens.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def embed_cls(self, cls: Tensor) -> Tensor:
        """CLS residual (B, D) -> float32 embedding (B, E). One token, so float32 costs nothing even in a bfloat16 tower."""
        norm = self.vision.post_layernorm
        normed = nn.functional.layer_norm(
            cls.float(), (cls.shape[-1],), norm.weight.float(), norm.bias.float(), norm.eps
        )
        return normed @ self.projection.weight.float().T

    def embed_alone(self, tokens: Tensor) -> Tensor:
        """Final residual streams (B, n, D), each put in CLS's place -> embeddings (B, n, E)."""
        return self.embed_cls(tokens)

    def pull_back(self, read_outs: Tensor, cls: Tensor, exact: bool = False) -> ReadOut:
        """Read-outs of the embedding (B, k, E) -> read-outs of the CLS residual `cls` (B, D) that give the same numbers.

        The final LayerNorm's sigma is data, frozen at its value for this image; its mean subtraction is linear and moves
        into the direction, which centres every term of the residual stream exactly. `exact`: the direction is the true
        gradient instead, through sigma too, and the constant what is left then.
        """
        norm = self.vision.post_layernorm
        normed = read_outs.float() @ self.projection.weight.float()
        scaled = normed * norm.weight.float()
        x = cls.float()
        centred = x - x.mean(dim=-1, keepdim=True)
        sigma = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        direction = (scaled - scaled.mean(dim=-1, keepdim=True)) / sigma[:, None]
        constant = normed @ norm.bias.float()
        if exact:
            along = direction @ (centred / sigma)[..., None]
            direction = direction - along * (centred / sigma)[:, None] / x.shape[-1]
            constant = constant + (along * sigma[:, None]).squeeze(-1) - (direction @ x[..., None]).squeeze(-1)
        return ReadOut(direction, constant)

    def sha256(self) -> str:
        """Hash of everything that changes an embedding: weights, head count, LayerNorm epsilon, activation, preprocessing."""
        vision = self.vision.config
        described = (self.n_heads, vision.layer_norm_eps, vision.hidden_act, vision.patch_size, self.preprocess)
        return hash_of(described, self)


def _outliers(norms: list[Tensor]) -> Tensor:
    """Patch norms (B, P) of some layers -> bool (B, P): an outlier in any of them.

    Registers as in Darcet et al. 2024 (arXiv:2309.16588), found per image so that no threshold belongs to one model.
    """
    flagged = []
    for norm in norms:
        above = norm - norm.mean(1, keepdim=True)
        flagged.append(above > SINK_DEVIATIONS * above.square().mean(1, keepdim=True).sqrt())
    return torch.stack(flagged).any(dim=0)


def hash_of(described: tuple[Any, ...], module: nn.Module) -> str:
    """sha256 of what a module is described by and of its weights."""
    digest = hashlib.sha256(repr(described).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_tower(model_id: str, revision: str | None = None) -> ImageTower:
    """The image tower of a Hub id, a local directory, or `demo` (the embedded model), in float32 on the CPU.

    Raises ValueError, in one sentence, for what a user can get wrong: no such model, not a CLIP, weights missing.
    """
    return ImageTower(*load_half(CLIPVisionModelWithProjection, load_preprocess, model_id, revision))


def load_half(
    half: type[PreTrainedModel], load_input: Callable[[str, str | None], T], model_id: str, revision: str | None
) -> tuple[Any, T]:
    """One tower of a CLIP with its projection, and what prepares its input; errors as `load_tower` says."""
    source = str(DEMO) if model_id == "demo" else model_id
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        if config.model_type not in ("clip", half.config_class.model_type):
            raise ValueError(
                f"--clip {model_id} is a {config.model_type!r} model; supported are CLIP models with a CLS token (type 'clip')"
            )
        model, report = half.from_pretrained(
            source, revision=revision, attn_implementation="sdpa", dtype=torch.float32, output_loading_info=True
        )
        prepares = load_input(source, revision)
    except OSError as error:
        raise ValueError(f"--clip {model_id}: {' '.join(str(error).split())}") from error
    if report["missing_keys"]:
        raise ValueError(
            f"--clip {model_id} lacks the weights {', '.join(sorted(report['missing_keys']))}: not a CLIP with its projection"
        )
    return model.eval().requires_grad_(False), prepares
