"""Prefill: the prompt through target and draft, with one sampling step fused to its end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.attention.paged import PagedAttention, TreePlan
from aquiline.decoding.models import DecoderModels, Planes
from aquiline.decoding.state import DecodeState
from aquiline.kernels import ops
from aquiline.kvcache.pool import KVPlane
from aquiline.sampling.batch import SamplingBatch
from aquiline.sampling.draw import draw, position_noise


@dataclass(frozen=True)
class Prefilled:
    """The state for the first round, whose ``roots`` are the first tokens, and their
    log-probabilities [B, 1, ...], see ops.token_logprobs; None if nobody wants them. ``features``
    [B, T, d] are the target's after every token of the prompts."""

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
    sources: Tensor | None = None,
    masks: Tensor | None = None,
) -> Prefilled:
    """Run whole prompts and draw first tokens.

    Args:
        page_table: [B, M] pages with room for the prompts.
        tokens: [B, T] prompt tokens, padded on the right; ``counts`` [B] are valid.
        sources: [C] the prompt that each row of ``sampling`` continues; None: row by row.
        masks: [C, 1, ceil(V / 32)] what the forms of texts allow first, see ops.adjust_logits.
    """
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    valid = columns < counts[:, None]
    positions = torch.where(valid, columns, 0)
    start = torch.zeros_like(counts)

    def attention(plane: KVPlane, rows: int) -> PagedAttention:
        slots = ops.slots_at(page_table, positions[:, :rows], plane.page_size)
        slots = torch.where(valid[:, :rows], slots, 0)
        return PagedAttention(plane, TreePlan(page_table, start, slots, rows))

    def at_end(x: Tensor) -> Tensor:
        last = x.gather(1, (counts - 1)[:, None, None].expand(-1, 1, x.shape[-1]))
        return last if sources is None else last.index_select(0, sources)

    target_attention = attention(planes.target, len(columns))
    output = models.target(tokens, positions, target_attention, models.taps)
    features = models.draft_features(output)
    lengths = counts if sources is None else counts.index_select(0, sources)
    logits = models.target.logits(at_end(output.features))
    first, logprobs = _first_tokens(logits, sampling, lengths[:, None], masks)
    drafter = models.drafter
    if drafter is not None and planes.draft is not None and len(columns) > 1:
        # Pair (t_{i+1}, h_i) for every i below the last; that one waits for the drawn token. A
        # shorter prompt's last row pairs with padding; the first round overwrites its slot.
        rows = len(columns) - 1
        hidden = drafter.draft.fuse(features[:, :rows])
        drafter.draft(drafter.embed(tokens[:, 1:]), hidden, positions[:, :rows],
                      attention(planes.draft, rows))  # fmt: skip
    ones = torch.ones_like(lengths)
    state = DecodeState(lengths, first.squeeze(1), first, at_end(features), ones)
    return Prefilled(state, logprobs, output.features)


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
