"""The loss between two laws over the vocabulary and its gradient, a program a row, in two or three
passes over both rows.

    1  top and sum of exponentials of either row, eight logits at a time (one rescale for eight)
    2  what is summed over the row; for ce and kl, whose slope needs no such sum, the slope too
    3  the slope of tv and lk

Only the first pass waits for memory: few rows are under way, each is walked back and forth, so the
others find it in the caches. The steps of a position are neighbours and share the target's row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquiline.kernels.triton.launch import INTERPRET

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LANES = tl.constexpr(8)  # neighbours of one thread: 16 bytes in half precision
THREAD = 16  # logits that a thread holds at once; fewer than 64 registers then
WARPS, WIDE_WARPS = 16, 32  # two programs or more a multiprocessor; one
WIDE = 2**18  # bytes of both rows past which two programs' would not stay in the caches


@triton.jit
def _logits(row, ids, place, inside, LOWEST: tl.constexpr):
    """fp32 [BLOCK / 8, 8]; outside, what no exponential sees and no product makes a NaN of."""
    if ids is not None:
        place = tl.load(ids + place, mask=inside, other=0)
    return tl.load(row + place, mask=inside, other=LOWEST).to(tl.float32)


@triton.jit
def _grow(top, total, logits):
    """Each thread's top [BLOCK / 8] and its sum of exponentials, with eight logits more."""
    higher = tl.maximum(top, tl.max(logits, axis=1))
    added = tl.sum(tl.exp2((logits - higher[:, None]) * LOG2E), axis=1)
    return higher, total * tl.exp2((top - higher) * LOG2E) + added


@triton.jit
def _whole(top, total):
    """Top of the row and log2 of its sum of exponentials of (logit - top)."""
    highest = tl.max(top, axis=0)
    return highest, tl.log2(tl.sum(total * tl.exp2((top - highest) * LOG2E), axis=0))


