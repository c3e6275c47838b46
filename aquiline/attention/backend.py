"""The door of attention: what a layer calls, whichever backend stands behind it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Attention(Protocol):
    """One forward pass's attention, planned once, run by every layer."""

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotated q [B,T,H,D], rotated k and v [B,T,K,D] -> [B,T,H,D]."""
        ...
