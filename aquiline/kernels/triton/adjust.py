"""Adjusted logits, counts and log-probabilities on the GPU.

A request's flags are read first: without the one that matters a program ends there, so requests
that ask for nothing pay for a launch and one graph serves every mix. A program owns a chunk of one
row of logits, reads it once and writes it once. Contracts: ops; twins: reference_adjust.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquiline.kernels import adjustments as rows_of
from aquiline.kernels.adjustments import AdjustmentTable, History
from aquiline.kernels.triton.sampling import NEGATIVE_INFINITY, with_rows

PENALTIES = tl.constexpr(int(rows_of.Flag.PENALTIES))
BIAS = tl.constexpr(int(rows_of.Flag.BIAS))
BANS = tl.constexpr(int(rows_of.Flag.BANS))
MIN_TOKENS = tl.constexpr(int(rows_of.Flag.MIN_TOKENS))
LOGPROBS = tl.constexpr(int(rows_of.Flag.LOGPROBS))
FORM = tl.constexpr(int(rows_of.Flag.FORM))
ADJUSTING = tl.constexpr(int(rows_of.ADJUSTING))
MAX_COUNT = tl.constexpr(rows_of.MAX_COUNT)
TOP = tl.constexpr(rows_of.TOP_LOGPROBS)
COLUMNS = tl.constexpr(rows_of.LOGPROB_COLUMNS)
CHUNK = 4096  # tokens of a program that adjusts
TOP_CHUNK = 2048  # tokens of a program that ranks


@triton.jit
def _flags_at(flags, slot):
    """0 for rows without a slot."""
    return tl.load(flags + slot, mask=slot >= 0, other=0)


@triton.jit
def _place(row, ids, SIZE: tl.constexpr):
    """Where each id is in SIZE (a power of two) ascending ids, or else where it would be."""
    at = ids & 0
    step = tl.full([], SIZE // 2, tl.int32)
    while step > 0:
        at += tl.where(tl.load(row + at + (step - 1)) < ids, step, 0)
        step = step // 2
    return at


@triton.jit
def _bit(words, ids, inside):
    return (tl.load(words + (ids >> 5), mask=inside, other=0) >> (ids & 31)) & 1


# --------------------------------------------------------------------------------- the adjustment


@triton.jit
def _adjust_kernel(
    logits, stride_b, stride_n, raw, flags, repetition, presence, frequency, prompt_seen, counts,
    bias_ids, bias_values, allowed, end_ids, min_length, slots, positions, stride_p, levels,
    tokens, stride_t, drafted, ancestors, tree, node_of, token_ids, masks, rows, width, vocab,
    words, BIASED: tl.constexpr, ENDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``width`` indices of logits, ``vocab`` tokens of the table; ``drafted`` columns of tokens."""
    b, n = tl.program_id(0) // rows, tl.program_id(0) % rows
    slot = tl.load(slots + b)
    flag = _flags_at(flags, slot)
    if (flag & ADJUSTING) != 0:
        at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        inside = at < width
        row = logits + b.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n
        stored = tl.load(row + at, mask=inside, other=0.0)
        if raw is not None:
            if (flag & LOGPROBS) != 0:
                tl.store(raw + tl.program_id(0).to(tl.int64) * width + at, stored, mask=inside)
        scores = stored.to(tl.float32)
        ids = at
        if token_ids is not None:
            ids = tl.load(token_ids + at, mask=inside, other=0).to(tl.int32)
        if (flag & PENALTIES) != 0:
            count = tl.load(counts + slot * vocab + ids, mask=inside, other=0).to(tl.int32)
            if tokens is not None:
                node = n.to(tl.int64)
                if node_of is not None:
                    node = tl.load(node_of + n)
                for column in range(1, drafted):
                    if tl.load(ancestors + node * tree + column) != 0:
                        token = tl.load(tokens + b.to(tl.int64) * stride_t + column).to(tl.int32)
                        count += (ids == token).to(tl.int32)
            seen = (count > 0) | (_bit(prompt_seen + slot * words, ids, inside) != 0)
            factor = tl.load(repetition + slot)
            repeated = tl.where(scores > 0, tl.div_rn(scores, factor), scores * factor)
            scores = tl.where(seen, repeated, scores)
            scores -= tl.where(count > 0, tl.load(presence + slot), 0.0)
            scores -= tl.load(frequency + slot) * count.to(tl.float32)
        if (flag & BIAS) != 0:
            entries = bias_ids + slot * BIASED
            place = _place(entries, ids, BIASED)
            biased = tl.load(entries + place) == ids
            value = tl.load(bias_values + slot * BIASED + place, mask=biased, other=0.0)
            scores += value
        if (flag & BANS) != 0:
            may = _bit(allowed + slot * words, ids, inside) != 0
            scores = tl.where(may, scores, NEGATIVE_INFINITY)
        if (flag & MIN_TOKENS) != 0:
            level = n.to(tl.int64)
            if levels is not None:
                level = tl.load(levels + n)
            position = tl.load(positions + b.to(tl.int64) * stride_p + level)
            if position < tl.load(min_length + slot):
                ends = end_ids + slot * ENDS
                is_end = tl.load(ends + _place(ends, ids, ENDS)) == ids
                scores = tl.where(is_end, NEGATIVE_INFINITY, scores)
        if masks is not None:
            if (flag & FORM) != 0:
                may = _bit(masks + tl.program_id(0).to(tl.int64) * words, ids, inside) != 0
                scores = tl.where(may, scores, NEGATIVE_INFINITY)
        tl.store(row + at, scores.to(stored.dtype), mask=inside)


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
    assert logits.stride(-1) == 1
    assert masks is None or masks.is_contiguous()
    assert raw is None or raw.is_contiguous()
    batch, rows, width = logits.shape
    positions = _unit_stride(positions)
    chunk = min(CHUNK, triton.next_power_of_2(width))
    _adjust_kernel[(batch * rows, triton.cdiv(width, chunk))](
        logits, logits.stride(0), logits.stride(1), raw, table.flags, table.repetition,
        table.presence, table.frequency, table.prompt_seen, table.counts, table.bias_ids,
        table.bias_values, table.allowed, table.end_ids, table.min_length, slots.contiguous(),
        positions, positions.stride(0), levels, *_path(history), token_ids, masks, rows,
        width, table.vocab, table.allowed.shape[1], table.bias_ids.shape[1],
        table.end_ids.shape[1], chunk, num_warps=8,
    )  # fmt: skip


