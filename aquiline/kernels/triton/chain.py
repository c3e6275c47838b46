"""The chain of unrolled attention: a few keys of a row's own beside its prefix, in one pass.

A program has some rows and one key head, hence a tile [R, G, D] of queries. Dot products are sums
over a tile in registers: a row's keys are nobody else's, so there is no product for tensor cores.

Shapes: N rows, H query heads, K key/value heads, G = H / K, D head size, C links of the chain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquiline.kernels.triton.launch import INTERPRET

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TILE = 2048  # elements of a program's queries
WARPS = 4  # no more threads than elements / 8: what is stored in place has one reader


@triton.jit
def _row(pointer, stride, row, d, ok, D: tl.constexpr):
    """fp32 [R, D] of one key head: rows of a tensor [N, K, D] whose rows lie ``stride`` apart."""
    place = row[:, None] * stride + tl.program_id(1) * D + d[None, :]
    return tl.load(pointer + place, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _tile(rows, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, G_PAD: tl.constexpr,
          D_PAD: tl.constexpr):  # fmt: skip
    """Rows, heads of the group and dimensions of this program, and which of them there are."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    g, d = tl.arange(0, G_PAD), tl.arange(0, D_PAD)
    head_ok = (row < rows)[:, None] & (g < G)[None, :]
    return row, tl.program_id(1) * G + g, d, head_ok, head_ok[:, :, None] & (d < D)[None, None, :]


@triton.jit(do_not_specialize=["rows"])
def _chain(
    q, prefix, prefix_lse, k_chain, v_chain, out, lse, rows, q_stride, k_strides, v_strides,
    scale, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, G_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
):  # fmt: skip
    row, head, d, head_ok, ok = _tile(rows, G, D, R, G_PAD, D_PAD)
    row_ok = (row < rows)[:, None] & (d < D)[None, :]
    width = tl.num_programs(1) * G * D
    inner = head[None, :, None] * D + d[None, None, :]
    of_head = head[None, :] * rows.to(tl.int64) + row[:, None]
    queries = tl.load(q + row[:, None, None] * q_stride + inner, mask=ok, other=0.0)
    queries = queries.to(tl.float32) * (scale * LOG2E)
    place = row[:, None, None] * width + inner
    total = tl.load(prefix + place, mask=ok, other=0.0).to(tl.float32)
    top = tl.load(prefix_lse + of_head, mask=head_ok, other=0.0) * LOG2E
    mass = tl.full([R, G_PAD], 1.0, tl.float32)
    for link in tl.static_range(len(k_chain)):
        key = _row(k_chain[link], k_strides[link], row, d, row_ok, D)
        value = _row(v_chain[link], v_strides[link], row, d, row_ok, D)
        score = tl.sum(queries * key[:, None, :], axis=2)
        higher = tl.maximum(top, score)
        kept, weight = tl.exp2(top - higher), tl.exp2(score - higher)
        total = total * kept[:, :, None] + weight[:, :, None] * value[:, None, :]
        mass = mass * kept + weight
        top = higher
    tl.store(out + place, (total / mass[:, :, None]).to(out.dtype.element_ty), mask=ok)
    tl.store(lse + of_head, (top + tl.log2(mass)) * LN2, mask=head_ok)


