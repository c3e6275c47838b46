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

    def forward(self, x: Tensor, norm: ops.Norm) -> Tensor:
        """x + the layer's output for norm(x)."""
        out: Tensor = self.down_proj(self.gate_up_proj.gated(x, norm), residual=x)
        return out