def _path(history: History | None) -> tuple[Tensor | int | None, ...]:
    """The history as kernel arguments."""
    if history is None:
        return None, 0, 0, None, 0, None
    tokens = _unit_stride(history.tokens)
    above = history.ancestors.view(torch.uint8)
    return tokens, tokens.stride(0), tokens.shape[1], above, len(above), history.nodes


# -------------------------------------------------------------------------------------- the counts


@triton.jit
def _count_kernel(flags, counts, slots, tokens, stride_t, how_many, vocab, LEVELS: tl.constexpr):
    """One request; a token said twice is written twice, with the same sum."""
    b = tl.program_id(0)
    slot = tl.load(slots + b)
    if (_flags_at(flags, slot) & PENALTIES) != 0:
        lanes = tl.arange(0, LEVELS)
        said = lanes < tl.load(how_many + b)
        row = tokens + b.to(tl.int64) * stride_t
        token = tl.load(row + lanes, mask=said, other=-1)
        same = (token[:, None] == token[None, :]).to(tl.int32)
        places = counts + slot * vocab + token
        count = tl.load(places, mask=said, other=0).to(tl.int32) + tl.sum(same, axis=1)
        tl.debug_barrier()
        tl.store(places, tl.minimum(count, MAX_COUNT).to(tl.int16), mask=said)


def count_tokens(table: AdjustmentTable, slots: Tensor, tokens: Tensor, how_many: Tensor) -> None:
    tokens = _unit_stride(tokens)
    _count_kernel[(len(tokens),)](
        table.flags, table.counts, slots.contiguous(), tokens, tokens.stride(0),
        how_many.contiguous(), table.vocab, triton.next_power_of_2(tokens.shape[1]), num_warps=1,
    )  # fmt: skip


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# ----------------------------------------------------------------------------- log-probabilities


