"""Linear layers that know their place in the tensor-parallel group.

Column-parallel: each rank holds some output rows, inputs are whole. Row-parallel: each rank holds
some input columns and the outputs are summed over ranks. Projections that read the same input are
one matrix (qkv, gate and up), so a layer streams its weights in four products.

``pack`` prepares the weights for inference on this device (see kernels.ops.pack_weight); a packed
layer can no longer be trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aquiline.attention.backend import Angles
from aquiline.distributed.ranks import SINGLE, Ranks
from aquiline.kernels import ops


class ColumnParallelLinear(nn.Module):
    """[..., in] -> [..., sum(outs) / ranks]: several projections of one input, side by side."""

    weight: nn.Parameter

    def __init__(
        self, in_features: int, outs: tuple[int, ...], bias: bool = False, ranks: Ranks = SINGLE
    ) -> None:
        super().__init__()
        self.ranks = ranks
        self.outs = tuple(ranks.split(out, "out_features") for out in outs)
        self.weight = nn.Parameter(torch.empty(sum(self.outs), in_features))
        self.bias = nn.Parameter(torch.empty(sum(self.outs))) if bias else None
        self._packed: ops.PackedWeight | None = None

    def forward(self, x: Tensor | ops.Normed) -> Tensor:
        return ops.linear(x, self.weight, self.bias, self._packed)

    def gated(self, x: Tensor | ops.Normed) -> Tensor:
        """Of two projections of equal size: silu(first) * second."""
        return ops.gated_linear(x, self.weight, self._packed)

    def into_cache(
        self, x: Tensor | ops.Normed, angles: Angles, k_cache: Tensor, v_cache: Tensor,
        slots: Tensor,
    ) -> Tensor:  # fmt: skip
        """Of queries, keys and values: see attention.backend.Projection."""
        return ops.rotary_linear(
            x, self.weight, self.bias, self._packed, angles.cos, angles.signed_sin, k_cache,
            v_cache, slots,
        )  # fmt: skip

    def pack(self) -> None:
        self._packed = ops.pack_weight(self.weight)

    def part(self, index: int) -> slice:
        """Rows of projection ``index`` in this rank's weight."""
        start = sum(self.outs[:index])
        return slice(start, start + self.outs[index])

    @torch.no_grad()
    def load(self, index: int, weight: Tensor, bias: Tensor | None = None) -> None:
        """Fill projection ``index`` from its full, unsharded weight and bias."""
        self.weight[self.part(index)] = self.ranks.shard(weight, 0).to(self.weight.dtype)
        if self.bias is not None and bias is not None:
            self.bias[self.part(index)] = self.ranks.shard(bias, 0).to(self.bias.dtype)


class RowParallelLinear(nn.Module):
    """[..., in / ranks] -> [..., out], summed over ranks and added to a residual."""

    weight: nn.Parameter

    def __init__(self, in_features: int, out_features: int, ranks: Ranks = SINGLE) -> None:
        super().__init__()
        self.ranks = ranks
        local = ranks.split(in_features, "in_features")
        self.weight = nn.Parameter(torch.empty(out_features, local))
        self._packed: ops.PackedWeight | None = None

    def forward(self, x: Tensor, residual: Tensor, norm: ops.Norm | None) -> ops.Normed:
        """residual + the product, to be read through ``norm``."""
        if self.ranks.size == 1:
            return ops.residual_linear(x, self.weight, residual, norm, self._packed)
        product = self.ranks.all_reduce(ops.linear(x, self.weight, None, self._packed))
        return ops.Normed(residual + product, norm)

    def pack(self) -> None:
        self._packed = ops.pack_weight(self.weight)

    @torch.no_grad()
    def load(self, weight: Tensor) -> None:
        """Fill from the full, unsharded weight."""
        self.weight.copy_(self.ranks.shard(weight, 1))


def pack_linears(module: nn.Module) -> None:
    """Pack every linear layer of a module for inference."""
    for child in module.modules():
        if isinstance(child, ColumnParallelLinear | RowParallelLinear):
            child.pack()
