"""The feed-forward layer of Llama."""

from __future__ import annotations

from torch import Tensor, nn

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

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.down_proj(ops.silu_mul(self.gate_up_proj(x)))
        return projected
