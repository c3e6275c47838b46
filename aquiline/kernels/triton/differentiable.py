"""Norm, activation and rotary of a training step: the small kernels with their gradients.

Everything here waits for memory alone, so each gradient is one pass that computes again what it
needs of the forward pass: the root mean square, the activation. A gradient of a norm's weight is a
sum over rows that a fixed number of programs take in turn, then one over programs: no atomics, so
it is the same to the bit in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquiline.kernels.triton import elementwise
from aquiline.kernels.triton.launch import INTERPRET

PROGRAMS = 264  # of a norm's gradient: two on each multiprocessor of an H100
ROWS = 4096  # elements of such a program's rows
TILE = 2048  # of an activation's share
PAIRS = 1024  # of a rotary program; 8 a thread, so that what is turned in place has one reader
WARPS = 4


def _warps(count: int) -> dict[str, int]:
    return {} if INTERPRET else {"num_warps": count}


# -------------------------------------------------------------------------------------------- norm


@triton.jit(do_not_specialize=["rows"])
def _norm_backward(
    x, weight, grad, carried, dx, dweight, rows, eps, SIZE: tl.constexpr, PAD: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, PAD)
    scale = tl.load(weight + i, mask=i < SIZE, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([R, PAD], tl.float32)
    for start in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = (start + tl.arange(0, R)).to(tl.int64)
        ok = (row < rows)[:, None] & (i < SIZE)[None, :]
        place = row[:, None] * SIZE + i[None, :]
        value = tl.load(x + place, mask=ok, other=0.0).to(tl.float32)
        slope = tl.load(grad + place, mask=ok, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(value * value, axis=1) / SIZE + eps)[:, None]
        unit = value * factor
        total += slope * unit
        slope *= scale
        slope = (slope - unit * (tl.sum(slope * unit, axis=1) / SIZE)[:, None]) * factor
        if carried is not None:
            slope += tl.load(carried + place, mask=ok, other=0.0).to(tl.float32)
        tl.store(dx + place, slope.to(dx.dtype.element_ty), mask=ok)
    tl.store(dweight + tl.program_id(0) * SIZE + i, tl.sum(total, axis=0), mask=i < SIZE)


def norm_backward(
    x: Tensor, weight: Tensor, eps: float, grad: Tensor, carried: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight for ``grad`` of rms_norm(x) and, straight on, ``carried`` of x."""
    size = x.shape[-1]
    x, rows = x.contiguous(), x.numel() // size
    pad = triton.next_power_of_2(size)
    block = max(1, ROWS // pad)
    programs = min(PROGRAMS, triton.cdiv(rows, block))
    dx = torch.empty_like(x)
    shares = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    _norm_backward[(programs,)](
        x, weight, grad.contiguous(), None if carried is None else carried.contiguous(), dx, shares,
        rows, eps, SIZE=size, PAD=pad, R=block, **_warps(16 if pad > ROWS else 8),
    )  # fmt: skip
    return dx, shares.sum(dim=0).to(weight.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return elementwise.rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (*norm_backward(x, weight, ctx.eps, grad, None), None)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, normed = elementwise.add_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total, normed

    @staticmethod
    def backward(ctx: Any, carried: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        dx, dweight = norm_backward(total, weight, ctx.eps, grad, carried)
        return dx, dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops.rms_norm."""
    return _RmsNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual, and its rms_norm."""
    return _AddNorm.apply(x, residual, weight, eps)  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------- activation


@triton.jit
def _silu_mul_backward(gate_up, grad, out, count, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = place < count
    pair = place + place // SIZE * SIZE  # of the row's first half
    gate = tl.load(gate_up + pair, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(gate_up + pair + SIZE, mask=ok, other=0.0).to(tl.float32)
    slope = tl.load(grad + place, mask=ok, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    dgate = slope * up * share * (1 + gate * (1 - share))
    tl.store(out + pair, dgate.to(out.dtype.element_ty), mask=ok)
    tl.store(out + pair + SIZE, (slope * gate * share).to(out.dtype.element_ty), mask=ok)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return elementwise.silu_mul(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up = ctx.saved_tensors[0].contiguous()
        out = torch.empty_like(gate_up)
        _silu_mul_backward[(triton.cdiv(grad.numel(), TILE),)](
            gate_up, grad.contiguous(), out, grad.numel(), SIZE=grad.shape[-1], BLOCK=TILE,
            **_warps(WARPS),
        )  # fmt: skip
        return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """See ops.silu_mul."""
    return _SiluMul.apply(gate_up)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------ rotary


@triton.jit
def _pairs(rows, HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr):
    """Token and head of this program's rows, the first half's dimensions, and which there are."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    i = tl.arange(0, HALF)
    return row // HEADS, row % HEADS, i, (row < rows)[:, None] & (i < D // 2)[None, :]


@triton.jit
def _angles(table, token, stride, i, ok, D: tl.constexpr):
    """Both halves of cos or signed sin, fp32 [R, HALF]."""
    place = table + token[:, None] * stride + i[None, :]
    low = tl.load(place, mask=ok, other=0.0).to(tl.float32)
    return low, tl.load(place + D // 2, mask=ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _turn(
    heads, cos, signed_sin, rows, cos_stride, sin_stride, TURNED: tl.constexpr, ALL: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The first TURNED of ALL heads, in place."""
    token, head, i, ok = _pairs(rows, TURNED, D, R, HALF)
    cos_low, cos_high = _angles(cos, token, cos_stride, i, ok, D)
    sin_low, sin_high = _angles(signed_sin, token, sin_stride, i, ok, D)
    place = heads + (token * ALL + head)[:, None] * D + i[None, :]
    low = tl.load(place, mask=ok, other=0.0).to(tl.float32)
    high = tl.load(place + D // 2, mask=ok, other=0.0).to(tl.float32)
    tl.store(place, (low * cos_low + high * sin_low).to(heads.dtype.element_ty), mask=ok)
    high = high * cos_high + low * sin_high
    tl.store(place + D // 2, high.to(heads.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows"])
def _turn_back(
    q, k, v, cos, signed_sin, heads, rows, cos_stride, sin_stride, H: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys turned the other way, side by side with those of values."""
    token, head, i, ok = _pairs(rows, H + 2 * K, D, R, HALF)
    is_q, is_v = ok & (head < H)[:, None], ok & (head >= H + K)[:, None]
    is_k = ok & ((head >= H) & (head < H + K))[:, None]
    q += (token * H + head)[:, None] * D + i[None, :]
    k += (token * K + head - H)[:, None] * D + i[None, :]
    v += (token * K + head - H - K)[:, None] * D + i[None, :]
    low, high = tl.load(q, mask=is_q, other=0.0), tl.load(q + D // 2, mask=is_q, other=0.0)
    low += tl.load(k, mask=is_k, other=0.0)
    high += tl.load(k + D // 2, mask=is_k, other=0.0)
    low, high = low.to(tl.float32), high.to(tl.float32)
    cos_low, cos_high = _angles(cos, token, cos_stride, i, ok, D)
    sin_low, sin_high = _angles(signed_sin, token, sin_stride, i, ok, D)
    turned_low, turned_high = low * cos_low + high * sin_high, high * cos_high + low * sin_low
    turned_low += tl.load(v, mask=is_v, other=0.0).to(tl.float32)
    turned_high += tl.load(v + D // 2, mask=is_v, other=0.0).to(tl.float32)
    heads += (token * (H + 2 * K) + head)[:, None] * D + i[None, :]
    tl.store(heads, turned_low.to(heads.dtype.element_ty), mask=ok)
    tl.store(heads + D // 2, turned_high.to(heads.dtype.element_ty), mask=ok)


def _cut(tokens: int, heads: int, size: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and constants of a launch over the heads of every token."""
    half = triton.next_power_of_2(size // 2)
    block = max(1, PAIRS // half)
    shape = {"D": size, "R": block, "HALF": half}
    return (triton.cdiv(tokens * heads, block),), shape | _warps(WARPS)


class _RotarySplit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, cos: Tensor, signed_sin: Tensor, kv_heads: int
    ) -> tuple[Tensor, ...]:
        flat = heads.contiguous().flatten(0, 1)
        tokens, count, size = flat.shape
        grid, shape = _cut(tokens, count - kv_heads, size)
        cos, signed_sin = cos.flatten(0, 2), signed_sin.flatten(0, 2)
        _turn[grid](
            flat, cos, signed_sin, tokens * (count - kv_heads), cos.stride(0), signed_sin.stride(0),
            TURNED=count - kv_heads, ALL=count, **shape,
        )  # fmt: skip
        ctx.save_for_backward(cos, signed_sin)
        ctx.shape = heads.shape
        query_heads = count - 2 * kv_heads
        return flat[:, :query_heads], flat[:, query_heads:-kv_heads], flat[:, -kv_heads:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, signed_sin = ctx.saved_tensors
        q, k, v = (grad.contiguous() for grad in grads)
        heads = q.new_empty(ctx.shape)
        count, size = heads.shape[2:]
        grid, shape = _cut(len(q), count, size)
        _turn_back[grid](
            q, k, v, cos, signed_sin, heads, len(q) * count, cos.stride(0), signed_sin.stride(0),
            H=q.shape[1], K=k.shape[1], **shape,
        )  # fmt: skip
        return heads, None, None, None


def rotary_split(
    heads: Tensor, cos: Tensor, signed_sin: Tensor, kv_heads: int
) -> tuple[Tensor, ...]:
    """See ops.rotary_split."""
    return _RotarySplit.apply(heads, cos, signed_sin, kv_heads)  # type: ignore[no-any-return]
