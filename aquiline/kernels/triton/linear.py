"""Skinny linear: x W^T for 1 to 64 rows of x, at the speed of reading W once.

One program owns some output columns and the whole of K, so the order of summation depends neither
on the number of rows nor on the other programs. What surrounds a linear layer in a transformer is
done at the end of the program, where it is free:

    residual  added in fp32 before the only rounding
    gated     columns of gate and up side by side in one tile: silu(gate) * up leaves
    norm      rms_norm(x) W^T = (x * weight) W^T / rms(x). Whoever writes x also writes x * weight
              of the norm to come and its share of sum x^2 ("scaled", "squares"); whoever reads them
              divides its result by rms(x). Nobody waits for a norm.
    rotary    both halves of some dimensions of a head in one tile: queries and keys are turned,
              keys and values written to the cache
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aquiline.kernels.triton.launch import (
    INTERPRET,
    LINE,
    dependent_launch,
    options,
    prefetch_rows,
)

MAX_ROWS = 64


@triton.jit(do_not_specialize=["rows"])
def _skinny(
    x, w, bias, squares, residual, next_weight, out, next_scaled, next_squares,
    cos, signed_sin, slots, k_cache, v_cache, rows, columns, x_stride, angle_stride, eps,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, NORM_PARTS: tl.constexpr, PARTS_PAD: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NEXT: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr,
    PREFETCH: tl.constexpr, LINE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK_N)
    if GATED:  # the tile is BLOCK_N / 2 gate rows, then the up rows that belong to them
        column = program * (BLOCK_N // 2) + lane % (BLOCK_N // 2)
        n = column + (lane // (BLOCK_N // 2)) * columns
    elif HEADS > 0:  # some low dimensions of a head, then the high ones that turn with them
        tiles: tl.constexpr = D // BLOCK_N
        head = program // tiles
        low = (program % tiles) * (BLOCK_N // 2)
        n = head * D + low + lane % (BLOCK_N // 2) + (lane // (BLOCK_N // 2)) * (D // 2)
        column = n
    else:
        column = program * BLOCK_N + lane
        n = column
    n_ok = column < columns
    w_rows = w + n.to(tl.int64) * K
    if PDL:
        gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch_rows(w_rows.to(tl.int64), n_ok, PREFETCH, LINE)
        gdc_wait()

    m = tl.arange(0, ROWS)
    m_ok = m < rows
    k = tl.arange(0, BLOCK_K)
    x_tile = x + m[None, :] * x_stride + k[:, None]
    w_tile = w_rows[:, None] + k[None, :]
    acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            wt = tl.load(w_tile + start, mask=n_ok[:, None], other=0.0)
            xt = tl.load(x_tile + start, mask=m_ok[None, :], other=0.0)
        else:
            k_ok = k < K - start
            wt = tl.load(w_tile + start, mask=n_ok[:, None] & k_ok[None, :], other=0.0)
            xt = tl.load(x_tile + start, mask=m_ok[None, :] & k_ok[:, None], other=0.0)
        if UPCAST:
            wt, xt = wt.to(tl.float32), xt.to(tl.float32)
        acc = tl.dot(wt, xt, acc, input_precision="ieee")
    if NORM_PARTS > 0:
        part = tl.arange(0, PARTS_PAD)
        place = part[:, None] * ROWS + m[None, :]
        sums = tl.load(squares + place, mask=(part < NORM_PARTS)[:, None], other=0.0)
        acc *= tl.rsqrt(tl.sum(sums, axis=0) / K + eps)[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    if HEADS > 0:
        halves = tl.permute(tl.reshape(acc, (2, BLOCK_N // 2, ROWS)), (1, 2, 0))
        first, second = tl.split(halves)
        i = low + tl.arange(0, BLOCK_N // 2)
        ok = m_ok[None, :] & (i < D // 2)[:, None]
        if head < HEADS + KV_HEADS:
            angle = m[None, :] * angle_stride + i[:, None]
            cos_1 = tl.load(cos + angle, mask=ok, other=0.0).to(tl.float32)
            cos_2 = tl.load(cos + angle + D // 2, mask=ok, other=0.0).to(tl.float32)
            sin_1 = tl.load(signed_sin + angle, mask=ok, other=0.0).to(tl.float32)
            sin_2 = tl.load(signed_sin + angle + D // 2, mask=ok, other=0.0).to(tl.float32)
            turned = first * cos_1 + second * sin_1
            second = second * cos_2 + first * sin_2
            first = turned
        if head < HEADS:
            spot = out + m[None, :] * (HEADS * D) + head * D + i[:, None]
            tl.store(spot, first.to(out.dtype.element_ty), mask=ok)
            tl.store(spot + D // 2, second.to(out.dtype.element_ty), mask=ok)
        else:
            slot = tl.load(slots + m, mask=m_ok, other=0).to(tl.int64)
            kv_head = (head - HEADS) % KV_HEADS
            cell = (slot * KV_HEADS + kv_head)[None, :] * D + i[:, None]
            if head < HEADS + KV_HEADS:
                tl.store(k_cache + cell, first.to(k_cache.dtype.element_ty), mask=ok)
                tl.store(k_cache + cell + D // 2, second.to(k_cache.dtype.element_ty), mask=ok)
            else:
                tl.store(v_cache + cell, first.to(v_cache.dtype.element_ty), mask=ok)
                tl.store(v_cache + cell + D // 2, second.to(v_cache.dtype.element_ty), mask=ok)
        return
    if GATED:
        halves = tl.permute(tl.reshape(acc, (2, BLOCK_N // 2, ROWS)), (1, 2, 0))
        gate, up = tl.split(halves)
        y = gate * tl.sigmoid(gate) * up
        column = program * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    else:
        y = acc
    place = m[None, :] * columns + column[:, None]
    mask = m_ok[None, :] & (column < columns)[:, None]
    if RESIDUAL:
        y += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    rounded = y.to(out.dtype.element_ty)
    tl.store(out + place, rounded, mask=mask)
    if NEXT:
        value = tl.where(mask, rounded.to(tl.float32), 0.0)
        weight = tl.load(next_weight + column, mask=column < columns, other=0.0).to(tl.float32)
        scaled = value * weight[:, None]
        tl.store(next_scaled + place, scaled.to(out.dtype.element_ty), mask=mask)
        tl.store(next_squares + program * ROWS + m, tl.sum(value * value, axis=0))


def tile_of(columns: int, width: int, rows: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_N, BLOCK_K, warps, stages, PREFETCH) for a weight [columns, width] and a padded number
    of rows; measured on an H100 with the shapes of Llama-3.1-8B. PREFETCH is bytes of each weight
    row asked for before the input is there.

    Large weights take 64 columns a warp group and so one instruction whatever the rows, small ones
    always the same tile: a result's bits do not depend on how many rows stand beside it.
    """
    if columns < 4096:  # small: enough programs matter more
        return (32 if columns >= 2048 else 16), (256 if rows <= 16 else 128), 4, 4, 2048
    one_wave = columns <= 64 * 132
    deep = one_wave and width > columns  # few programs with long rows: keep more in flight
    if rows > 16:
        if rows > 32 and columns >= 16384:
            return 128, 128, 4, 3, 0  # x is read by half as many programs
        return 64, 128, 4, 6 if one_wave else 4, 0
    if deep:
        return 64, 128, 4, 6, 0
    if columns >= 32000:  # a head: many waves, of which the first alone could ask ahead
        return 64, 256, 4, 3, 0
    return 64, 256, 4, 4, 2048


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    squares: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
    next_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x [..., K] with at most 64 rows, weight [N, K] -> [..., N], or [..., N / 2] if ``gated``.

    Args:
        squares: [P, R] shares of sum x^2 of the vector that x was scaled from: the product is
            divided by its root mean square.
        next_weight: [N], of the norm that will read the result.

    Returns:
        The result and, for ``next_weight``, result * next_weight and its own squares.
    """
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(*x.shape[:-1], columns)
    scaled = sums = None
    if next_weight is not None:
        scaled = torch.empty_like(out)
        block_n = tile_of(weight.shape[0], weight.shape[1], _padded(x))[0]
        sums = x.new_empty(triton.cdiv(columns, block_n), _padded(x), dtype=torch.float32)
    if residual is not None:
        residual = residual.contiguous()
    _launch(x, weight, bias, squares, eps, residual, next_weight, out, scaled, sums, gated=gated)
    return out, scaled, sums


def skinny_rotary(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    squares: Tensor | None,
    eps: float,
    cos: Tensor,
    signed_sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """See ops.rotary_linear; x as ``skinny_linear`` reads it."""
    kv_heads, size = k_cache.shape[1:]
    heads = weight.shape[0] // size - 2 * kv_heads
    out = x.new_empty(*x.shape[:-1], heads, size)
    rotary = cos, signed_sin, slots, k_cache, v_cache
    _launch(x, weight, bias, squares, eps, None, None, out, None, None, rotary, heads)
    return out


def fits_rotary(weight: Tensor, size: int) -> bool:
    """Whether a tile of this weight lies within one head of ``size``."""
    return size % tile_of(weight.shape[0], weight.shape[1], MAX_ROWS)[0] == 0


def _padded(x: Tensor) -> int:
    """Rows of the tile that holds x's rows; 16 at least, so that the instruction is the same."""
    return max(16, int(triton.next_power_of_2(x.numel() // x.shape[-1])))


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    squares: Tensor | None,
    eps: float,
    residual: Tensor | None,
    next_weight: Tensor | None,
    out: Tensor,
    scaled: Tensor | None,
    sums: Tensor | None,
    rotary: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None,
    heads: int = 0,
    gated: bool = False,
) -> None:
    width = weight.shape[1]
    rows = x.numel() // width
    assert rows <= MAX_ROWS
    assert weight.is_contiguous()
    flat = x.reshape(rows, width)
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    padded = _padded(x)
    block_n, block_k, warps, stages, prefetch = tile_of(weight.shape[0], width, padded)
    programs = triton.cdiv(columns, block_n // 2 if gated else block_n)
    parts = 0 if squares is None else squares.shape[0]
    reach = min(prefetch, width * weight.element_size())
    reach = 1 << (reach.bit_length() - 1) if reach >= LINE else 0
    cos, signed_sin, slots, k_cache, v_cache = rotary or (None,) * 5
    _skinny[(programs,)](
        flat, weight, bias, squares, residual, next_weight, out, scaled, sums, cos, signed_sin,
        slots, k_cache, v_cache, rows, columns, flat.stride(0),
        0 if cos is None else cos.stride(1), eps, K=width, ROWS=padded, BLOCK_N=block_n,
        BLOCK_K=block_k, STAGES=stages, NORM_PARTS=parts,
        PARTS_PAD=triton.next_power_of_2(max(parts, 1)), GATED=gated, BIAS=bias is not None,
        RESIDUAL=residual is not None, NEXT=next_weight is not None, HEADS=heads,
        KV_HEADS=1 if k_cache is None else k_cache.shape[1], D=out.shape[-1] if heads else 1,
        PDL=dependent_launch(), PREFETCH=reach, LINE=LINE, UPCAST=INTERPRET,
        **options(warps, stages),
    )  # fmt: skip
