"""Skinny linear: x W^T for 1 to 64 rows of x, at the speed of reading W once.

One program owns some output columns and the whole of K, so the order of summation depends neither
on the number of rows nor on the other programs. What surrounds a linear layer in a transformer is
done at the end of the program, where it is free:

    residual  added in fp32 before the only rounding
    gated     columns of gate and up side by side in one tile: silu(gate) * up leaves
    norm      rms_norm(x) W^T = (x * weight) W^T / rms(x). Whoever writes x also writes x * weight
              of the norm to come and its share of sum x^2 ("scaled", "squares"); whoever reads them
              divides its result by rms(x). Nobody waits for a norm.
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


@triton.jit
def _skinny(
    x, w, bias, squares, residual, next_weight, out, next_scaled, next_squares, rows, columns,
    x_stride, eps,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, NORM_PARTS: tl.constexpr, PARTS_PAD: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NEXT: tl.constexpr, PDL: tl.constexpr,
    PREFETCH: tl.constexpr, LINE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK_N)
    if GATED:  # the tile is BLOCK_N / 2 gate rows, then the up rows that belong to them
        column = program * (BLOCK_N // 2) + lane % (BLOCK_N // 2)
        n = column + (lane // (BLOCK_N // 2)) * columns
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


# (columns, width) -> (BLOCK_N, BLOCK_K, warps, stages, PREFETCH), measured on an H100 for
# Llama-3.1-8B.
TILES = {
    (4096, 4096): (32, 256, 4, 5, 2048),
    (4096, 14336): (32, 512, 4, 4, 2048),
    (128256, 4096): (64, 256, 4, 3, 0),
}


def tile_of(columns: int, width: int, rows: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_N, BLOCK_K, warps, stages, PREFETCH) for a weight [columns, width]. PREFETCH is bytes
    of each weight row asked for before the input is there.

    BLOCK_N follows from the shape alone, so that the order of every sum is the same for any number
    of rows; more rows only take room from the pipeline.
    """
    if (columns, width) in TILES:
        block_n, block_k, warps, stages, prefetch = TILES[columns, width]
    else:
        block_n = 64 if columns >= 8192 else 32 if columns >= 2048 else 16
        block_k, warps, stages = 256, 4, 4
        prefetch = 2048 if columns <= 2 * 132 * block_n else 0  # later waves are about to read it
    if rows > 16:
        block_k = min(block_k, 256 if rows <= 32 else 128)
    tile_bytes = (block_n + rows) * block_k * 2
    return block_n, block_k, warps, max(2, min(stages, 200_000 // tile_bytes)), prefetch


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
    width = weight.shape[1]
    rows = x.numel() // width
    assert rows <= MAX_ROWS
    assert weight.is_contiguous()
    flat = x.reshape(rows, width)
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    padded = max(16, triton.next_power_of_2(rows))
    block_n, block_k, warps, stages, prefetch = tile_of(weight.shape[0], width, padded)
    programs = triton.cdiv(columns, block_n // 2 if gated else block_n)
    out = x.new_empty(*x.shape[:-1], columns)
    scaled = sums = None
    if next_weight is not None:
        scaled = torch.empty_like(out)
        sums = x.new_empty(programs, padded, dtype=torch.float32)
    if residual is not None:
        residual = residual.contiguous()
    parts = 0 if squares is None else squares.shape[0]
    reach = min(prefetch, width * weight.element_size())
    reach = 1 << (reach.bit_length() - 1) if reach >= LINE else 0
    _skinny[(programs,)](
        flat, weight, bias, squares, residual, next_weight, out, scaled, sums, rows, columns,
        flat.stride(0), eps, K=width, ROWS=padded, BLOCK_N=block_n, BLOCK_K=block_k,
        STAGES=stages, NORM_PARTS=parts, PARTS_PAD=triton.next_power_of_2(max(parts, 1)),
        GATED=gated, BIAS=bias is not None, RESIDUAL=residual is not None,
        NEXT=next_weight is not None, PDL=dependent_launch(), PREFETCH=reach, LINE=LINE,
        UPCAST=INTERPRET, **options(warps, stages),
    )  # fmt: skip
    return out, scaled, sums
