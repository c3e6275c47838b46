"""Small kernels around the large ones: norm, activation, rotary with the KV write, path commit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquiline.kernels.triton.launch import begin, dependent_launch, options


@triton.jit
def _rms_norm(x, weight, out, stride, eps, SIZE: tl.constexpr, PAD: tl.constexpr,
              PDL: tl.constexpr):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0)
    i = tl.arange(0, PAD)
    value = tl.load(x + row * stride + i, mask=i < SIZE, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, axis=0) / SIZE + eps)
    scale = tl.load(weight + i, mask=i < SIZE, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + i, (value * factor * scale).to(out.dtype.element_ty), mask=i < SIZE)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops.rms_norm."""
    size = x.shape[-1]
    flat = x.reshape(-1, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm[(flat.shape[0],)](
        flat, weight, out, flat.stride(0), eps, SIZE=size, PAD=triton.next_power_of_2(size),
        PDL=dependent_launch(), **options(8 if size >= 2048 else 4),
    )  # fmt: skip
    return out


@triton.jit
def _add_norm(x, residual, weight, total, normed, eps, SIZE: tl.constexpr, PAD: tl.constexpr,
              PDL: tl.constexpr):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0)
    i = tl.arange(0, PAD)
    ok = i < SIZE
    value = tl.load(x + row * SIZE + i, mask=ok, other=0.0).to(tl.float32)
    value += tl.load(residual + row * SIZE + i, mask=ok, other=0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + row * SIZE + i, rounded, mask=ok)
    value = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, axis=0) / SIZE + eps)
    scale = tl.load(weight + i, mask=ok, other=0.0).to(tl.float32)
    tl.store(normed + row * SIZE + i, (value * factor * scale).to(normed.dtype.element_ty), mask=ok)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual, and its rms_norm."""
    size = x.shape[-1]
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _add_norm[(x.numel() // size,)](
        x.contiguous(), residual.contiguous(), weight, total, normed, eps, SIZE=size,
        PAD=triton.next_power_of_2(size), PDL=dependent_launch(),
        **options(8 if size >= 2048 else 4),
    )  # fmt: skip
    return total, normed


@triton.jit
def _silu_mul(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)  # a training batch can pass 2^31 elements
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out + row * SIZE + i, y.to(out.dtype.element_ty), mask=i < SIZE)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See ops.silu_mul."""
    size = gate_up.shape[-1] // 2
    flat = gate_up.reshape(-1, 2 * size).contiguous()
    out = gate_up.new_empty(*gate_up.shape[:-1], size)
    block = min(4096, triton.next_power_of_2(size))
    _silu_mul[(flat.shape[0], triton.cdiv(size, block))](
        flat, out, SIZE=size, BLOCK=block, PDL=dependent_launch(), **options(4)
    )
    return out


