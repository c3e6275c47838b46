"""The door of attention: what a layer calls, whichever backend stands behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Angles:
    """Rotary cos and signed sin [B, T, 1, D] of one pass; the sign belongs to rotate-half."""

    cos: Tensor
    signed_sin: Tensor


class Attention(Protocol):
    """One forward pass's attention, planned once, run by every layer."""

    def run(self, layer: int, heads: Tensor, kv_heads: int, angles: Angles) -> Tensor:
        """Queries, keys, values side by side [B, T, H + 2K, D], not yet rotated -> [B, T, H, D]."""
        ...
