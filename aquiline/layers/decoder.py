"""One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from aquiline.attention.backend import Angles, Attention
from aquiline.distributed.ranks import SINGLE, Ranks
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

    def forward(self, x: Tensor, angles: Angles, attention: Attention, layer: int) -> Tensor:
        """x [B, T, hidden] -> [B, T, hidden]; ``layer`` names its plane in the cache."""
        norm = None if self.input_layernorm is None else self.input_layernorm.fused
        x = self.self_attn(x, norm, x, angles, attention, layer)
        out: Tensor = self.mlp(x, self.post_attention_layernorm.fused)
        return out
