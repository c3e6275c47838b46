"""The feed-forward layer of Llama."""

from __future__ import annotations

from torch import nn

from aquiline.distributed.ranks import SINGLE, Ranks
from aquiline.kernels import ops
from aquiline.layers.linear import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """Llama's gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, ranks: Ranks = SINGLE) -> None:
        super().__init__()
        sizes = (intermediate_size, intermediate_size)
        self.gate_up_proj = ColumnParallelLinear(hidden_size, sizes, ranks=ranks)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, ranks)

    def forward(self, x: ops.Normed, next_norm: ops.Norm | None) -> ops.Normed:
        """x + the layer's output for norm(x), to be read through ``next_norm``."""
        out: ops.Normed = self.down_proj(self.gate_up_proj.gated(x), x.x, next_norm)
        return out