@triton.jit
def _raw_row(logits, stride_b, stride_n, raw, flag, path, row_id, nodes, length, vocab):
    """Where the raw logits lie that a token was drawn from."""
    b = (row_id // length).to(tl.int64)
    node = (row_id % length).to(tl.int64)
    if path is not None:
        node = tl.load(path + row_id)
    row = logits + b * stride_b + node * stride_n
    if raw is not None:
        if (flag & ADJUSTING) != 0:
            row = raw + (b * nodes + node) * vocab
    return row


@triton.jit
def _rank_chunk_kernel(
    logits, stride_b, stride_n, raw, flags, slots, path, chosen, stats, values, ids, nodes, length,
    vocab, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of one chunk of one token's row: largest, sum of exp, how many beat the token, the TOP."""
    row_id = tl.program_id(0)
    flag = tl.full([], LOGPROBS, tl.int32)
    if slots is not None:
        flag = _flags_at(flags, tl.load(slots + row_id // length))
    if (flag & LOGPROBS) != 0:
        row = _raw_row(logits, stride_b, stride_n, raw, flag, path, row_id, nodes, length, vocab)
        own = tl.load(row + tl.load(chosen + row_id)).to(tl.float32)
        lanes = tl.arange(0, CHUNK)
        at = tl.program_id(1) * CHUNK + lanes
        scores = tl.load(row + at, mask=at < vocab, other=NEGATIVE_INFINITY).to(tl.float32)
        best = tl.max(scores, axis=0)
        mass = tl.sum(tl.where(scores > NEGATIVE_INFINITY, tl.exp(scores - best), 0.0), axis=0)
        chunk = row_id.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(stats + 3 * chunk, best)
        tl.store(stats + 3 * chunk + 1, mass)
        tl.store(stats + 3 * chunk + 2, tl.sum((scores > own).to(tl.float32), axis=0))
        for rank in range(TOP):
            value, place = tl.max(scores, axis=0, return_indices=True)
            found = value > NEGATIVE_INFINITY
            tl.store(values + chunk * TOP + rank, value)
            tl.store(
                ids + chunk * TOP + rank, tl.where(found, tl.program_id(1) * CHUNK + place, -1)
            )
            scores = tl.where(lanes == place, NEGATIVE_INFINITY, scores)


@triton.jit
def _rank_merge_kernel(
    logits, stride_b, stride_n, raw, flags, slots, path, chosen, stats, values, ids, out, nodes,
    length, vocab, chunks, CHUNKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """One token: the parts of its row made one."""
    row_id = tl.program_id(0)
    flag = tl.full([], LOGPROBS, tl.int32)
    if slots is not None:
        flag = _flags_at(flags, tl.load(slots + row_id // length))
    if (flag & LOGPROBS) != 0:
        row = _raw_row(logits, stride_b, stride_n, raw, flag, path, row_id, nodes, length, vocab)
        own = tl.load(row + tl.load(chosen + row_id)).to(tl.float32)
        part = tl.arange(0, CHUNKS)
        ok = part < chunks
        first = row_id.to(tl.int64) * chunks
        bests = tl.load(stats + 3 * (first + part), mask=ok, other=NEGATIVE_INFINITY)
        masses = tl.load(stats + 3 * (first + part) + 1, mask=ok, other=0.0)
        above = tl.load(stats + 3 * (first + part) + 2, mask=ok, other=0.0)
        best = tl.max(bests, axis=0)
        total = best + tl.log(tl.sum(masses * tl.exp(bests - best), axis=0))
        out += row_id.to(tl.int64) * COLUMNS
        tl.store(out, own - total)
        tl.store(out + 1, tl.sum(above, axis=0) + 1.0)
        lanes = tl.arange(0, CANDIDATES)
        left = tl.load(
            values + first * TOP + lanes, mask=lanes < chunks * TOP, other=NEGATIVE_INFINITY
        )
        for rank in range(TOP):
            value, place = tl.max(left, axis=0, return_indices=True)
            found = value > NEGATIVE_INFINITY
            token = tl.load(ids + first * TOP + place, mask=found, other=-1)
            tl.store(out + 2 + rank, value - total)
            tl.store(out + 2 + TOP + rank, token.to(tl.float32))
            left = tl.where(lanes == place, NEGATIVE_INFINITY, left)


def token_logprobs(
    logits: Tensor,
    raw: Tensor | None,
    table: AdjustmentTable | None,
    slots: Tensor | None,
    path: Tensor | None,
    chosen: Tensor,
) -> Tensor:
    logits = with_rows(logits)
    batch, length = chosen.shape
    nodes, vocab = logits.shape[1:]
    chunk = min(TOP_CHUNK, triton.next_power_of_2(vocab))
    chunks, rows, device = triton.cdiv(vocab, chunk), batch * length, logits.device
    top = rows_of.TOP_LOGPROBS
    stats = torch.empty(rows, chunks, 3, dtype=torch.float32, device=device)
    values = torch.empty(rows, chunks, top, dtype=torch.float32, device=device)
    ids = torch.empty(rows, chunks, top, dtype=torch.int32, device=device)
    columns = rows_of.LOGPROB_COLUMNS
    out = torch.empty(batch, length, columns, dtype=torch.float32, device=device)
    flags = None if table is None else table.flags
    slots = None if slots is None else slots.contiguous()
    path = None if path is None else path.contiguous()
    common = (logits, logits.stride(0), logits.stride(1), raw, flags, slots, path,
              chosen.contiguous(), stats, values, ids)  # fmt: skip
    _rank_chunk_kernel[(rows, chunks)](*common, nodes, length, vocab, chunk, num_warps=4)
    _rank_merge_kernel[(rows,)](
        *common, out, nodes, length, vocab, chunks, triton.next_power_of_2(chunks),
        triton.next_power_of_2(chunks * top), num_warps=4,
    )  # fmt: skip
    return out
