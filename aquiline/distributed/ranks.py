"""Ranks: this process's place in the tensor-parallel group.

One rank is the identity: the collectives return their input and touch nothing. With several, they
go through torch.distributed (gloo on the CPU, NCCL on CUDA).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Rank ``rank`` of ``size``; ``group`` None is the default group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def split(self, count: int, what: str) -> int:
        """How many of ``count`` this rank holds; they must divide evenly."""
        if count % self.size:
            raise ValueError(
                f"{what}={count} does not divide by tensor_parallel_size={self.size}; "
                "choose a size that divides it"
            )
        return count // self.size

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's slice of a full tensor."""
        return x.chunk(self.size, dim=dim)[self.rank] if self.size > 1 else x

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x side by side in the last axis."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)


SINGLE = Ranks()
