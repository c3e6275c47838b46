"""SamplingBatch: the sampling parameters of a batch of requests as tensors, one row each.

Parameters live on the device so that a round reads them without the host. The flags are what the
host knows of the whole batch, so that a CPU skips work nobody asked for. On other devices they say
nothing (not all greedy, filtered): kernels skip row by row, and a graph serves any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aquiline.core.params import SamplingParams

COLUMNS = ("temperature", "top_k", "top_p", "min_p", "seeds", "choices")


@dataclass(frozen=True)
class SamplingBatch:
    """temperature, top_p, min_p [B] fp32; top_k [B] int64 (0: all); seeds, choices [B] int64.

    ``seeds`` and ``choices`` key the noise together with a token's absolute position.
    ``all_greedy``: no row needs noise. ``filtered``: a sampled row may cut its distribution.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    choices: Tensor
    all_greedy: bool
    filtered: bool

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        device: torch.device,
        choices: Sequence[int] | None = None,
    ) -> SamplingBatch:
        """One row per request; ``seeds`` replace the params' own, which may be None. ``choices``
        are 0 if not given."""

        def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        on_cpu = torch.device(device).type == "cpu"
        sampled = [p for p in params if p.temperature > 0]
        return cls(
            temperature=column([p.temperature for p in params]),
            top_k=column([p.top_k for p in params], torch.int64),
            top_p=column([p.top_p for p in params]),
            min_p=column([p.min_p for p in params]),
            seeds=column(list(seeds), torch.int64),
            choices=column(list(choices or [0] * len(params)), torch.int64),
            all_greedy=on_cpu and not sampled,
            filtered=not on_cpu or any(p.top_k or p.top_p < 1 or p.min_p for p in sampled),
        )

    def set(self, row: int, params: SamplingParams, seed: int, choice: int = 0) -> None:
        """Overwrite one row, in place; the flags stay."""
        values = {
            "temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p,
            "min_p": params.min_p, "seeds": seed, "choices": choice,
        }  # fmt: skip
        for name, value in values.items():
            getattr(self, name)[row].fill_(value)

    def copy(self, batch: SamplingBatch, count: int) -> None:
        """Overwrite the first ``count`` rows, in place; the flags stay."""
        for name in COLUMNS:
            getattr(self, name)[:count].copy_(getattr(batch, name))

    def select(self, rows: Tensor) -> SamplingBatch:
        """The given rows; the flags stay those of the whole batch."""
        return replace(self, **{name: getattr(self, name)[rows] for name in COLUMNS})
