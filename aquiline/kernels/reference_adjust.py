"""Plain-torch twins of the adjustments: the definition that the kernels are tested against.

They look at the flags on the host to skip what nobody asked for. Contracts: ops; what the rows
hold: adjustments.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquiline.kernels.adjustments import (
    ADJUSTING,
    MAX_COUNT,
    TOP_LOGPROBS,
    UNUSED,
    AdjustmentTable,
    Flag,
    History,
)

NEGATIVE_INFINITY = float("-inf")


def adjust_logits(
    logits: Tensor,
    table: AdjustmentTable,
    slots: Tensor,
    positions: Tensor,
    levels: Tensor | None,
    history: History | None,
    token_ids: Tensor | None,
    masks: Tensor | None,
    raw: Tensor | None,
) -> None:
    flags = _flags(table, slots)
    ids = slice(logits.shape[-1]) if token_ids is None else token_ids
    if raw is not None:
        rows = _rows((flags & ADJUSTING != 0) & (flags & Flag.LOGPROBS != 0))
        raw[rows] = logits[rows]
    at = positions[:, : logits.shape[1]] if levels is None else positions[:, levels]
    adjusted = _rows(flags & ADJUSTING != 0)
    scores = logits.index_select(0, adjusted).to(torch.promote_types(logits.dtype, torch.float32))
    for flag in ADJUSTING:
        part = _rows(flags[adjusted] & flag != 0)
        if not len(part):
            continue
        rows = adjusted[part]
        slot, old = slots[rows], scores.index_select(0, part)
        if flag is Flag.PENALTIES:
            new = _penalised(old, table, slot, _counts(table.counts[slot], history, rows), ids)
        elif flag is Flag.BIAS:
            bias = _scattered(table.bias_ids[slot], table.bias_values[slot], table.vocab)
            new = old + bias[:, None, ids]
        elif flag is Flag.BANS:
            new = old.masked_fill(~_bit(table.allowed[slot], ids)[:, None], NEGATIVE_INFINITY)
        elif flag is Flag.FORM:
            new = old
            if masks is not None:
                new = old.masked_fill(~_bit(masks[rows], ids), NEGATIVE_INFINITY)
        else:
            ends = table.end_ids[slot]
            is_end = _scattered(ends, torch.ones_like(ends), table.vocab)[:, None, ids] > 0
            early = at[rows] < table.min_length[slot, None]
            new = old.masked_fill(early[..., None] & is_end, NEGATIVE_INFINITY)
        scores.index_copy_(0, part, new)
    logits.index_copy_(0, adjusted, scores.to(logits.dtype))


def _flags(table: AdjustmentTable, slots: Tensor) -> Tensor:
    """[B]; 0 for rows without a slot."""
    return torch.where(slots >= 0, table.flags[slots.clamp_min(0)], 0)


def _rows(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)


def _bit(words: Tensor, ids: Tensor | slice) -> Tensor:
    """words [..., W] -> bool [..., tokens of ids]."""
    places = torch.arange(32, dtype=words.dtype, device=words.device)
    return ((words[..., None] >> places) & 1).bool().flatten(-2)[..., ids]


def _scattered(ids: Tensor, values: Tensor, vocab: int) -> Tensor:
    """[b, K] values at ids -> [b, vocab], 0 elsewhere."""
    padded = values.new_zeros(len(ids), vocab + 1)
    places = torch.where(ids == UNUSED, vocab, ids).long()
    return padded.scatter_(1, places, values)[:, :vocab]


def _counts(output: Tensor, history: History | None, rows: Tensor) -> Tensor:
    """How often output [b, vocab] and path hold each token: [b, 1 or N, vocab]."""
    counts = output[:, None].int()
    if history is None:
        return counts
    tokens, ancestors, nodes = history
    above = (ancestors if nodes is None else ancestors[nodes]).int()
    counts = counts.repeat(1, len(above), 1)
    for column in range(1, tokens.shape[1]):
        place = tokens[rows, column][:, None, None].expand(-1, len(above), 1)
        counts.scatter_add_(2, place, above[None, :, column, None].expand(place.shape))
    return counts


def _penalised(
    scores: Tensor, table: AdjustmentTable, slot: Tensor, counts: Tensor, ids: Tensor | slice
) -> Tensor:
    counts = counts[..., ids]
    seen = (counts > 0) | _bit(table.prompt_seen[slot], ids)[:, None]
    repetition, presence, frequency = (
        penalty[slot].to(scores.dtype)[:, None, None]
        for penalty in (table.repetition, table.presence, table.frequency)
    )
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(seen, repeated, scores)
    return scores - presence * (counts > 0) - frequency * counts


def count_tokens(table: AdjustmentTable, slots: Tensor, tokens: Tensor, how_many: Tensor) -> None:
    rows = _rows(_flags(table, slots) & Flag.PENALTIES != 0)
    for column in range(tokens.shape[1] if len(rows) else 0):
        said = rows[how_many[rows] > column]
        at = slots[said], tokens[said, column]
        table.counts[at] = (table.counts[at].int() + 1).clamp(max=MAX_COUNT).to(torch.int16)


def token_logprobs(
    logits: Tensor,
    raw: Tensor | None,
    table: AdjustmentTable | None,
    slots: Tensor | None,
    path: Tensor | None,
    chosen: Tensor,
) -> Tensor:
    batch = torch.arange(len(chosen), device=chosen.device)[:, None]
    nodes = torch.arange(chosen.shape[1], device=chosen.device)[None] if path is None else path
    scores = logits[batch, nodes]
    if table is not None and slots is not None and raw is not None:
        saved = _flags(table, slots) & ADJUSTING != 0
        scores = torch.where(saved[:, None, None], raw[batch, nodes], scores)
    logprobs = scores.float().log_softmax(dim=-1)
    own = logprobs.gather(-1, chosen[..., None])
    rank = (logprobs > own).sum(dim=-1, keepdim=True) + 1
    best, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    missing = (0, max(0, TOP_LOGPROBS - logits.shape[-1]))
    best = torch.nn.functional.pad(best[..., :TOP_LOGPROBS], missing, value=NEGATIVE_INFINITY)
    ids = torch.nn.functional.pad(ids[..., :TOP_LOGPROBS], missing, value=-1)
    return torch.cat((own, rank, best, ids), dim=-1)
