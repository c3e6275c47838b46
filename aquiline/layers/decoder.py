"""One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from aquiline.attention.backend import Angles, Attention
from aquiline.distributed.ranks import SINGLE, Ranks
from aquiline.kernels import ops
from aquiline.layers.attention import SelfAttention
from aquiline.layers.mlp import MLP
from aquiline.layers.norm import RMSNorm


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one decoder layer."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_bias: bool
    rms_norm_eps: float


class DecoderLayer(nn.Module):
    """A Llama decoder layer; ``input_norm`` False is EAGLE-1's first layer."""

    def __init__(self, shape: LayerShape, input_norm: bool = True, ranks: Ranks = SINGLE) -> None:
        super().__init__()
        hidden = shape.hidden_size
        self.input_layernorm = RMSNorm(hidden, shape.rms_norm_eps) if input_norm else None
        self.self_attn = SelfAttention(
            hidden, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.attention_bias, ranks
        )
        self.post_attention_layernorm = RMSNorm(hidden, shape.rms_norm_eps)
        self.mlp = MLP(hidden, shape.intermediate_size, ranks)

    @property
    def input_norm(self) -> ops.Norm | None:
        """What this layer's input is read through."""
        return None if self.input_layernorm is None else self.input_layernorm.fused

    def forward(
        self,
        x: ops.Normed,
        next_norm: ops.Norm | None,
        angles: Angles,
        attention: Attention,
        layer: int,
    ) -> ops.Normed:
        """x [B, T, hidden], read through ``input_norm`` -> the same, read through ``next_norm``;
        ``layer`` names its plane in the cache."""
        norm = self.post_attention_layernorm.fused
        x = self.self_attn(x, x.x, norm, angles, attention, layer)
        out: ops.Normed = self.mlp(x, next_norm)
        return out


def run_layers(
    layers: Iterable[nn.Module],
    x: Tensor | ops.Normed,
    last_norm: ops.Norm | None,
    angles: Angles,
    attention: Attention,
    first: int = 0,
) -> Iterator[ops.Normed]:
    """The residual stream x [B, T, hidden] before each layer and after the last, as it is read.

    ``first`` is the first layer's number in the cache.
    """
    stack = [layer for layer in layers if isinstance(layer, DecoderLayer)]
    norms = [*(layer.input_norm for layer in stack), last_norm]
    stream = x if isinstance(x, ops.Normed) else ops.Normed(x, norms[0])
    yield stream
    for index, layer in enumerate(stack):
        stream = layer(stream, norms[index + 1], angles, attention, first + index)
        yield stream
