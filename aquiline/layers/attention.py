"""The self-attention layer of Llama: project, rotate, attend through the backend, project back."""

from __future__ import annotations

from torch import Tensor, nn

from aquiline.attention.backend import Angles, Attention
from aquiline.distributed.ranks import SINGLE, Ranks
from aquiline.kernels import ops
from aquiline.layers.linear import ColumnParallelLinear, RowParallelLinear


class SelfAttention(nn.Module):
    """Grouped-query attention; ``bias`` is Qwen2's bias on q, k and v.

    ``input_size`` is the width that q, k and v read, where it is not ``hidden_size`` (EAGLE-3).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        ranks: Ranks = SINGLE,
        input_size: int | None = None,
    ) -> None:
        super().__init__()
        outs = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        self.qkv_proj = ColumnParallelLinear(input_size or hidden_size, outs, bias, ranks)
        self.o_proj = RowParallelLinear(num_heads * head_dim, hidden_size, ranks)
        self.num_heads = ranks.split(num_heads, "num_attention_heads")
        self.num_kv_heads = ranks.split(num_kv_heads, "num_key_value_heads")

    def forward(
        self,
        x: ops.Normed,
        residual: Tensor,
        next_norm: ops.Norm,
        angles: Angles,
        attention: Attention,
        layer: int,
    ) -> ops.Normed:
        """residual + attention of norm(x), to be read through ``next_norm``; ``layer`` names its
        cache."""
        attended = attention.run(layer, x, self.qkv_proj, self.num_kv_heads, angles)
        out: ops.Normed = self.o_proj(attended.flatten(2), residual, next_norm)
        return out
