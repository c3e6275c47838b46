"""Verbatim loops: text that only repeats itself, which flatters a draft.

A loop of period p is a longest stretch in which every token equals the one p before it and which is
at least MIN_TOKENS and 2 p long: a block of p tokens, said once, was said at least twice more. The
stretch is the loop; the block's first saying, which was news, lies outside. Only periods up to
MAX_PERIOD are looked for, and only in the text itself: quoting the prompt is no loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIN_TOKENS = 16
MAX_PERIOD = 64


def inside_loops(
    tokens: Sequence[int], max_period: int = MAX_PERIOD, min_tokens: int = MIN_TOKENS
) -> Tensor:
    """bool [len(tokens)], True at tokens that lie in a loop."""
    text = torch.tensor(tokens, dtype=torch.int64)
    count = len(text)
    place = torch.arange(count)
    periods = torch.arange(1, min(max_period, count // 3) + 1)[:, None]  # a block said three times
    if count == 0 or len(periods) == 0:
        return torch.zeros(count, dtype=torch.bool)
    before = place - periods  # [periods, count]
    repeats = (before >= 0) & (text[before.clamp(min=0)] == text)
    # The nearest token on either side that does not repeat bounds the stretch around each token.
    left = torch.where(repeats, -1, place).cummax(dim=1).values
    right = torch.where(repeats, count, place).flip(1).cummin(dim=1).values.flip(1)
    long = right - left - 1 >= (2 * periods).clamp(min=min_tokens)
    return (repeats & long).any(dim=0)


def loop_share(inside: Sequence[Tensor]) -> float:
    """Share of all tokens that lie in a loop."""
    return sum(int(one.sum()) for one in inside) / max(1, sum(map(len, inside)))
