"""Prefill: prompts through target and draft, whole or in stretches, from wherever the cache ends;
the last stretch has one sampling step fused to its end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.attention.paged import PagedAttention, TreePlan
from aquiline.decoding.models import DecoderModels, Planes
from aquiline.decoding.state import DecodeState
from aquiline.kernels import ops
from aquiline.kvcache.pool import KVPlane
from aquiline.models.llama import TargetOutput
from aquiline.sampling.batch import SamplingBatch
from aquiline.sampling.draw import draw, position_noise


@dataclass(frozen=True)
class Prefilled:
    """The state for the first round, whose ``roots`` are the first tokens, and their
    log-probabilities [B, 1, ...], see ops.token_logprobs; None if nobody wants them. ``features``
    [B, T, d] are the target's after every token that was run."""

    state: DecodeState
    logprobs: Tensor | None
    features: Tensor


@torch.inference_mode()
def prefill(
    models: DecoderModels,
    planes: Planes,
    page_table: Tensor,
    tokens: Tensor,
    counts: Tensor,
    sampling: SamplingBatch,
    start: Tensor | None = None,
    masks: Tensor | None = None,
) -> Prefilled:
    """Run prompts to their end and draw first tokens.

    Args:
        page_table: [B, M] pages with room for the prompts; M of them hold any ``start`` + T.
        tokens: [B, T] prompt tokens, padded on the right; ``counts`` [B] are valid.
        start: [B] tokens in front of them that both caches hold; None: none.
        masks: [B, 1, ceil(V / 32)] what the forms of texts allow first, see ops.adjust_logits.
    """
    start = torch.zeros_like(counts) if start is None else start
    # Pair (t_{i+1}, h_i) for every i below the last; that one waits for the drawn token. A
    # shorter prompt's last row pairs with padding; the first round overwrites its slot.
    output = _run(models, planes, page_table, tokens, tokens[:, 1:], counts, start)

    def at_end(x: Tensor) -> Tensor:
        return x.gather(1, (counts - 1)[:, None, None].expand(-1, 1, x.shape[-1]))

    lengths = start + counts
    logits = models.target.logits(at_end(output.features))
    first, logprobs = _first_tokens(logits, sampling, lengths[:, None], masks)
    pending = at_end(models.draft_features(output))
    state = DecodeState(lengths, first.squeeze(1), first, pending, torch.ones_like(lengths))
    return Prefilled(state, logprobs, output.features)


@torch.inference_mode()
def prefill_chunk(
    models: DecoderModels, planes: Planes, page_table: Tensor, tokens: Tensor, start: Tensor
) -> Tensor:
    """Run a stretch of each prompt that is not its last: of tokens [B, T + 1] the first T. The
    draft pairs the last of them with the one behind it. The target's features [B, T, d]."""
    count = tokens.shape[1] - 1
    counts = torch.full_like(start, count)
    pairs = tokens[:, 1:]
    return _run(models, planes, page_table, tokens[:, :count], pairs, counts, start).features


def _run(
    models: DecoderModels,
    planes: Planes,
    page_table: Tensor,
    tokens: Tensor,
    pairs: Tensor,
    counts: Tensor,
    start: Tensor,
) -> TargetOutput:
    """The target over tokens [B, T], the draft over as many ``pairs`` [B, T or T - 1]: the tokens
    behind them."""
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    valid = columns < counts[:, None]
    positions = torch.where(valid, start[:, None] + columns, 0)

    def attention(plane: KVPlane, rows: int) -> PagedAttention:
        slots = ops.slots_at(page_table, positions[:, :rows], plane.page_size)
        slots = torch.where(valid[:, :rows], slots, 0)
        return PagedAttention(plane, TreePlan(page_table, start, slots, rows))

    if planes.tokens is not None:
        slots = ops.slots_at(page_table, positions, planes.tokens.page_size)
        planes.tokens.write(torch.where(valid, slots, 0), tokens)
    output: TargetOutput = models.target(
        tokens, positions, attention(planes.target, len(columns)), models.taps
    )
    drafter, rows = models.drafter, pairs.shape[1]
    if drafter is not None and planes.draft is not None and rows:
        hidden = drafter.draft.fuse(models.draft_features(output)[:, :rows])
        drafter.draft(
            drafter.embed(pairs), hidden, positions[:, :rows], attention(planes.draft, rows)
        )
    return output


def _first_tokens(
    logits: Tensor, sampling: SamplingBatch, positions: Tensor, masks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Draw from logits [B, 1, V] the tokens at positions [B, 1]; count and score them."""
    table, slots = sampling.adjustments, sampling.slots
    raw = logits.clone() if sampling.logprobs else None
    if table is not None:
        ops.adjust_logits(logits, table, slots, positions, None, None, None, masks, None)
    tokens = draw(logits, sampling, position_noise(sampling, positions, logits.shape[-1]))
    if table is not None:
        ops.count_tokens(table, slots, tokens, torch.ones_like(slots))
    if raw is None:
        return tokens, None
    return tokens, ops.token_logprobs(raw, None, table, slots, None, tokens)
