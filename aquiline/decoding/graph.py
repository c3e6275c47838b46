"""RoundGraph: a decoding round of one batch size and one tree as one CUDA graph.

Lengths, positions, pages, parameters and seeds are device tensors, so a replay needs nothing from
the host but which rows take part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RoundGraph:
    """``round_`` maps rows [B] to what it emitted [B, ...]; captured on padding rows.

    ``pool`` is memory that graphs share which never run at the same time.

    Attributes:
        emitted: overwritten by every replay.
    """

    emitted: Tensor

    def __init__(
        self,
        round_: Callable[[Tensor], Tensor],
        batch: int,
        padding: int,
        device: torch.device,
        pool: Any = None,
    ) -> None:
        self.rows = torch.full((batch,), padding, dtype=torch.int64, device=device)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles every kernel
            round_(self.rows)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.emitted = round_(self.rows)

    def replay(self, rows: Tensor) -> Tensor:
        """``rows`` [B] in pinned memory; returns ``emitted``, valid until the next replay."""
        self.rows.copy_(rows, non_blocking=True)
        self.graph.replay()
        return self.emitted
