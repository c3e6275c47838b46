"""Sampling on the GPU: the floor of a row by bisection, the draw in two phases, the walk of a tree.

A row's parameters are read on the device, so a row pays for its own filters and noise only and a
graph replays for any batch. Scores are ordered through the int32 image of fp32 that keeps their
order. Filters share one search: the lowest threshold with less than ``limit`` above it, counted in
tokens (top-k) or in mass (top-p). Contracts: ops; twins: reference_sampling.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquiline.kernels.noise import NoiseKey

MIN_TEMPERATURE = tl.constexpr(1e-6)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of a token that was dropped: above one not there
KEY_OF_NEGATIVE_INFINITY = tl.constexpr(-2139095041)
ROW_BLOCK = 4096  # tokens that a program which owns a whole row looks at together
CHUNK = 2048  # tokens of a program that shares a row
HELD = 2048  # tokens that a program keeps while it searches among them


# ------------------------------------------------------------------------------------ on a row


@triton.jit
def divisor_of(temperature):
    return tl.where(temperature == 0, 1.0, tl.maximum(temperature, MIN_TEMPERATURE))


@triton.jit
def scores_of(row, tokens, inside, divisor):
    """fp32 scores of the tokens; the division rounds as torch's does."""
    logits = tl.load(row + tokens, mask=inside, other=NEGATIVE_INFINITY).to(tl.float32)
    return tl.div_rn(logits, divisor)


