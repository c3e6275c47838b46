"""RoundGraph: a decoding round of one batch size and one tree, or a stage of it, as one CUDA graph.

Lengths, positions, pages, parameters, seeds and masks are device tensors, so a replay needs nothing
from the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class RoundGraph(Generic[T]):
    """``work`` is captured as it is; it has to have run once before, to compile.

    Args:
        pool: memory that graphs share which never run at the same time.

    Attributes:
        result: what ``work`` returned; overwritten by every replay.
    """

    def __init__(self, work: Callable[[], T], pool: Any) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.result = work()

    def replay(self) -> T:
        """Once more; returns ``result``, valid until the next replay."""
        self.graph.replay()
        return self.result


def capture(*stages: Callable[[], Any], pool: Any = None) -> tuple[RoundGraph[Any], ...]:
    """One graph for each stage of a round, to be replayed in this order; all run once before, which
    has to be harmless."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for stage in stages:
            stage()
    torch.cuda.current_stream().wait_stream(side)
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    return tuple(RoundGraph(stage, pool) for stage in stages)
