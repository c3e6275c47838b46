"""Which implementation serves a tensor. Triton is imported only where there is a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def fast(x: Tensor) -> bool:
    """Whether the Triton kernels serve this tensor: on CUDA, in a dtype they take, not training."""
    return x.is_cuda and not torch.is_grad_enabled() and x.dtype != torch.float64


def on_triton(logits: Tensor) -> bool:
    """The kernels compute in fp32: float64 keeps to the twins."""
    return logits.is_cuda and logits.dtype != torch.float64
