"""DecodeState: what a batch of requests carries from one round to the next, on the device.

For a request whose tokens t_0 .. t_n are known, the target's KV holds t_0 .. t_{n-1} (``lengths``
is n) and t_n is the root of the next tree. The draft's KV lags behind: ``pending`` pairs
(t_{i+1}, h_i) wait to be fed to it, the last of which also starts the next drafting.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecodeState:
    """One row per request.

    Attributes:
        lengths: [B] tokens committed in the target's KV.
        roots: [B] the newest token, not yet in the KV.
        pending_tokens: [B, P] tokens t_{i+1}; the first ``pending_counts`` [B] are valid.
        pending_features: [B, P, feature_size] the target's features h_i, not yet fused.
    """

    lengths: Tensor
    roots: Tensor
    pending_tokens: Tensor
    pending_features: Tensor
    pending_counts: Tensor

    @classmethod
    def empty(
        cls, rows: int, pending: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> DecodeState:
        """``rows`` requests with room for ``pending`` pairs of features of ``width``."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        features = torch.zeros(rows, pending, width, dtype=dtype, device=device)
        counts = torch.ones(rows, dtype=torch.int64, device=device)
        return cls(zeros(rows), zeros(rows), zeros(rows, pending), features, counts)

    @property
    def room(self) -> int:
        """Pending pairs that a row has room for."""
        return self.pending_tokens.shape[1]

    def select(self, rows: Tensor) -> DecodeState:
        """The given rows, copied."""
        return DecodeState(*(getattr(self, f.name).index_select(0, rows) for f in fields(self)))

    def copy(self, state: DecodeState, count: int) -> None:
        """Overwrite the first ``count`` rows; ``state`` may hold fewer pending columns."""
        for f in fields(self):
            theirs = getattr(state, f.name)
            ours = getattr(self, f.name)[:count]
            if theirs.dim() > 1:
                ours = ours[:, : theirs.shape[1]]
            ours.copy_(theirs)

    def store(self, rows: Tensor, state: DecodeState) -> None:
        """Write ``state`` to the given rows; it may hold fewer pending columns than self."""
        for f in fields(self):
            ours, theirs = getattr(self, f.name), getattr(state, f.name)
            if theirs.dim() > 1:
                ours = ours[:, : theirs.shape[1]]
            ours.index_copy_(0, rows, theirs)
