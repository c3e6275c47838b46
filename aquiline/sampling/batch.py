"""SamplingBatch: the sampling parameters of a batch of requests as tensors, one row each.

Parameters live on the device so that a round reads them without the host. The flags are what the
host knows of the whole batch, so that work nobody asked for is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aquiline.core.params import SamplingParams


@dataclass(frozen=True)
class SamplingBatch:
    """temperature, top_p, min_p [B] fp32; top_k [B] int64 (0: all); seeds, choices [B] int64.

    ``seeds`` and ``choices`` key the noise together with a token's absolute position.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    choices: Tensor
    all_greedy: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device
    ) -> SamplingBatch:
        """One row per request; ``seeds`` replace the params' own, which may be None."""

        def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            temperature=column([p.temperature for p in params]),
            top_k=column([p.top_k for p in params], torch.int64),
            top_p=column([p.top_p for p in params]),
            min_p=column([p.min_p for p in params]),
            seeds=column(list(seeds), torch.int64),
            choices=column([0] * len(params), torch.int64),
            all_greedy=all(p.temperature == 0 for p in params),
            any_top_k=any(p.top_k > 0 for p in params),
            any_top_p=any(p.top_p < 1 for p in params),
            any_min_p=any(p.min_p > 0 for p in params),
        )

    def set(self, row: int, params: SamplingParams, seed: int) -> None:
        """Overwrite one row, in place; the flags stay."""
        values = {
            "temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p,
            "min_p": params.min_p, "seeds": seed, "choices": 0,
        }  # fmt: skip
        for name, value in values.items():
            getattr(self, name)[row].fill_(value)

    def select(self, rows: Tensor) -> SamplingBatch:
        """The given rows; the flags stay those of the whole batch."""
        columns = ("temperature", "top_k", "top_p", "min_p", "seeds", "choices")
        return replace(self, **{name: getattr(self, name)[rows] for name in columns})

    @property
    def filtered(self) -> bool:
        """Whether any request cuts its distribution."""
        return self.any_top_k or self.any_top_p or self.any_min_p
