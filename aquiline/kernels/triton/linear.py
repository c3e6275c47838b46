"""Skinny linear: x W^T for 1 to 64 rows of x, at the speed of reading W once.

One program owns some output columns and the whole of K, so the order of summation depends neither
on the number of rows nor on the other programs. What surrounds a linear layer in a transformer is
fused where it is free:

    norm      rms_norm(x) = rsqrt(mean x^2) * (x * weight): the product with x * weight is scaled by
              the factor of the row at the end, its mean square gathered on the way
    gated     columns of gate and up side by side in one tile: silu(gate) * up leaves
    residual  added in fp32 before the only rounding
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
    x, w, bias, norm_weight, residual, out, rows, columns, x_stride, eps,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr, LINE: tl.constexpr,
    UPCAST: tl.constexpr,
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
    squares = tl.zeros((BLOCK_K, ROWS), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        left = K - start
        wt = tl.load(w_tile + start, mask=n_ok[:, None] & (k < left)[None, :], other=0.0)
        xt = tl.load(x_tile + start, mask=m_ok[None, :] & (k < left)[:, None], other=0.0)
        if NORM:
            wide = xt.to(tl.float32)
            squares += wide * wide
            scale = tl.load(norm_weight + start + k, mask=k < left, other=0.0)
            xt = (wide * scale.to(tl.float32)[:, None]).to(wt.dtype)
        if UPCAST:
            acc = tl.dot(wt.to(tl.float32), xt.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(wt, xt, acc, input_precision="ieee")
    if NORM:
        acc *= tl.rsqrt(tl.sum(squares, axis=0) / K + eps)[None, :]
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
    tl.store(out + place, y.to(out.dtype.element_ty), mask=mask)


def tile_of(columns: int, width: int) -> tuple[int, int, int, int]:
    """(BLOCK_N, BLOCK_K, warps, stages) for a weight [columns, width]; a choice by shape alone, so
    that the order of summation is the same for any number of rows."""
    block_k = 256 if width % 256 == 0 else 64
    if columns >= 4096:
        return 64, block_k, 4, 4
    return (32 if columns >= 2048 else 16), block_k, 4, 4


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
    tile: tuple[int, int, int, int] | None = None,
    prefetch: int = 4096,
) -> Tensor:
    """x [..., K] with at most 64 rows, weight [N, K] -> [..., N], or [..., N / 2] if ``gated``.

    See ops.linear and ops.gated_linear. ``tile`` and ``prefetch`` (bytes of each weight row that
    are asked for before the input is there) are for tuning.
    """
    width = weight.shape[1]
    rows = x.numel() // width
    assert rows <= MAX_ROWS
    assert weight.is_contiguous()
    flat = x.reshape(rows, width)
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    if residual is not None:
        residual = residual.contiguous()
    block_n, block_k, warps, stages = tile or tile_of(weight.shape[0], width)
    columns_per_program = block_n // 2 if gated else block_n
    pdl = dependent_launch()
    reach = min(prefetch, width * weight.element_size())
    reach = 1 << (reach.bit_length() - 1) if reach >= LINE else 0
    _skinny[(triton.cdiv(columns, columns_per_program),)](
        flat, weight, bias, norm_weight, residual, out, rows, columns, flat.stride(0), eps,
        K=width, ROWS=max(8, triton.next_power_of_2(rows)), BLOCK_N=block_n, BLOCK_K=block_k,
        STAGES=stages, NORM=norm_weight is not None, GATED=gated, BIAS=bias is not None,
        RESIDUAL=residual is not None, PDL=pdl, PREFETCH=reach, LINE=LINE, UPCAST=INTERPRET,
        **options(warps, stages),
    )  # fmt: skip
    return out
