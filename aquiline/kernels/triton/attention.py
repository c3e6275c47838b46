"""Tree attention over a paged cache: split-KV for small trees, whole tiles for prefill.

The rows of a request that share a key head (T tokens x G query heads) are one tile of a tensor-core
product, so four nodes of a model with four query heads a key head fill it exactly:

    program (split, row tile | key head | request)
        prefix   its share of the committed slots, no mask            | streamed softmax,
        suffix   the last share is the tree, masked by ancestors      | one log-sum-exp
    combine      merges the shares of a row by their log-sum-exp (skipped if there is one share)

Shares follow the lengths, which are read on the device; their number follows shapes alone, so a
CUDA graph can replay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquiline.kernels.triton.launch import INTERPRET, begin, dependent_launch, options

LOG2E = 1.4426950408889634
PROGRAMS = 264  # two per multiprocessor of an H100: enough loads in flight to keep it busy


@triton.jit
def _load_tile(k_cache, v_cache, table, positions, ok, page_stride, d,
               PAGE: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Keys and values [N, D] of one head at logical positions [N]."""
    if ALIGNED:  # the tile lies within one page
        first = tl.min(positions, axis=0)
        page = tl.load(table + first // PAGE)
        slots = page * PAGE + positions % PAGE
    else:
        slots = tl.load(table + positions // PAGE, mask=ok, other=0) * PAGE + positions % PAGE
    place = slots[:, None] * page_stride + d[None, :]
    k = tl.load(k_cache + place, mask=ok[:, None], other=0.0)
    v = tl.load(v_cache + place, mask=ok[:, None], other=0.0)
    return k, v


@triton.jit
def _attend(q, k, v, seen, top, total, acc, UPCAST: tl.constexpr):
    """One step of the streamed softmax: q [R, D] (scaled to base 2) over k, v [N, D]."""
    if UPCAST:
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total, acc


# Rows, shares and strides change with batch and tree; none is worth a compilation of its own.
@triton.jit(
    do_not_specialize=[
        "rows",
        "suffix",
        "table_stride",
        "mask_b",
        "mask_t",
        "shares",
        "prefix_shares",
    ]
)
def _tree_attention(
    q, k_cache, v_cache, page_table, prefix_lengths, mask, out, part_out, part_lse,
    scale, rows, suffix, table_stride, slot_stride, mask_b, mask_t, shares,
    prefix_shares, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, DIRECT: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_SUFFIX: tl.constexpr, STAGES: tl.constexpr,
    SUFFIX_STAGES: tl.constexpr, PDL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) % shares
    row_tile = tl.program_id(0) // shares
    head = tl.program_id(1)
    request = tl.program_id(2)
    table = page_table + request * table_stride
    k_head = k_cache + head * D
    v_head = v_cache + head * D
    n = tl.arange(0, BLOCK_N)
    begin(PDL)
    r = row_tile * BLOCK_R + tl.arange(
        0, BLOCK_R
    )  # row r is token r // GROUP, query head r % GROUP
    t = r // GROUP
    r_ok = t < rows
    d = tl.arange(0, D_PAD)
    d_ok = d < D
    row_place = ((request * rows + t) * HEADS + head * GROUP + r % GROUP)[:, None] * D + d[None, :]
    q_tile = tl.load(q + row_place, mask=r_ok[:, None] & d_ok[None, :], other=0.0)
    q_tile = (q_tile.to(tl.float32) * scale).to(q_tile.dtype)

    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, D_PAD), tl.float32)
    length = tl.load(prefix_lengths + request).to(tl.int32)
    tiles = tl.cdiv(length, BLOCK_N)
    first = tl.minimum((tiles * split) // prefix_shares, tiles)
    last = tl.minimum((tiles * (split + 1)) // prefix_shares, tiles)
    for tile in tl.range(first, last, num_stages=STAGES):
        positions = tile * BLOCK_N + n
        ok = positions < length
        k, v = _load_tile(k_head, v_head, table, positions, ok, slot_stride, d,
                          PAGE, PAGE % BLOCK_N == 0)  # fmt: skip
        top, total, acc = _attend(q_tile, k, v, ok[None, :], top, total, acc, UPCAST)
    if HAS_SUFFIX:
        if split == shares - 1:
            visible = suffix
            if CAUSAL:
                visible = tl.minimum(suffix, ((row_tile + 1) * BLOCK_R - 1) // GROUP + 1)
            for start in tl.range(0, visible, BLOCK_N, num_stages=SUFFIX_STAGES):
                s = start + n
                ok = s < suffix
                k, v = _load_tile(k_head, v_head, table, length + s, ok, slot_stride, d,
                                  PAGE, False)  # fmt: skip
                if CAUSAL:
                    seen = ok[None, :] & (s[None, :] <= t[:, None])
                else:
                    place = request * mask_b + t[:, None] * mask_t + s[None, :]
                    seen = tl.load(mask + place, mask=r_ok[:, None] & ok[None, :], other=0) != 0
                top, total, acc = _attend(q_tile, k, v, seen, top, total, acc, UPCAST)

    safe_total = tl.where(total == 0.0, 1.0, total)
    result = acc / safe_total[:, None]
    if DIRECT:
        tl.store(out + row_place, result.to(out.dtype.element_ty),
                 mask=r_ok[:, None] & d_ok[None, :])  # fmt: skip
    else:  # parts [B, T, H, shares] and [B, T, H, shares, D]
        part = ((request * rows + t) * HEADS + head * GROUP + r % GROUP) * shares + split
        lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(safe_total))
        tl.store(part_lse + part, lse, mask=r_ok)
        tl.store(part_out + part[:, None] * D + d[None, :], result,
                 mask=r_ok[:, None] & d_ok[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["shares"])
def _combine(part_out, part_lse, out, shares, D: tl.constexpr, D_PAD: tl.constexpr,
             SHARES_PAD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One row's shares, weighted by exp(lse - the largest)."""
    begin(PDL)
    row = tl.program_id(0)
    s = tl.arange(0, SHARES_PAD)
    d = tl.arange(0, D_PAD)
    lse = tl.load(part_lse + row * shares + s, mask=s < shares, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, axis=0))
    place = (row * shares + s)[:, None] * D + d[None, :]
    # a share that saw nothing was written as 0
    parts = tl.load(part_out + place, mask=(s < shares)[:, None] & (d < D)[None, :], other=0.0)
    result = tl.sum(parts * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out + row * D + d, result.to(out.dtype.element_ty), mask=d < D)


@dataclass(frozen=True)
class AttentionShape:
    """How the work of one call is cut: by shapes alone, never by lengths."""

    block_r: int
    block_n: int
    splits: int
    warps: int
    stages: int

    @classmethod
    def of(cls, batch: int, rows: int, group: int, kv_heads: int, capacity: int) -> AttentionShape:
        """For ``rows`` tokens a request and a page table of ``capacity`` tokens."""
        packed = rows * group
        block_r = min(max(16, triton.next_power_of_2(packed)), 64)
        programs = batch * kv_heads * triton.cdiv(packed, block_r)
        splits = min(33, PROGRAMS // programs, capacity // 256)
        if rows > MAX_TREE or splits < 4:  # one share more costs more than it balances
            splits = 1
        # A page lookup precedes each tile, so N stages keep N // 2 tiles in flight.
        stages = 3 if rows > MAX_TREE else 7 if splits > 1 and block_r < 64 else 5
        return cls(block_r, 64, splits, 4, stages)


FEW_SHARES = 8  # programs of so few shares are long, and start on an empty card
MAX_TREE = 128  # more rows than this are a prompt


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    page_size: int,
    prefix_lengths: Tensor,
    suffix_rows: int,
    suffix_mask: Tensor | None,
    shape: AttentionShape | None = None,
) -> Tensor:
    """See ops.tree_attention. ``shape`` is for tuning."""
    batch, rows, heads, size = q.shape
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    q = q.contiguous()
    capacity = page_table.shape[1] * page_size
    cut = shape or AttentionShape.of(batch, rows, group, kv_heads, capacity)
    out = torch.empty_like(q)
    part_out = part_lse = out
    if cut.splits > 1:
        part_out = q.new_empty((batch, rows, heads, cut.splits, size), dtype=torch.float32)
        part_lse = q.new_empty((batch, rows, heads, cut.splits), dtype=torch.float32)
    mask_b = mask_t = 0
    mask = suffix_mask
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
        mask_t = mask.stride(-2)
        mask_b = mask.stride(0) if mask.dim() == 3 else 0
    pdl = dependent_launch()
    grid = (cut.splits * triton.cdiv(rows * group, cut.block_r), kv_heads, batch)
    padded = max(16, triton.next_power_of_2(size))
    prefix_shares = cut.splits - 1 if cut.splits > 1 and suffix_rows else cut.splits
    _tree_attention[grid](
        q, k_cache, v_cache, page_table, prefix_lengths, mask, out, part_out, part_lse,
        size**-0.5 * LOG2E, rows, suffix_rows, page_table.stride(0), k_cache.stride(0),
        mask_b, mask_t, cut.splits, prefix_shares, HEADS=heads, GROUP=group, D=size,
        D_PAD=padded, PAGE=page_size, BLOCK_R=cut.block_r, BLOCK_N=cut.block_n,
        DIRECT=cut.splits == 1, CAUSAL=mask is None, HAS_SUFFIX=suffix_rows > 0,
        STAGES=cut.stages, SUFFIX_STAGES=1 if rows <= MAX_TREE else cut.stages, PDL=pdl,
        UPCAST=INTERPRET, **options(cut.warps, cut.stages, early=cut.splits > FEW_SHARES),
    )  # fmt: skip
    if cut.splits > 1:
        _combine[(batch * rows * heads,)](
            part_out, part_lse, out, cut.splits, D=size, D_PAD=padded,
            SHARES_PAD=max(16, triton.next_power_of_2(cut.splits)), PDL=pdl, **options(2),
        )  # fmt: skip
    return out