@triton.jit(do_not_specialize=["rows"])
def _chain_backward(
    grad, q, out, lse, k_chain, v_chain, dq, dkeys, dvalues, rows, q_stride, k_strides,
    v_strides, scale, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, G_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
):  # fmt: skip
    row, head, d, head_ok, ok = _tile(rows, G, D, R, G_PAD, D_PAD)
    row_ok = (row < rows)[:, None] & (d < D)[None, :]
    width = tl.num_programs(1) * G * D
    inner = head[None, :, None] * D + d[None, None, :]
    queries = tl.load(q + row[:, None, None] * q_stride + inner, mask=ok, other=0.0)
    queries = queries.to(tl.float32)
    place = row[:, None, None] * width + inner
    up = tl.load(grad + place, mask=ok, other=0.0).to(tl.float32)
    delta = tl.sum(up * tl.load(out + place, mask=ok, other=0.0).to(tl.float32), axis=2)
    total = tl.load(dq + place, mask=ok, other=0.0).to(tl.float32)
    of_head = head[None, :] * rows.to(tl.int64) + row[:, None]
    log_sum = tl.load(lse + of_head, mask=head_ok, other=0.0) * LOG2E
    link_size = rows.to(tl.int64) * tl.num_programs(1) * D
    own = row[:, None] * (tl.num_programs(1) * D) + tl.program_id(1) * D + d[None, :]
    for link in tl.static_range(len(k_chain)):
        key = _row(k_chain[link], k_strides[link], row, d, row_ok, D)
        value = _row(v_chain[link], v_strides[link], row, d, row_ok, D)
        score = tl.sum(queries * key[:, None, :], axis=2) * scale
        probs = tl.exp2(score * LOG2E - log_sum)
        slope = probs * (tl.sum(up * value[:, None, :], axis=2) - delta) * scale
        total += slope[:, :, None] * key[:, None, :]
        dkey = tl.sum(slope[:, :, None] * queries, axis=1)
        dvalue = tl.sum(probs[:, :, None] * up, axis=1)
        tl.store(dkeys + link * link_size + own, dkey.to(dkeys.dtype.element_ty), mask=row_ok)
        tl.store(dvalues + link * link_size + own, dvalue.to(dkeys.dtype.element_ty), mask=row_ok)
    tl.store(dq + place, total.to(dq.dtype.element_ty), mask=ok)


def merge_chain(
    q: Tensor,
    prefix: Tensor,
    prefix_lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """See ops.merge_chain."""
    q, keys, values = _by_head(q), [_by_head(x) for x in keys], [_by_head(x) for x in values]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], len(q), dtype=torch.float32, device=q.device)
    grid, shape = _cut(q, keys[0])
    _chain[grid](
        q, prefix.contiguous(), prefix_lse.contiguous(), tuple(keys), tuple(values), out, lse,
        len(q), q.stride(0), tuple(x.stride(0) for x in keys), tuple(x.stride(0) for x in values),
        q.shape[2] ** -0.5, **shape,
    )  # fmt: skip
    return out, lse


def merge_chain_backward(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    dq: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """See ops.merge_chain_backward."""
    q, keys, values = _by_head(q), [_by_head(x) for x in keys], [_by_head(x) for x in values]
    dq = dq.contiguous()
    dkeys, dvalues = (q.new_empty(len(keys), *keys[0].shape) for _ in range(2))
    grid, shape = _cut(q, keys[0])
    _chain_backward[grid](
        grad.contiguous(), q, out.contiguous(), lse.contiguous(), tuple(keys), tuple(values), dq,
        dkeys, dvalues, len(q), q.stride(0), tuple(x.stride(0) for x in keys),
        tuple(x.stride(0) for x in values), q.shape[2] ** -0.5, **shape,
    )  # fmt: skip
    return dq, dkeys.unbind(), dvalues.unbind()


def _by_head(x: Tensor) -> Tensor:
    """x [N, heads, D] with the heads of a row side by side; rows may lie apart."""
    return x if x[0].is_contiguous() else x.contiguous()


def _cut(q: Tensor, key: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of a launch."""
    (rows, heads, size), kv_heads = q.shape, key.shape[1]
    group = triton.next_power_of_2(heads // kv_heads)
    padded = triton.next_power_of_2(size)
    block = max(1, TILE // (group * padded))
    shape = {"G": heads // kv_heads, "D": size, "R": block, "G_PAD": group, "D_PAD": padded}
    return (triton.cdiv(rows, block), kv_heads), shape | ({} if INTERPRET else {"num_warps": WARPS})
