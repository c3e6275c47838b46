"""From logits to the distribution that is sampled: temperature, top-k, top-p, min-p.

In this order: divide by the temperature, keep the top_k likeliest, of those the smallest set whose
mass reaches top_p (a token stays if the mass strictly above it is less than top_p), of those the
tokens with at least min_p times the largest probability. Ties with the last token kept are kept, so
what is kept is what scores at least a floor. Greedy rows (temperature 0) take their best token
whatever the filters say. Both verification rules use these functions, so both sample the same
distribution.
"""

from __future__ import annotations

from torch import Tensor

from aquiline.kernels import ops
from aquiline.sampling.batch import SamplingBatch


def score_floor(logits: Tensor, sampling: SamplingBatch) -> Tensor | None:
    """logits [B, N, V] -> the lowest score kept [B, N]; None if no row is filtered."""
    if not sampling.filtered:
        return None
    return ops.score_floor(
        logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    )


def probabilities(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """logits [B, N, V] -> the exact target distribution [B, N, V]; one-hot for greedy rows."""
    return ops.probabilities(logits, score_floor(logits, sampling), sampling.temperature)
