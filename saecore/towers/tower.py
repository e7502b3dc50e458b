"""Image towers from transformers, run layer by layer so that what relevance maps need is a return value, not a hook.

The weights and modules are transformers' own; the forward over them is ours. Towers differ in the query, the token whose final
residual stream becomes the embedding. CLIP's query is CLS, which all layers carry (`saecore.towers.clip`); SigLIP's is learned
and looks at the patches once, after the last layer (`saecore.towers.siglip`). This file has what both share. Layers l = 1..L
map tokens x_i as follows:

    x <- x + W_O concat_h(softmax(q k' / sqrt(Dh)) v) + b_O          x <- x + MLP(LN2(x))

Attention is always fused (`scaled_dot_product_attention`). The one attention row that maps read, by which the query looks at
the tokens, is computed again from q and the keys; that does not change the embedding.

Shapes: B images, L layers, N tokens, P patches, H heads, Dh head width, D = H Dh width, E embedding width, k read-outs.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saecore.images.preprocess import Preprocess

SINK_DEVIATIONS = 4.0
"""A patch is a sink if its norm is this many standard deviations above the mean patch norm of its image."""


class Trace(NamedTuple):
    """What one forward leaves for relevance maps.

    A list has one entry for each layer that the query passes, first layer first. The lists `values`, `keys`,
    `query_attention` and `query_q` hold only the last `layers` layers, so index all lists from the last: -1, -2, ..
    """

    values: list[Tensor]
    """(B, N, D) value vectors of all tokens, heads side by side."""
    query_attention: list[Tensor]
    """float32 (B, H, N): the row of attention by which the query looks at all tokens, after softmax."""
    query_before: list[Tensor]
    """(B, D) the query's residual stream where it enters the layer."""
    query_after: list[Tensor]
    """(B, D) the same stream between attention and MLP."""
    query_inner: list[Tensor]
    """(B, 4 D) the same inside the MLP, before its activation function. Kept since a product with few rows is slow."""
    query_final: Tensor
    """(B, D) the same where it leaves the last layer, before the final LayerNorm if there is one."""
    sinks: Tensor
    """bool (B, P): patches whose norm is an outlier where they enter any layer of the upper half."""
    keys: list[Tensor]
    """(B, N, D) key vectors of all tokens; an empty list unless asked for, since keys double what a trace holds."""
    query_q: list[Tensor]
    """(B, D) the vector q by which the query looks at the keys."""
    tokens: list[Tensor]
    """(B, N, D) residual streams entering the last layers, then the one leaving the last layer; as many as were asked for."""


class Step(NamedTuple):
    """One layer, in which n tokens look at all N: all of them, or only the query."""

    entering: Tensor
    """(B, N, D) residual streams of all tokens."""
    before: Tensor
    """(B, n, D) residual streams of the tokens that look."""
    after: Tensor
    """(B, n, D) the same between attention and MLP."""
    inner: Tensor
    """(B, n, 4 D) the same inside the MLP, before its activation function."""
    leaving: Tensor
    """(B, n, D)."""
    q: Tensor
    """(B, n, D)."""
    k: Tensor
    """(B, N, D)."""
    v: Tensor
    """(B, N, D)."""


class Entry(NamedTuple):
    """How a residual stream enters a layer's attention; weights (D, D) as nn.Linear holds them."""

    norm1: nn.LayerNorm
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    """Of queries times keys."""


class PathLayer(NamedTuple):
    """One layer as the query passes through it: o = concat_h(A v), y = x + W_O o + b_O, x' = y + MLP(LN2(y))."""

    entry: Entry | None
    """How A and v depend on x; None for a learned query, which depends on no layer below."""
    out: Tensor
    """(D, D), as nn.Linear holds it."""
    out_bias: Tensor
    norm2: nn.LayerNorm
    mlp: Any
    """With fc1, activation_fn and fc2."""


class ReadOut(NamedTuple):
    """Linear read-outs of the embedding, pulled back to the query's final residual stream x.

    A LayerNorm between the two is frozen: read-out . e = direction . x + constant.
    """

    direction: Tensor
    """float32 (B, k, D)."""
    constant: Tensor
    """float32 (B, k)."""


