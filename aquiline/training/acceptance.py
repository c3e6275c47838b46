"""Acceptance: what the draft is for, measured with the real decoder during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aquiline.core.params import SamplingParams
from aquiline.decoding.models import DecoderModels
from aquiline.decoding.prefill import prefill
from aquiline.decoding.round import decode_round
from aquiline.decoding.state import DecodeState
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.tree import TreeShape

PAGE_SIZE = 128


@dataclass(frozen=True)
class Acceptance:
    """tokens_per_call (TPC), and for each depth the share of rounds that accepted it."""

    tokens_per_call: float
    by_depth: tuple[float, ...]


def measure_acceptance(
    models: DecoderModels,
    prompts: Sequence[Sequence[int]],
    shape: TreeShape,
    max_tokens: int,
    end_tokens: frozenset[int],
    params: SamplingParams | None = None,
) -> Acceptance:
    """Decode all prompts as one batch until each ends or has ``max_tokens``; greedy by default.

    Rounds past a prompt's end are not counted.
    """
    device, count = models.device, len(prompts)
    longest = max(map(len, prompts))
    pages = -(-(longest + max_tokens + 2 * shape.size) // PAGE_SIZE)
    planes = models.planes(1 + count * pages, PAGE_SIZE)
    page_table = 1 + torch.arange(count * pages, device=device).view(count, pages)
    tokens = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    sampling = SamplingBatch.of(
        [params or SamplingParams(temperature=0)] * count, range(count), device
    )
    width = models.feature_size
    state = DecodeState.empty(count, shape.depth + 1, width, models.dtype, device)
    first = prefill(models, planes, page_table, tokens, lengths, sampling)
    state.store(torch.arange(count, device=device), first)
    tree = shape.tables(device)
    left = [max_tokens - 1 if token not in end_tokens else 0 for token in state.roots.tolist()]
    rounds, accepted_at = 0, [0] * (shape.depth + 1)
    while True:
        active = [row for row in range(count) if left[row] > 0]
        if not active:
            break
        rows = torch.tensor(active, device=device)
        result = decode_round(
            models, planes, tree, "coupled", page_table[rows], state.select(rows),
            sampling.select(rows),
        )  # fmt: skip
        state.store(rows, result.state)
        emitted = result.verdict.tokens.tolist()
        for row, new, accepted in zip(
            active, emitted, result.verdict.accepted.tolist(), strict=True
        ):
            rounds += 1
            accepted_at[accepted] += 1
            ended = any(token in end_tokens for token in new[: accepted + 1])
            left[row] = 0 if ended else left[row] - accepted - 1
    reached = [sum(accepted_at[depth:]) / max(rounds, 1) for depth in range(1, shape.depth + 1)]
    return Acceptance(1 + sum(reached), tuple(reached))
