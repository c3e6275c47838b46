"""The multi-round walk on the GPU: one program per request, no probabilities in memory.

At a node the residual after j rejections is a function of one token's target and draft logits and
of 2 j numbers: with residual_0 = target_probs and proposal_i = draft_probs / remaining_i,

    residual_(i+1) = max(0, residual_i - proposal_i) / mass_i

(a rejected token's residual is 0 ever after, so it need not be taken out of the proposal). So each
rejection is one pass over the vocabulary that finds the next mass and what the draft has left.
The last residual goes to memory as logarithms, and the draw is that of sampling.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquiline.kernels.noise import NoiseKey
from aquiline.kernels.triton.sampling import (
    NEGATIVE_INFINITY,
    RawKey,
    divisor_of,
    draw_top,
    row_block,
    scores_of,
    with_rows,
)

# ----------------------------------------------------------------------- what a softmax needs


@triton.jit
def _statistics_kernel(
    logits, stride_b, stride_n, floor, temperature, stats, peaks, nodes, vocab, BLOCK: tl.constexpr
):
    """stats: the largest score of a row and the sum of exp(score - it) kept; peaks: where it is."""
    row_id = tl.program_id(0)
    b = row_id // nodes
    row = logits + b.to(tl.int64) * stride_b + (row_id % nodes).to(tl.int64) * stride_n
    divisor = divisor_of(tl.load(temperature + b))
    lanes = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], NEGATIVE_INFINITY, tl.float32)
    where = lanes
    for start in range(0, vocab, BLOCK):
        tokens = start + lanes
        scores = scores_of(row, tokens, tokens < vocab, divisor)
        where = tl.where(scores > largest, tokens, where)
        largest = tl.maximum(largest, scores)
    best = tl.max(largest, axis=0)
    peak = tl.min(tl.where(largest == best, where, vocab), axis=0)  # ties: the lowest index
    least = NEGATIVE_INFINITY
    if floor is not None:
        least = tl.load(floor + row_id)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        tokens = start + lanes
        scores = scores_of(row, tokens, tokens < vocab, divisor)
        total += tl.where(scores >= least, tl.exp(scores - best), 0.0)
    tl.store(stats + 2 * row_id, best)
    tl.store(stats + 2 * row_id + 1, tl.sum(total, axis=0))
    tl.store(peaks + row_id, peak)


# -------------------------------------------------------------------------------------- the walk


@triton.jit
def _probs(row, tokens, inside, divisor, floor, row_id, stats):
    """The softmax of the scores kept; 0 outside."""
    scores = scores_of(row, tokens, inside, divisor)
    probs = tl.exp(scores - tl.load(stats + 2 * row_id)) / tl.load(stats + 2 * row_id + 1)
    kept = inside
    if floor is not None:
        kept = inside & (scores >= tl.load(floor + row_id))
    return tl.where(kept, probs, 0.0)


@triton.jit
def _target_probs(row, tokens, inside, heat, floor, row_id, stats, peaks):
    probs = _probs(row, tokens, inside, divisor_of(heat), floor, row_id, stats)
    at_peak = (tokens == tl.load(peaks + row_id)).to(tl.float32)
    return tl.where(heat == 0, at_peak, probs)


@triton.jit
def _draft_probs(row, columns, tokens, inside, heat, floor, row_id, stats):
    """Of target tokens, which lie at ``columns`` of the draft's row or nowhere."""
    places = tokens
    if columns is not None:
        places = tl.load(columns + tokens, mask=inside, other=-1)
        inside = places >= 0
    return _probs(row, places, inside, divisor_of(heat), floor, row_id, stats)


@triton.jit
def _after_rejections(residual, draft_probs, steps, rejected):
    """The residual of tokens with the given target and draft probabilities."""
    for i in range(rejected):
        remaining, mass = tl.load(steps + 2 * i), tl.load(steps + 2 * i + 1)
        proposal = _renormalised(draft_probs, remaining)
        left = tl.maximum(residual - proposal, 0.0)
        residual = tl.where(mass > 0, left / mass, residual)
    return residual


