"""Acceptance: what the draft is for, measured with the real decoder during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aquiline.core.params import SamplingParams
from aquiline.decoding.loop import decode_prompts
from aquiline.decoding.models import DecoderModels
from aquiline.speculation.tree import TreeShape


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
    params = params or SamplingParams(temperature=0)
    rounds, accepted_at = 0, [0] * (shape.depth + 1)
    for one in decode_prompts(models, prompts, shape, max_tokens, end_tokens, params):
        for accepted in one.verdict.accepted.tolist():
            rounds += 1
            accepted_at[accepted] += 1
    reached = [sum(accepted_at[depth:]) / max(rounds, 1) for depth in range(1, shape.depth + 1)]
    return Acceptance(1 + sum(reached), tuple(reached))