class ImageTower(nn.Module):
    """The image side of a model: uint8 pixels in, embedding and `Trace` out. Subclasses say what query and embedding are."""

    mean: Tensor
    std: Tensor
    n_own: int
    """Tokens before the patches: 1 for CLS, or 0."""
    n_outputs: int
    """Width of the embedding."""
    looks_from: int
    """The number of the first step in which the query looks at the tokens."""

    def __init__(self, vision: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.vision = vision
        self.preprocess = preprocess
        config = vision.config
        self.n_heads: int = config.num_attention_heads
        self.n_layers: int = config.num_hidden_layers
        self.scale = (config.hidden_size // self.n_heads) ** -0.5
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

    # ---- What each kind of tower defines.

    def run_in(self, dtype: torch.dtype) -> None:
        """Run the layers in another precision. What surrounds the layers, one token or one subtraction, stays in float32."""
        raise NotImplementedError

    def first_tokens(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (B, height, width, 3) -> tokens (B, N, D) that enter the first layer, positions included."""
        raise NotImplementedError

    def path(self) -> list[PathLayer]:
        """The layers as the query passes through them, first layer first."""
        raise NotImplementedError

    def embed_query(self, final: Tensor) -> Tensor:
        """The query's final residual stream (B, D) -> float32 embedding (B, E)."""
        raise NotImplementedError

    def embed_each(self, tokens: Tensor) -> Tensor:
        """Final residual streams of tokens (B, n, D) -> the embedding that each would make (B, n, E).

        CLIP: if the query's final stream were this one. SigLIP: if the query looked only at this token.
        """
        raise NotImplementedError

    def pull_back(self, read_outs: Tensor, final: Tensor, exact: bool = False) -> ReadOut:
        """Read-outs of the embedding (B, k, E) -> read-outs of the query's final residual stream (B, D) that give the
        same numbers.

        `exact`: the direction is the true gradient, and the constant is what remains.
        """
        raise NotImplementedError

    # ---- What all towers share.

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, height, width, 3) -> (B, 3, height, width) in the tower's type, as the image processor normalises."""
        # In place: of 32 images, three more arrays of 19 MB, fresh from the system, took 0.3 ms an image.
        scaled = pixels.to(torch.float32, copy=True).mul_(self.rescale).sub_(self.mean).div_(self.std)
        return scaled.permute(0, 3, 1, 2).to(self.vision.embeddings.patch_embedding.weight.dtype)

    def forward(
        self, pixels: Tensor, layers: int | None = None, keys: bool = False, tokens: int = 0
    ) -> tuple[Tensor, Trace]:
        """uint8 pixels (B, height, width, 3) -> float32 embedding (B, E), not L2-normalised, and the trace.

        layers: the trace holds values, attention and q of the last `layers` layers that the query passes; of all, if None.
        keys: it holds their keys too. tokens: it holds so many of the last residual streams, and if there are any, the last
        layer computes all tokens.
        """
        values, keys_kept, streams, norms = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
        before, after, inner = list[Tensor](), list[Tensor](), list[Tensor]()
        rows, queries = list[Tensor](), list[Tensor]()
        looks_end = self.looks_from + len(self.path())
        for index, step in enumerate(self._steps(self.first_tokens(pixels), whole=tokens > 0)):
            if index >= self.n_layers // 2:
                patches = step.entering[:, self.n_own :]
                norms.append(torch.linalg.vector_norm(patches, dim=-1, dtype=torch.float32))
            if index + tokens > self.n_layers:
                streams.append(step.entering)
            if index < self.looks_from:
                continue
            # Clones, since a view would keep every layer's whole residual stream in memory.
            before.append(step.before[:, 0].clone())
            after.append(step.after[:, 0].clone())
            inner.append(step.inner[:, 0].clone())
            if layers is None or index + layers >= looks_end:
                queries.append(step.q[:, 0].clone())
                rows.append(self._attention_row(queries[-1], step.k))
                values.append(step.v)
                keys_kept += [step.k] if keys else []
        # With a pooling, what leaves the last layer is there already, since it enters the pooling.
        if len(streams) < tokens:
            streams.append(step.leaving)
        final = step.leaving[:, 0]
        trace = Trace(
            values=values,
            query_attention=rows,
            query_before=before,
            query_after=after,
            query_inner=inner,
            query_final=final,
            sinks=outliers(norms),
            keys=keys_kept,
            query_q=queries,
            tokens=streams,
        )
        return self.embed_query(final), trace

    def embed(self, pixels: Tensor) -> Tensor:
        """Only the embedding: the plain forward that the cost of maps is measured against."""
        return self.embed_tokens(self.first_tokens(pixels))

    def embed_tokens(self, tokens: Tensor, start: int = 0) -> Tensor:
        """First tokens (B, n, D), the tower's own and any of the patches -> the embedding of only these tokens (B, E).

        `start`: the tokens enter this layer, or what follows the layers, in place of the first.
        """
        final = tokens[:, 0]
        for step in self._steps(tokens, start=start):
            final = step.leaving[:, 0]
        return self.embed_query(final)

    def attend_plainly(self, first: Tensor) -> tuple[Tensor, list[Tensor]]:
        """First tokens -> the query's final residual stream (B, D) and the whole attention of each step (B, H, n, N).

        Both are in autograd's graph. n = N, or 1 where a learned query looks.
        """
        weights: list[Tensor] = []
        last = deque(self._steps(first, whole=True, weights=weights), maxlen=1).pop()
        return last.leaving[:, 0], weights

    def attend(
        self, index: int, hidden: Tensor, rows: int | None = None, weights: "list[Tensor] | None" = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens (B, N, D) that enter a layer -> the first `rows` of them between its attention and MLP, and its q, k and v."""
        layer = self.vision.encoder.layers[index]
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        k, v = attention.k_proj(normed), attention.v_proj(normed)  # every row sees all tokens
        # Contiguous: PyTorch multiplies each row of a slice by a copy of the weights, which took 2 to 9 % of a forward of B/32.
        q = attention.q_proj(normed[:, :rows].contiguous())
        return hidden[:, :rows] + attention.out_proj(self._mixed(q, k, v, weights)), q, k, v

    def sha256(self) -> str:
        """Hash of everything that changes an embedding: weights, head count, LayerNorm epsilon, activation, preprocessing."""
        vision = self.vision.config
        described = (self.n_heads, vision.layer_norm_eps, vision.hidden_act, vision.patch_size, self.preprocess)
        return hash_of(described, self)

    def _steps(
        self, hidden: Tensor, whole: bool = False, weights: "list[Tensor] | None" = None, start: int = 0
    ) -> Iterator[Step]:
        """All layers from `start` on, one after the other.

        With CLS, the last layer computes only that token unless `whole`: no other token that leaves it reaches the embedding,
        and about 1/L of a forward is saved. weights: see `_mixed`.
        """
        for index in range(start, self.n_layers):
            layer = self.vision.encoder.layers[index]
            rows = None if whole or index + 1 < self.n_layers else self.n_own or None
            after, q, k, v = self.attend(index, hidden, rows, weights)
            inner = layer.mlp.fc1(layer.layer_norm2(after))
            leaving = after + layer.mlp.fc2(layer.mlp.activation_fn(inner))
            yield Step(hidden, hidden[:, :rows], after, inner, leaving, q, k, v)
            hidden = leaving

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, weights: "list[Tensor] | None") -> Tensor:
        """softmax(s q k') v by head, heads side by side (B, n, D).

        weights: a list to which the attention (B, H, n, N) is appended. It is then computed as written, so that autograd can
        differentiate by it.
        """
        q_BHnD, k_BHND, v_BHND = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if weights is None:
            mixed = nn.functional.scaled_dot_product_attention(q_BHnD, k_BHND, v_BHND, scale=self.scale)
        else:
            A = torch.softmax((q_BHnD @ k_BHND.mT).float() * self.scale, dim=-1)
            if not A.requires_grad:
                A.requires_grad_()  # in the first layer: nothing before it is differentiated
            weights.append(A)
            mixed = A.to(v.dtype) @ v_BHND
        return mixed.transpose(1, 2).flatten(2)

    def _attention_row(self, q: Tensor, k: Tensor) -> Tensor:
        """softmax(s q k') of one query (B, D) over keys (B, N, D), float32 (B, H, N)."""
        q_BHD, k_BNHD = (t.unflatten(-1, (self.n_heads, -1)).float() for t in (q, k))
        # One row for each head: a product of matrices would copy all keys.
        scores = (k_BNHD.transpose(1, 2) * q_BHD[:, :, None]).sum(-1)
        return torch.softmax(scores * self.scale, dim=-1)


def encoder_path(vision: Any) -> list[PathLayer]:
    """The layers of transformers' encoder as a token passes them, first layer first: of CLIP's and of SigLIP's."""
    layers = []
    for layer in vision.encoder.layers:
        at = layer.self_attn
        entry = Entry(layer.layer_norm1, at.q_proj.weight, at.k_proj.weight, at.v_proj.weight, at.scale)
        layers.append(PathLayer(entry, at.out_proj.weight, at.out_proj.bias, layer.layer_norm2, layer.mlp))
    return layers


def outliers(norms: list[Tensor]) -> Tensor:
    """Patch norms (B, P) of some layers -> bool (B, P): whether a patch is an outlier in any of them.

    These are the registers of Darcet et al. 2024 (arXiv:2309.16588). They are judged image by image, so that no threshold is
    tied to one model.
    """
    flagged = []
    for norm in norms:
        above = norm - norm.mean(1, keepdim=True)
        flagged.append(above > SINK_DEVIATIONS * above.square().mean(1, keepdim=True).sqrt())
    return torch.stack(flagged).any(dim=0)


def hash_of(described: tuple[Any, ...], module: nn.Module) -> str:
    """sha256 of a description and of a module's weights."""
    digest = hashlib.sha256(repr(described).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