@triton.jit
def _rotary_write(
    heads, cos, signed_sin, k_cache, v_cache, slots, q_out, angle_stride,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HEADS_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: query heads are turned and stored, key heads turned into the cache, values copied.

    Program axis 1 takes HEADS_PAD heads.
    """
    begin(PDL)
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS_PAD + tl.arange(0, HEADS_PAD)
    i = tl.arange(0, HALF_PAD)
    half_ok = i < D // 2
    ok = (head < H + 2 * K)[:, None] & half_ok[None, :]
    place = token * (H + 2 * K) * D + head[:, None] * D + i[None, :]
    low = tl.load(heads + place, mask=ok, other=0.0)
    high = tl.load(heads + place + D // 2, mask=ok, other=0.0)
    angle = token * angle_stride + i
    cos_low = tl.load(cos + angle, mask=half_ok, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + angle + D // 2, mask=half_ok, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(signed_sin + angle, mask=half_ok, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(signed_sin + angle + D // 2, mask=half_ok, other=0.0).to(tl.float32)[None, :]
    turned_low = (low.to(tl.float32) * cos_low + high.to(tl.float32) * sin_low).to(low.dtype)
    turned_high = (high.to(tl.float32) * cos_high + low.to(tl.float32) * sin_high).to(low.dtype)

    q_place = token * H * D + head[:, None] * D + i[None, :]
    is_q = ok & (head < H)[:, None]
    tl.store(q_out + q_place, turned_low, mask=is_q)
    tl.store(q_out + q_place + D // 2, turned_high, mask=is_q)
    slot = tl.load(slots + token).to(tl.int64)
    k_place = (slot * K + head[:, None] - H) * D + i[None, :]
    is_k = ok & ((head >= H) & (head < H + K))[:, None]
    tl.store(k_cache + k_place, turned_low, mask=is_k)
    tl.store(k_cache + k_place + D // 2, turned_high, mask=is_k)
    v_place = k_place - K * D
    is_v = ok & (head >= H + K)[:, None]
    tl.store(v_cache + v_place, low, mask=is_v)
    tl.store(v_cache + v_place + D // 2, high, mask=is_v)


def rotary_write(
    heads: Tensor, cos: Tensor, signed_sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> Tensor:
    """See ops.rotary_write."""
    batch, rows, count, size = heads.shape
    kv_heads = k_cache.shape[1]
    heads = heads.contiguous()
    query_heads = count - 2 * kv_heads
    q = heads.new_empty(batch, rows, query_heads, size)
    block = min(16, triton.next_power_of_2(count))
    _rotary_write[(batch * rows, triton.cdiv(count, block))](
        heads, cos, signed_sin, k_cache, v_cache, slots, q, cos.stride(1), H=query_heads,
        K=kv_heads, D=size, HEADS_PAD=block, HALF_PAD=triton.next_power_of_2(size // 2),
        PDL=dependent_launch(), **options(4),
    )  # fmt: skip
    return q


@triton.jit
def _move_kv(cache, source, target, plane_stride, SLOT: tl.constexpr, BLOCK: tl.constexpr,
             COLUMNS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    begin(PDL)
    request = tl.program_id(0)
    plane = cache + tl.program_id(1).to(tl.int64) * plane_stride
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    for column in range(COLUMNS):  # in order: a target is never a later source
        origin = tl.load(source + request * COLUMNS + column).to(tl.int64)
        place = tl.load(target + request * COLUMNS + column).to(tl.int64)
        value = tl.load(plane + origin * SLOT + i, mask=i < SLOT)
        tl.store(plane + place * SLOT + i, value, mask=(i < SLOT) & (origin != place))


def move_kv(cache: Tensor, source: Tensor, target: Tensor) -> None:
    """See ops.move_kv."""
    layers, both, _, kv_heads, size = cache.shape
    width = kv_heads * size
    block = min(2048, triton.next_power_of_2(width))
    batch, columns = source.shape
    _move_kv[(batch, layers * both, triton.cdiv(width, block))](
        cache, source.contiguous(), target.contiguous(), cache.stride(1), SLOT=width, BLOCK=block,
        COLUMNS=columns, PDL=dependent_launch(), **options(4),
    )  # fmt: skip


@triton.jit
def _slots_at(page_table, positions, out, table_stride, columns, PAGE: tl.constexpr,
              BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    begin(PDL)
    request = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < columns
    position = tl.load(positions + request * columns + column, mask=ok, other=0)
    page = tl.load(page_table + request * table_stride + position // PAGE, mask=ok, other=0)
    tl.store(out + request * columns + column, page * PAGE + position % PAGE, mask=ok)


def slots_at(page_table: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """See ops.slots_at."""
    batch, columns = positions.shape
    positions = positions.contiguous()
    out = torch.empty_like(positions)
    block = min(1024, max(16, triton.next_power_of_2(columns)))
    _slots_at[(batch, triton.cdiv(columns, block))](
        page_table, positions, out, page_table.stride(0), columns, PAGE=page_size, BLOCK=block,
        PDL=dependent_launch(), **options(1),
    )  # fmt: skip
    return out


@triton.jit
def _pending_rows(page_table, lengths, counts, start, positions, slots, table_stride, width,
                  PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    begin(PDL)
    request = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    count = tl.load(counts + request)
    first = tl.load(lengths + request) - count
    tl.store(start + request, first)
    valid = column < count
    position = tl.where(valid, first + column, 0)
    page = tl.load(page_table + request * table_stride + position // PAGE, mask=valid, other=0)
    slot = tl.where(valid, page * PAGE + position % PAGE, 0)
    place = request * width + column
    tl.store(positions + place, position, mask=column < width)
    tl.store(slots + place, slot, mask=column < width)


def pending_rows(
    page_table: Tensor, lengths: Tensor, counts: Tensor, width: int, page_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.pending_rows."""
    batch = len(lengths)
    start = torch.empty_like(lengths)
    positions, slots = lengths.new_empty(batch, width), lengths.new_empty(batch, width)
    _pending_rows[(batch,)](
        page_table, lengths, counts, start, positions, slots, page_table.stride(0), width,
        PAGE=page_size, BLOCK=triton.next_power_of_2(width), PDL=dependent_launch(), **options(1),
    )  # fmt: skip
    return start, positions, slots
