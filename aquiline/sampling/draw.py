"""Draw tokens from a distribution with noise that is named, not kept (Gumbel-max).

The best of score + noise is a draw from softmax(score) when the noise is Gumbel; the ``count``
best, in order, are draws without replacement. The noise is a pure function of (seed, choice,
position, token id, stream), so the draw at a position does not depend on the batch, the tree or
whether speculation is on. Filters only decide who takes part: all tokens at or above the floor.
"""

from __future__ import annotations

from torch import Tensor

from aquiline.kernels import ops
from aquiline.sampling.batch import SamplingBatch
from aquiline.sampling.filters import score_floor


def position_noise(
    sampling: SamplingBatch, positions: Tensor, vocab: int, stream: ops.Stream = ops.Stream.DRAW
) -> ops.NoiseKey | None:
    """The noise at positions [B, P]; None if all rows are greedy and need none."""
    if sampling.all_greedy:
        return None
    return ops.NoiseKey(sampling.seeds, sampling.choices, positions, stream, vocab)


def draw(
    logits: Tensor,
    sampling: SamplingBatch,
    noise: ops.NoiseKey | None,
    levels: Tensor | None = None,
) -> Tensor:
    """One token per row: logits [B, N, V] -> ids [B, N]; ties go to the lowest id.

    Row n takes the noise of the position in column ``levels[n]``, or n.
    """
    return draw_top(logits, sampling, noise, levels, None, 1).squeeze(-1)


def draw_top(
    logits: Tensor,
    sampling: SamplingBatch,
    noise: ops.NoiseKey | None,
    levels: Tensor | None,
    token_ids: Tensor | None,
    count: int,
) -> Tensor:
    """``count`` distinct indices per row, best first, [B, N, count]; see ops.draw_top."""
    floor = None if noise is None else score_floor(logits, sampling)
    return ops.draw_top(logits, floor, sampling.temperature, noise, levels, token_ids, count)
