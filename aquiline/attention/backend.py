"""The door of attention: what a layer calls, whichever backend stands behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from aquiline.kernels import ops


@dataclass(frozen=True)
class Angles:
    """Rotary cos and signed sin [B, T, 1, D] of one pass; the sign belongs to rotate-half."""

    cos: Tensor
    signed_sin: Tensor


class Projection(Protocol):
    """A layer's map from its input to heads: H queries, K keys, K values side by side."""

    def __call__(self, x: Tensor | ops.Normed) -> Tensor:
        """x [B, T, hidden] -> [B, T, (H + 2K) * D], not yet rotated."""
        ...

    def into_cache(
        self, x: Tensor | ops.Normed, angles: Angles, k_cache: Tensor, v_cache: Tensor,
        slots: Tensor,
    ) -> Tensor:  # fmt: skip
        """The rotated queries [B, T, H, D]; keys and values go to slots [B * T] of the caches."""
        ...


class Attention(Protocol):
    """One forward pass's attention, planned once, run by every layer."""

    def run(
        self, layer: int, x: Tensor | ops.Normed, project: Projection, kv_heads: int, angles: Angles
    ) -> Tensor:
        """A layer's input x [B, T, hidden] -> [B, T, H, D]."""
        ...
