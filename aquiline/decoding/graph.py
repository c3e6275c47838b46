"""RoundGraph: a decoding round of one batch size and one tree as one CUDA graph.

Lengths, positions, pages, parameters and seeds are device tensors, so a replay needs nothing from
the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from aquiline.decoding.rows import Emitted


class RoundGraph:
    """``round_`` works in place on rows it knows and returns what it emitted.

    Args:
        round_: captured as it is; it has to be harmless to run once before, to compile.
        pool: memory that graphs share which never run at the same time.

    Attributes:
        emitted: overwritten by every replay.
    """

    emitted: Emitted

    def __init__(self, round_: Callable[[], Emitted], pool: Any = None) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            round_()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.emitted = round_()

    def replay(self) -> Emitted:
        """One round; returns ``emitted``, valid until the next replay."""
        self.graph.replay()
        return self.emitted
