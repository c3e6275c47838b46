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
from aquiline.kernels import ops
from aquiline.sampling.adjust import Adjustments, flags_of

COLUMNS = ("temperature", "top_k", "top_p", "min_p", "seeds", "choices", "slots")


@dataclass(frozen=True)
class SamplingBatch:
    """temperature, top_p, min_p [B] fp32; top_k [B] int64 (0: all); seeds, choices [B] int64.

    ``seeds`` and ``choices`` key the noise together with a token's absolute position. ``slots`` [B]
    int64 are rows of ``adjustments``, -1 for none. ``all_greedy``: no row needs noise.
    ``filtered``: a sampled row may cut its distribution. ``adjustments``: None if no row is
    adjusted or wants log-probabilities; ``logprobs``: some row may want them.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    choices: Tensor
    slots: Tensor
    all_greedy: bool
    filtered: bool
    adjustments: Adjustments | None = None
    logprobs: bool = False

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        device: torch.device,
        choices: Sequence[int] | None = None,
        adjustments: Adjustments | None = None,
        slots: Sequence[int] | None = None,
    ) -> SamplingBatch:
        """One row per request; ``seeds`` replace the params' own, which may be None. ``choices``
        are 0 if not given, ``slots`` -1: then no request may need one."""

        def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        on_cpu = torch.device(device).type == "cpu"
        sampled = [p for p in params if p.temperature > 0]
        wanted = [flags_of(p) for p in params]
        assert adjustments is not None or not any(wanted), "give the rows of adjustments"
        kept = adjustments if not on_cpu or any(wanted) else None
        return cls(
            temperature=column([p.temperature for p in params]),
            top_k=column([p.top_k for p in params], torch.int64),
            top_p=column([p.top_p for p in params]),
            min_p=column([p.min_p for p in params]),
            seeds=column(list(seeds), torch.int64),
            choices=column(list(choices or [0] * len(params)), torch.int64),
            slots=column(list(slots or [-1] * len(params)), torch.int64),
            all_greedy=on_cpu and not sampled,
            filtered=not on_cpu or any(p.top_k or p.top_p < 1 or p.min_p for p in sampled),
            adjustments=kept,
            logprobs=kept is not None
            and (not on_cpu or any(flags & ops.Flag.LOGPROBS for flags in wanted)),
        )

    def set(self, row: int, params: SamplingParams, seed: int, choice: int = 0) -> None:
        """Overwrite one row, in place, its slot being the same row; the flags stay."""
        values = {
            "temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p,
            "min_p": params.min_p, "seeds": seed, "choices": choice,
            "slots": row,
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