@triton.jit
def _key_of(score):
    """An int32 that sorts as the fp32 score does; both zeros are one."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _best_score(row, vocab, divisor, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], NEGATIVE_INFINITY, tl.float32)
    for start in range(0, vocab, BLOCK):
        tokens = start + lanes
        best = tl.maximum(best, scores_of(row, tokens, tokens < vocab, divisor))
    return tl.max(best, axis=0)


@triton.jit
def _mass_from(row, vocab, divisor, best, floor, BLOCK: tl.constexpr):
    """Sum of exp(score - best) over the scores >= floor."""
    lanes = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        tokens = start + lanes
        inside = tokens < vocab
        scores = scores_of(row, tokens, inside, divisor)
        mass += tl.where(inside & (scores >= floor), tl.exp(scores - best), 0.0)
    return tl.sum(mass, axis=0)


# ------------------------------------------------------------------------------------- the floor


@triton.jit
def _raise_bar(
    row, held, vocab, divisor, best, bar, limit,
    BY_MASS: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """The highest key that leaves ``limit`` or more above it: what is kept is above the bar.

    Passes over the row try three bars each, the first time near the best score, where the answer
    usually is, then at the quarters of what is left; as soon as at most HELD tokens lie between
    the bounds these are copied to ``held``, and the search goes on among them in registers.
    NaNs compare false and so raise the bar: the search ends whatever the row holds.
    """
    lanes = tl.arange(0, BLOCK)
    low = bar
    high = _key_of(best).to(tl.int64)
    above_low = vocab + 0  # tokens above the bounds, of the lower one at most
    above_high = 0
    mass_high = 0.0
    key1 = _bar_at(best - 16.0, low, high)
    key2 = _bar_at(best - 6.0, low, high)
    key3 = _bar_at(best - 2.0, low, high)
    while (high - low > 1) & (above_low - above_high > HELD):
        bar1, bar2, bar3 = key1.to(tl.int32), key2.to(tl.int32), key3.to(tl.int32)
        count1 = tl.zeros([BLOCK], tl.int32)
        count2 = tl.zeros([BLOCK], tl.int32)
        count3 = tl.zeros([BLOCK], tl.int32)
        mass1 = tl.zeros([BLOCK], tl.float32)
        mass2 = tl.zeros([BLOCK], tl.float32)
        mass3 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            tokens = start + lanes
            inside = tokens < vocab
            scores = scores_of(row, tokens, inside, divisor)
            keys = _key_of(scores)
            above1 = inside & (keys > bar1)
            above2 = inside & (keys > bar2)
            above3 = inside & (keys > bar3)
            count1 += above1.to(tl.int32)
            count2 += above2.to(tl.int32)
            count3 += above3.to(tl.int32)
            if BY_MASS:
                weights = tl.exp(scores - best)
                mass1 += tl.where(above1, weights, 0.0)
                mass2 += tl.where(above2, weights, 0.0)
                mass3 += tl.where(above3, weights, 0.0)
        total1, total2, total3 = tl.sum(count1, 0), tl.sum(count2, 0), tl.sum(count3, 0)
        sum1, sum2, sum3 = tl.sum(mass1, 0), tl.sum(mass2, 0), tl.sum(mass3, 0)
        if BY_MASS:
            under1, under2, under3 = sum1 < limit, sum2 < limit, sum3 < limit
        else:
            under1, under2, under3 = total1 < limit, total2 < limit, total3 < limit
        above_high = tl.where(
            under1, total1, tl.where(under2, total2, tl.where(under3, total3, above_high))
        )
        mass_high = tl.where(
            under1, sum1, tl.where(under2, sum2, tl.where(under3, sum3, mass_high))
        )
        high = tl.where(under1, key1, tl.where(under2, key2, tl.where(under3, key3, high)))
        above_low = tl.where(
            under1, above_low, tl.where(under2, total1, tl.where(under3, total2, total3))
        )
        low = tl.where(under1, low, tl.where(under2, key1, tl.where(under3, key2, key3)))
        span = high - low
        key1 = low + span // 4
        key2 = low + span // 2
        key3 = low + span * 3 // 4
    if (high - low > 1) & (above_low - above_high > 1):
        count = 0
        for start in range(0, vocab, BLOCK):
            tokens = start + lanes
            inside = tokens < vocab
            scores = scores_of(row, tokens, inside, divisor)
            keys = _key_of(scores)
            between = inside & (keys > low.to(tl.int32)) & (keys <= high.to(tl.int32))
            place = count + tl.cumsum(between.to(tl.int32), 0) - 1
            tl.store(held + place, scores, mask=between & (place < HELD))
            count += tl.sum(between.to(tl.int32), 0)
        tl.debug_barrier()  # what other threads of the program stored is there
        few = tl.arange(0, HELD)
        scores = tl.load(held + few, mask=few < count, other=NEGATIVE_INFINITY)
        tl.debug_barrier()  # the next search stores there
        keys = _key_of(scores)
        weights = tl.exp(scores - best)
        above = above_high  # and mass above the bound that these lie under
        mass = mass_high
        while (high - low > 1) & (above_low - above_high > 1):
            key = low + (high - low) // 2
            over = keys > key.to(tl.int32)
            total = above + tl.sum(over.to(tl.int32), 0)
            if BY_MASS:
                under = mass + tl.sum(tl.where(over, weights, 0.0), 0) < limit
            else:
                under = total < limit
            high = tl.where(under, key, high)
            above_high = tl.where(under, total, above_high)
            low = tl.where(under, low, key)
            above_low = tl.where(under, above_low, total)
    return low


@triton.jit
def _bar_at(score, low, high):
    """The key of a score, within the bounds."""
    return tl.minimum(tl.maximum(_key_of(score).to(tl.int64), low), high)


@triton.jit
def _score_floor_kernel(
    logits, stride_b, stride_n, temperature, top_k, top_p, min_p, held, floor, nodes, vocab,
    BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    row_id = tl.program_id(0)
    held += row_id.to(tl.int64) * HELD
    b = row_id // nodes
    row = logits + b.to(tl.int64) * stride_b + (row_id % nodes).to(tl.int64) * stride_n
    heat = tl.load(temperature + b)
    k = tl.load(top_k + b)
    p = tl.load(top_p + b)
    m = tl.load(min_p + b)
    cut = (k > 0) & (k < vocab)
    lowest = tl.full([], NEGATIVE_INFINITY, tl.float32)
    if (heat > 0) & (cut | (p < 1) | (m > 0)):
        divisor = divisor_of(heat)
        best = _best_score(row, vocab, divisor, BLOCK)
        bar = tl.full([], KEY_OF_NEGATIVE_INFINITY - 1, tl.int64)
        if cut:
            bar = _raise_bar(row, held, vocab, divisor, best, bar, k, False, BLOCK, HELD)
        if p < 1:
            mass = _mass_from(row, vocab, divisor, best, _score_of((bar + 1).to(tl.int32)), BLOCK)
            bar = _raise_bar(row, held, vocab, divisor, best, bar, p * mass, True, BLOCK, HELD)
        lowest = _score_of((bar + 1).to(tl.int32))
        if m > 0:
            lowest = tl.maximum(lowest, best + tl.log(m))
    tl.store(floor + row_id, lowest)


def score_floor(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    logits = with_rows(logits)
    batch, nodes, vocab = logits.shape
    floor = torch.empty(batch, nodes, dtype=torch.float32, device=logits.device)
    held = torch.empty(batch, nodes, HELD, dtype=torch.float32, device=logits.device)
    _score_floor_kernel[(batch * nodes,)](
        logits, logits.stride(0), logits.stride(1), temperature.contiguous(), top_k.contiguous(),
        top_p.contiguous(), min_p.contiguous(), held, floor, nodes, vocab, row_block(vocab), HELD,
        num_warps=16,
    )  # fmt: skip
    return floor


def with_rows(logits: Tensor) -> Tensor:
    """Logits whose rows are contiguous."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def row_block(vocab: int) -> int:
    return min(ROW_BLOCK, int(triton.next_power_of_2(vocab)))


