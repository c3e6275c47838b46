"""A fixed set of prompts decoded as one batch: prefill, then rounds until every row has ended.

No scheduler, no requests: what measures acceptance, in training and in evaluation, and nothing else
needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from aquiline.core.params import SamplingParams, VerificationRule
from aquiline.decoding.models import DecoderModels
from aquiline.decoding.prefill import prefill
from aquiline.decoding.round import Round
from aquiline.decoding.state import DecodeState
from aquiline.sampling.adjust import Adjustments, flags_of
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.tree import TreeShape
from aquiline.speculation.verification.rules import RULES
from aquiline.speculation.verification.verdict import Verdict

PAGE_SIZE = 128


@dataclass(frozen=True)
class LoopRound:
    """One round: the prompts that were still running, [A] indices, and their verdict (A rows)."""

    rows: tuple[int, ...]
    verdict: Verdict


def decode_prompts(
    models: DecoderModels,
    prompts: Sequence[Sequence[int]],
    shape: TreeShape,
    max_tokens: int,
    end_tokens: frozenset[int],
    params: SamplingParams,
    rule: VerificationRule = "coupled",
) -> Iterator[LoopRound]:
    """Rounds until each prompt has ended or has ``max_tokens``; row i is seeded with i.

    A prompt leaves the batch after the round in which it ends, so its last round may accept tokens
    past the end. The first token comes from the prefill and belongs to no round.
    """
    assert params.structured_outputs is None, "nothing here makes masks"
    device, count = models.device, len(prompts)
    longest = max(map(len, prompts))
    pages = -(-(longest + max_tokens + 2 * shape.size) // PAGE_SIZE)
    planes = models.planes(1 + count * pages, PAGE_SIZE, shape.retrieved > 0)
    page_table = 1 + torch.arange(count * pages, device=device).view(count, pages)
    tokens = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    adjustments = None
    if flags_of(params):
        adjustments = Adjustments.empty(count, models.target.config.vocab_size, device)
        for row, prompt in enumerate(prompts):
            adjustments.set(row, params, prompt, (), end_tokens)
    sampling = SamplingBatch.of(
        [params] * count, range(count), device, adjustments=adjustments, slots=range(count)
    )
    width = models.feature_size
    state = DecodeState.empty(count, shape.depth + 1, width, models.dtype, device)
    first = prefill(models, planes, page_table, tokens, lengths, sampling).state
    state.store(torch.arange(count, device=device), first)
    tree = shape.tables(device)
    left = [max_tokens - 1 if token not in end_tokens else 0 for token in state.roots.tolist()]
    while active := tuple(row for row in range(count) if left[row] > 0):
        rows = torch.tensor(active, device=device)
        result = Round(
            models,
            planes,
            tree,
            RULES[rule],
            page_table[rows],
            state.select(rows),
            sampling.select(rows),
        ).run()
        state.store(rows, result.state)
        emitted, accepted = result.verdict.tokens.tolist(), result.verdict.accepted.tolist()
        for row, new, depth in zip(active, emitted, accepted, strict=True):
            ended = any(token in end_tokens for token in new[: depth + 1])
            left[row] = 0 if ended else left[row] - depth - 1
        yield LoopRound(active, result.verdict)
