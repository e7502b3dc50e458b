"""SigLIP's image tower: without a CLS token; a learned query, the probe, pools the patches that leave the last layer.

    h_i = LN(x_i)        a = sum_i A_i v_i W_O + b_O,   A = softmax(s q . k_i)        e = a + MLP(LN'(a))

with k_i, v_i projected from h_i and q from the probe, the same for every image. The fixed-resolution checkpoints of SigLIP 2
have the same architecture. For maps the pooling is a path of one layer: the query's residual stream is zero before it and is
the embedding after it, and no token is the tower's own. So `contrib` is the direct effect of each patch through the pooling,
with MLP and biases in the remainder, and `contrib_grad` contains that MLP.

Left out: the text tower (`saecore.towers.text`), NaFlex (transformers' type `siglip2`), position interpolation. Pixels at the
right and lower edge that fill no whole patch are not seen: 6 of 384 with patches of 14.

Shapes as in `saecore.towers.tower`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import SiglipVisionModel

from saecore.images.preprocess import Preprocess
from saecore.towers.tower import ImageTower, PathLayer, ReadOut, Step


class SiglipTower(ImageTower):
    """The image side of a SigLIP model."""

    n_own = 0

    def __init__(self, model: SiglipVisionModel, preprocess: Preprocess) -> None:
        super().__init__(getattr(model, "vision_model", model), preprocess)  # transformers 4 wraps it, 5 does not
        if not self.vision.use_head:
            raise ValueError(
                "this SigLIP was made without its pooling head (vision_use_head is false), so it has no image embedding"
            )
        self.n_outputs = model.config.hidden_size
        self.looks_from = self.n_layers

    def run_in(self, dtype: torch.dtype) -> None:
        """See `ImageTower.run_in`. The pooling's keys and values are computed for all tokens, its MLP for one."""
        for part in (
            self.vision.embeddings,
            self.vision.encoder,
            self.vision.post_layernorm,
            self.vision.head.attention,
        ):
            part.to(dtype)

    def first_tokens(self, pixels: Tensor) -> Tensor:
        """See `ImageTower.first_tokens`: the patches."""
        first: Tensor = self.vision.embeddings(self.normalise(pixels))
        return first

    def path(self) -> list[PathLayer]:
        """See `ImageTower.path`: the pooling."""
        out = self.vision.head.attention.out_proj
        return [PathLayer(None, out.weight, out.bias, self.vision.head.layernorm, self.vision.head.mlp)]

    def embed_query(self, final: Tensor) -> Tensor:
        """See `ImageTower.embed_query`: what leaves the pooling is the embedding."""
        return final.float()

    def embed_each(self, tokens: Tensor) -> Tensor:
        """See `ImageTower.embed_each`: the pooling looks only at that token."""
        v = self._projected(2, self.vision.post_layernorm(tokens))
        a = self.vision.head.attention.out_proj(v).float()
        return self._out_of_mlp(a, self._into_mlp(a))

    def pull_back(self, read_outs: Tensor, final: Tensor, exact: bool = False) -> ReadOut:
        """See `ImageTower.pull_back`: nothing lies between the two."""
        return ReadOut(read_outs.float(), torch.zeros_like(read_outs[..., 0]))

    def pool_unnormed(self, tokens: Tensor) -> Step:
        """The pooling of tokens (B, N, D) as they stand, without the LayerNorm that comes before it in the model."""
        return self._pool_normed(tokens, tokens)

    def _steps(
        self, hidden: Tensor, whole: bool = False, weights: "list[Tensor] | None" = None, start: int = 0
    ) -> Iterator[Step]:
        for step in super()._steps(hidden, whole, weights, start):
            yield step
            hidden = step.leaving
        yield self._pool(hidden, weights)

    def _pool(self, hidden: Tensor, weights: "list[Tensor] | None" = None) -> Step:
        """Residual streams (B, N, D) -> the pooling, as a step with one query."""
        return self._pool_normed(hidden, self.vision.post_layernorm(hidden), weights)

    def _pool_normed(self, hidden: Tensor, normed: Tensor, weights: "list[Tensor] | None" = None) -> Step:
        """The same; `normed` are the tokens as the pooling sees them."""
        probe = self.vision.head.probe.to(normed.dtype).expand(len(hidden), -1, -1)
        q, k, v = (self._projected(part, x) for part, x in enumerate((probe, normed, normed)))
        after = self.vision.head.attention.out_proj(self._mixed(q, k, v, weights)).float()
        inner = self._into_mlp(after)
        return Step(hidden, torch.zeros_like(after), after, inner, self._out_of_mlp(after, inner), q, k, v)

    def _projected(self, part: int, tokens: Tensor) -> Tensor:
        """Queries, keys or values (part 0, 1 or 2). nn.MultiheadAttention holds their weights in one tensor."""
        attention = self.vision.head.attention
        return linear(tokens, attention.in_proj_weight.chunk(3)[part], attention.in_proj_bias.chunk(3)[part])

    def _into_mlp(self, a: Tensor) -> Tensor:
        """a -> what MLP(LN'(a)) gives its activation function, float32."""
        inner: Tensor = self.vision.head.mlp.fc1(self.vision.head.layernorm(a))
        return inner

    def _out_of_mlp(self, a: Tensor, inner: Tensor) -> Tensor:
        """The same -> a + MLP(LN'(a)), float32."""
        mlp = self.vision.head.mlp
        left: Tensor = a + mlp.fc2(mlp.activation_fn(inner))
        return left