@triton.jit(do_not_specialize=["unrolled", "count"])
def _divergence(
    draft, target, ids, weights, terms, unrolled, count, size, vocab, eta,
    DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """The slope is stored where the draft's logits were: each by the thread that read it last."""
    position = tl.program_id(0) // unrolled
    row = tl.program_id(0) % unrolled * count + position
    draft += row.to(tl.int64) * size
    target += position.to(tl.int64) * vocab
    terms += row
    stride = tl.num_programs(0)
    LATER: tl.constexpr = DIVERGENCE == "tv" or DIVERGENCE == "lk"
    lanes = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    weight = tl.load(weights + row).to(tl.float32)
    if weight == 0:
        for start in range(0, size, BLOCK):
            tl.store(draft + start + lanes, 0.0, mask=start + lanes < size)
        for term in tl.static_range(4):
            tl.store(terms + term * stride, 0.0)
    else:
        lowest = tl.full([BLOCK // LANES], LOWEST, tl.float32)
        zero = tl.zeros([BLOCK // LANES], tl.float32)
        draft_top, draft_sum, law_top, law_sum = lowest, zero, lowest, zero
        for start in range(0, size, BLOCK):
            place = start + lanes
            inside = place < size
            x = _logits(draft, None, place, inside, LOWEST)
            y = _logits(target, ids, place, inside, LOWEST)
            draft_top, draft_sum = _grow(draft_top, draft_sum, x)
            law_top, law_sum = _grow(law_top, law_sum, y)
        draft_best, draft_log = _whole(draft_top, draft_sum)
        law_best, law_log = _whole(law_top, law_sum)
        target_best, target_log = law_best, law_log
        if ids is not None:
            top, total = lowest, zero
            for start in range(0, vocab, BLOCK):
                place = start + lanes
                y = _logits(target, None, place, place < vocab, LOWEST)
                top, total = _grow(top, total, y)
            target_best, target_log = _whole(top, total)

        overlap, cross, negentropy, short_mass, near = zero, zero, zero, zero, lowest
        last = (size - 1) // BLOCK * BLOCK
        for done in range(0, size, BLOCK):
            place = last - done + lanes
            inside = place < size
            x = _logits(draft, None, place, inside, LOWEST) - draft_best
            y = _logits(target, ids, place, inside, LOWEST)
            log_draft = x * LOG2E - draft_log
            log_law = (y - law_best) * LOG2E - law_log
            draft_probs, law = tl.exp2(log_draft), tl.exp2(log_law)
            target_probs = law
            if ids is not None:
                target_probs = tl.exp2((y - target_best) * LOG2E - target_log)
            overlap += tl.sum(tl.minimum(draft_probs, target_probs), axis=1)
            cross += tl.sum(law * log_draft, axis=1)
            # 0 at a token that is the likeliest of both, below it at all others
            near = tl.maximum(near, tl.max(x + (y - target_best), axis=1))
            if DIVERGENCE == "kl" or DIVERGENCE == "lk":
                negentropy += tl.sum(law * log_law, axis=1)
            if LATER:
                short = draft_probs < target_probs
                short_mass += tl.sum(tl.where(short, draft_probs, 0.0), axis=1)
            else:
                slope = weight * (draft_probs - law)
                tl.store(draft + place, slope.to(draft.dtype.element_ty), mask=inside)

        acceptance = tl.sum(overlap, axis=0)
        cross_entropy = -LN2 * tl.sum(cross, axis=0)
        loss = cross_entropy + LN2 * tl.sum(negentropy, axis=0)  # which is 0 for ce
        if LATER:
            blend = 0.0
            if DIVERGENCE == "lk":
                blend = tl.exp2(-LOG2E * eta * acceptance)
            loss = blend * loss + (1 - blend) * (1 - acceptance)
            mean = tl.sum(short_mass, axis=0)
            for start in range(0, size, BLOCK):
                place = start + lanes
                inside = place < size
                x = _logits(draft, None, place, inside, LOWEST) - draft_best
                y = _logits(target, ids, place, inside, LOWEST)
                draft_probs = tl.exp2(x * LOG2E - draft_log)
                target_probs = tl.exp2((y - target_best) * LOG2E - target_log)
                law = target_probs
                if ids is not None:
                    law = tl.exp2((y - law_best) * LOG2E - law_log)
                away = mean - tl.where(draft_probs < target_probs, 1.0, 0.0)
                slope = (1 - blend) * draft_probs * away
                if DIVERGENCE == "lk":
                    slope += blend * (draft_probs - law)
                slope *= weight
                tl.store(draft + place, slope.to(draft.dtype.element_ty), mask=inside)
        tl.store(terms, weight * loss)
        tl.store(terms + stride, cross_entropy)
        tl.store(terms + 2 * stride, acceptance)
        tl.store(terms + 3 * stride, tl.where(tl.max(near, axis=0) == 0, 1.0, 0.0))


def divergence(
    draft: Tensor,
    target: Tensor,
    token_ids: Tensor | None,
    weights: Tensor,
    kind: str,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """See ops.divergence."""
    assert draft.is_contiguous()
    steps, count, size = draft.shape
    bytes_read = size * draft.element_size() + target.shape[1] * target.element_size()
    warps = WARPS if bytes_read <= WIDE else WIDE_WARPS
    block = min(32 * THREAD * warps, max(256, triton.next_power_of_2(size)))
    warps = min(warps, block // 256)  # no two threads for one logit: see _divergence
    ids = None if token_ids is None else token_ids.int()
    terms = torch.empty(4, steps, count, dtype=torch.float32, device=draft.device)
    _divergence[(steps * count,)](
        draft, target.contiguous(), ids, weights.contiguous(), terms, steps, count, size,
        target.shape[1], float(eta), DIVERGENCE=kind,
        BLOCK=block, LOWEST=max(torch.finfo(x.dtype).min for x in (draft, target)) / 4,
        **({} if INTERPRET else {"num_warps": warps}),
    )  # fmt: skip
    return terms.sum(dim=-1), draft