@triton.jit
def _renormalised(probs, total):
    return tl.where(total > 0, probs / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def _uniform(seed, choice, position, rank, STREAM: tl.constexpr):
    """(word + 0.5) / 2^32 in fp64: see noise.uniform_noise."""
    block = (tl.full([1], 0, tl.int32) + rank // 4).to(tl.uint32)
    zero = block & 0
    w0, w1, w2, w3 = tl.philox(seed, block, zero + position, zero + choice, zero + STREAM)
    place = rank % 4
    word = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
    return (tl.sum(word.to(tl.float64), axis=0) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _walk_kernel(
    target, target_stride_b, target_stride_n, target_floor, target_stats, target_peaks,
    draft, draft_stride_b, draft_stride_n, draft_floor, draft_stats,
    tokens, temperature, children, draft_rows, columns,
    seeds, choices, positions, stride_p, steps, leaf, depth_of_leaf, log_residual,
    nodes, expanded, vocab, STREAM: tl.constexpr, SIBLINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    wide = b.to(tl.int64)
    heat = tl.load(temperature + b)
    seed = tl.load(seeds + b)
    choice = tl.load(choices + b).to(tl.uint32)
    steps += 2 * SIBLINGS * b
    lanes = tl.arange(0, BLOCK)
    node = tl.full([], 0, tl.int64)
    depth = tl.full([], 0, tl.int64)
    rejected = tl.full([], 0, tl.int32)
    walking = tl.full([], 1, tl.int32)
    while walking > 0:
        row_id = b * nodes + node
        row = target + wide * target_stride_b + node * target_stride_n
        place = tl.load(draft_rows + node)
        draft_id = b * expanded + place
        draft_row = draft + wide * draft_stride_b + place * draft_stride_n
        position = tl.load(positions + wide * stride_p + depth).to(tl.uint32)
        rejected = tl.full([], 0, tl.int32)
        remaining = tl.full([], 1.0, tl.float32)
        taken = tl.full([], -1, tl.int64)
        child = tl.load(children + node * SIBLINGS)
        while child >= 0:
            token = tl.load(tokens + b * nodes + child)
            drafted = _draft_probs(
                draft_row, columns, token, token >= 0, heat, draft_floor, draft_id, draft_stats,
            )  # fmt: skip
            residual = _target_probs(
                row, token, token >= 0, heat, target_floor, row_id, target_stats, target_peaks
            )
            residual = _after_rejections(residual, drafted, steps, rejected)
            drawn_with = _renormalised(drafted, remaining)
            uniform = _uniform(seed, choice, position, rejected, STREAM)
            ratio = uniform * drawn_with.to(tl.float64)
            if (drawn_with > 0) & (ratio < residual.to(tl.float64)):
                taken = child
                child = tl.full([], -1, tl.int64)
            else:
                left = tl.zeros([BLOCK], tl.float32)
                kept = tl.zeros([BLOCK], tl.float32)
                for start in range(0, vocab, BLOCK):
                    ids = start + lanes
                    inside = ids < vocab
                    probs = _draft_probs(
                        draft_row, columns, ids, inside, heat, draft_floor, draft_id, draft_stats,
                    )  # fmt: skip
                    residuals = _target_probs(
                        row, ids, inside, heat, target_floor, row_id, target_stats, target_peaks
                    )
                    residuals = _after_rejections(residuals, probs, steps, rejected)
                    left += tl.maximum(residuals - _renormalised(probs, remaining), 0.0)
                    for rank in range(rejected + 1):  # those tried are gone
                        tried = tl.load(children + node * SIBLINGS + rank)
                        gone = ids == tl.load(tokens + b * nodes + tried)
                        probs = tl.where(gone, 0.0, probs)
                    kept += probs
                tl.store(steps + 2 * rejected, remaining)
                tl.store(steps + 2 * rejected + 1, tl.sum(left, axis=0))
                tl.debug_barrier()
                remaining = tl.sum(kept, axis=0)
                rejected += 1
                more = rejected < SIBLINGS
                child = tl.load(children + node * SIBLINGS + rejected, mask=more, other=-1)
        if taken >= 0:
            node = taken
            depth += 1
        else:
            walking = tl.full([], 0, tl.int32)
    tl.store(leaf + b, node)
    tl.store(depth_of_leaf + b, depth)
    row_id = b * nodes + node
    row = target + wide * target_stride_b + node * target_stride_n
    place = tl.load(draft_rows + node)
    draft_id = b * expanded + place
    draft_row = draft + wide * draft_stride_b + place * draft_stride_n
    for start in range(0, vocab, BLOCK):
        ids = start + lanes
        inside = ids < vocab
        residuals = _target_probs(
            row, ids, inside, heat, target_floor, row_id, target_stats, target_peaks
        )
        if rejected > 0:
            probs = _draft_probs(
                draft_row, columns, ids, inside, heat, draft_floor, draft_id, draft_stats,
            )  # fmt: skip
            residuals = _after_rejections(residuals, probs, steps, rejected)
        logs = tl.where(residuals > 0, tl.log(residuals), NEGATIVE_INFINITY)
        tl.store(log_residual + wide * vocab + ids, logs, mask=inside)


def multi_round_accept(
    target_logits: Tensor,
    target_floor: Tensor | None,
    draft_logits: Tensor,
    draft_floor: Tensor | None,
    tokens: Tensor,
    temperature: Tensor,
    children: Tensor,
    draft_rows: Tensor,
    draft_columns: Tensor | None,
    accept_key: NoiseKey,
    residual_key: NoiseKey,
) -> tuple[Tensor, Tensor]:
    target, draft = with_rows(target_logits), with_rows(draft_logits)
    batch, nodes, vocab = target.shape
    siblings, device = children.shape[1], target.device
    temperature = temperature.contiguous()
    target_args = _with_statistics(target, target_floor, temperature)
    draft_args = _with_statistics(draft, draft_floor, temperature)[:-1]  # its peak is not asked
    steps = torch.empty(batch, siblings, 2, dtype=torch.float32, device=device)
    leaf = torch.empty(batch, dtype=torch.int64, device=device)
    depth = torch.empty_like(leaf)
    log_residual = torch.empty(batch, 1, vocab, dtype=torch.float32, device=device)
    noise = RawKey.of(accept_key)
    _walk_kernel[(batch,)](
        *target_args, *draft_args, tokens.contiguous(), temperature, children, draft_rows,
        draft_columns, noise.seeds, noise.choices, noise.positions, noise.stride, steps, leaf,
        depth, log_residual, nodes, draft.shape[1], vocab, noise.stream, siblings,
        row_block(vocab), num_warps=16,
    )  # fmt: skip
    key = replace(residual_key, positions=residual_key.positions.gather(1, depth[:, None]))
    # The logarithms are scores already: one temperature for all, and none of it greedy.
    drawn = draw_top(log_residual, None, torch.ones_like(temperature), key, None, None, 1)
    return leaf, drawn[:, 0, 0]


def _with_statistics(
    logits: Tensor, floor: Tensor | None, temperature: Tensor
) -> tuple[Tensor | int | None, ...]:
    """Logits as kernel arguments: pointer, strides, floor, stats and peaks."""
    batch, nodes, vocab = logits.shape
    stats = torch.empty(batch, nodes, 2, dtype=torch.float32, device=logits.device)
    peaks = torch.empty(batch, nodes, dtype=torch.int32, device=logits.device)
    floor = None if floor is None else floor.contiguous()
    if nodes:
        _statistics_kernel[(batch * nodes,)](
            logits, logits.stride(0), logits.stride(1), floor, temperature, stats, peaks,
            nodes, vocab, row_block(vocab), num_warps=16,
        )  # fmt: skip
    return logits, logits.stride(0), logits.stride(1), floor, stats, peaks