# ------------------------------------------------------------------------------------- the noise


@triton.jit
def _word(seed, token, position, choice, STREAM: tl.constexpr):
    """The 32-bit word of each token: see noise.philox."""
    w0, w1, w2, w3 = tl.philox(seed, token >> 2, position, choice, (token & 0) + STREAM)
    rank = token & 3
    return tl.where(rank == 0, w0, tl.where(rank == 1, w1, tl.where(rank == 2, w2, w3)))


@triton.jit
def _gumbel(words):
    """-log(-log(1 - u)), u = (word + 0.5) / 2^32: see noise.gumbel_noise.

    Below 1/2, log1p(-u) comes from the log of the rounded w = 1 - u (Kahan); above, 1 - u is exact.
    """
    signed = words.to(tl.int32, bitcast=True)
    small = signed >= 0
    half = signed ^ (signed >> 31)  # min(word, 2^32 - 1 - word)
    u = (half.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    w = 1.0 - u
    log = -tl.log(tl.where(small, w, u))
    flat = w == 1.0
    log1p = tl.where(flat, u, log * u / tl.where(flat, 1.0, 1.0 - w))
    return -tl.log(tl.where(small, log1p, log))


# -------------------------------------------------------------------------------------- the draw


@triton.jit
def _draw_chunk_kernel(
    logits, stride_b, stride_n, floor, temperature, seeds, choices, positions, stride_p, levels,
    token_ids, values, indices, nodes, vocab,
    STREAM: tl.constexpr, COUNT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The COUNT best of one chunk of one row; what is dropped ranks last, what is outside never."""
    row_id = tl.program_id(0)
    b, node = row_id // nodes, row_id % nodes
    start = tl.program_id(1) * CHUNK
    lanes = tl.arange(0, CHUNK)
    tokens = start + lanes
    inside = tokens < vocab
    row = logits + b.to(tl.int64) * stride_b + node.to(tl.int64) * stride_n
    if seeds is None:
        perturbed = scores_of(row, tokens, inside, 1.0)
    else:
        heat = tl.load(temperature + b)
        scores = scores_of(row, tokens, inside, divisor_of(heat))
        perturbed = scores
        if heat > 0:
            seed = tl.load(seeds + b)
            choice = tl.load(choices + b).to(tl.uint32)
            level = node.to(tl.int64)
            if levels is not None:
                level = tl.load(levels + node)
            position = tl.load(positions + b.to(tl.int64) * stride_p + level).to(tl.uint32)
            if token_ids is None:  # four words a call
                block = ((start >> 2) + tl.arange(0, CHUNK // 4)).to(tl.uint32)
                zero = block & 0
                w0, w1, w2, w3 = tl.philox(
                    seed, block, zero + position, zero + choice, zero + STREAM
                )
                words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
            else:
                ids = tl.load(token_ids + tokens, mask=inside, other=0).to(tl.uint32)
                zero = ids & 0
                words = _word(seed, ids, zero + position, zero + choice, STREAM)
            perturbed = scores + _gumbel(words)
            if floor is not None:
                perturbed = tl.where(scores >= tl.load(floor + row_id), perturbed, LOWEST)
    perturbed = tl.where(perturbed > LOWEST, perturbed, LOWEST)
    perturbed = tl.where(inside, perturbed, NEGATIVE_INFINITY)
    out = (row_id.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * COUNT
    for rank in range(COUNT):
        best, at = tl.max(perturbed, axis=0, return_indices=True)
        tl.store(values + out + rank, best)
        tl.store(indices + out + rank, start + at)
        perturbed = tl.where(lanes == at, NEGATIVE_INFINITY, perturbed)


@triton.jit
def _draw_merge_kernel(
    values, indices, drawn, candidates, COUNT: tl.constexpr, PADDED: tl.constexpr
):
    """The COUNT best of a row's candidates, which are in order of chunk, then rank."""
    row_id = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, PADDED)
    start = row_id * candidates
    left = tl.load(values + start + lanes, mask=lanes < candidates, other=NEGATIVE_INFINITY)
    for rank in range(COUNT):
        _, at = tl.max(left, axis=0, return_indices=True)
        tl.store(drawn + row_id * COUNT + rank, tl.load(indices + start + at).to(tl.int64))
        left = tl.where(lanes == at, NEGATIVE_INFINITY, left)


def draw_top(
    logits: Tensor,
    floor: Tensor | None,
    temperature: Tensor,
    key: NoiseKey | None,
    levels: Tensor | None,
    token_ids: Tensor | None,
    count: int,
) -> Tensor:
    logits = with_rows(logits)
    batch, nodes, vocab = logits.shape
    assert 1 <= count <= vocab
    chunk = max(min(CHUNK, triton.next_power_of_2(vocab)), 4)
    chunks = triton.cdiv(vocab, chunk)
    rows, candidates, device = batch * nodes, chunks * count, logits.device
    values = torch.empty(rows, candidates, dtype=torch.float32, device=device)
    indices = torch.empty(rows, candidates, dtype=torch.int32, device=device)
    drawn = torch.empty(batch, nodes, count, dtype=torch.int64, device=device)
    noise = RawKey.of(key)
    _draw_chunk_kernel[(rows, chunks)](
        logits, logits.stride(0), logits.stride(1), None if floor is None else floor.contiguous(),
        temperature.contiguous(), noise.seeds, noise.choices, noise.positions, noise.stride,
        levels, token_ids, values, indices, nodes, vocab, noise.stream, count, chunk, num_warps=4,
    )  # fmt: skip
    _draw_merge_kernel[(rows,)](
        values, indices, drawn, candidates, count, triton.next_power_of_2(candidates), num_warps=4
    )
    return drawn


class RawKey(NamedTuple):
    """A NoiseKey as kernel arguments."""

    seeds: Tensor | None
    choices: Tensor | None
    positions: Tensor | None
    stride: int
    stream: int

    @classmethod
    def of(cls, key: NoiseKey | None) -> RawKey:
        if key is None:
            return cls(None, None, None, 0, 0)
        positions = key.positions if key.positions.stride(-1) == 1 else key.positions.contiguous()
        seeds, choices = key.seeds.contiguous(), key.choices.contiguous()
        return cls(seeds, choices, positions, positions.stride(0), int(key.stream))


@triton.jit
def _follow_kernel(
    tokens, drawn, parents, ancestors, routes, depth_out, path_out, drawn_out, nodes, levels,
    NODES: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One request: which nodes match, which of them hang together down from the root."""
    request = tl.program_id(0)
    i = tl.arange(0, NODES)
    ok = i < nodes
    up = tl.load(parents + i, mask=ok, other=0)
    token = tl.load(tokens + request * nodes + i, mask=ok, other=-1)
    wanted = tl.load(drawn + request * nodes + up, mask=ok, other=-2)
    broken = ((token != wanted) & (i > 0) & ok).to(tl.int32)
    pair = ok[:, None] & ok[None, :]
    above = tl.load(ancestors + i[:, None] * nodes + i[None, :], mask=pair, other=0).to(tl.int32)
    reached = (tl.sum(above * broken[None, :], axis=1) == 0) & ok
    depth = tl.sum(above, axis=1) - 1
    deepest = tl.max(tl.where(reached, depth, -1), axis=0)
    leaf = tl.min(tl.where(reached & (depth == deepest), i, NODES), axis=0)
    tl.store(depth_out + request, deepest.to(tl.int64))
    level = tl.arange(0, LEVELS)
    path = tl.load(routes + leaf * levels + level, mask=level < levels, other=0)
    tl.store(path_out + request * levels + level, path, mask=level < levels)
    said = tl.load(drawn + request * nodes + path, mask=level < levels, other=0)
    tl.store(drawn_out + request * levels + level, said, mask=level < levels)


def follow_matches(
    tokens: Tensor, drawn: Tensor, parents: Tensor, ancestors: Tensor, routes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.follow_matches."""
    batch, nodes = tokens.shape
    levels = routes.shape[1]
    depth = tokens.new_empty(batch)
    path, said = tokens.new_empty(batch, levels), tokens.new_empty(batch, levels)
    _follow_kernel[(batch,)](
        tokens.contiguous(), drawn.contiguous(), parents, ancestors.view(torch.uint8), routes,
        depth, path, said, nodes, levels, NODES=triton.next_power_of_2(nodes),
        LEVELS=triton.next_power_of_2(levels),
    )  # fmt: skip
    return depth, path, said
