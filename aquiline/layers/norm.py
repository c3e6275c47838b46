"""RMSNorm, as in Llama: no mean, no bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aquiline.kernels import ops


class RMSNorm(nn.Module):
    """x [..., size] / rms(x) * weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    @property
    def fused(self) -> ops.Norm:
        """For the layer that reads through it."""
        return ops.Norm(self.weight, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)
