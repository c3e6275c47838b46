"""The regression of features: the mean error of a row, and its gradient computed again from it.

A program has some positions and goes through their unrolled steps, so the target's features are
read once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquiline.kernels.triton.launch import INTERPRET

TILE = 2048  # elements of a program's positions
WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def _regression(
    hidden, features, grad, out, rows, steps, SIZE: tl.constexpr, PAD: tl.constexpr,
    R: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """``out`` is the error [S, P], or where there is a ``grad`` of it, the slope [S, P, d]."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    i = tl.arange(0, PAD)
    ok = (row < rows)[:, None] & (i < SIZE)[None, :]
    place = row[:, None] * SIZE + i[None, :]
    aim = tl.load(features + place, mask=ok, other=0.0).to(tl.float32)
    for step in range(steps):
        of_step = place + step * rows.to(tl.int64) * SIZE
        error = tl.load(hidden + of_step, mask=ok, other=0.0).to(tl.float32) - aim
        of_row = row + step * rows.to(tl.int64)
        if grad is None:
            size = tl.abs(error)
            size = tl.where(size < BETA, 0.5 * error * error, size - 0.5 * BETA)
            size = tl.where(ok, size, 0.0)
            tl.store(out + of_row, tl.sum(size, axis=1) / SIZE, mask=row < rows)
        else:
            weight = tl.load(grad + of_row, mask=row < rows, other=0.0) / SIZE
            slope = tl.where(error > BETA, 1.0, tl.where(error < -BETA, -1.0, error))
            slope *= weight[:, None]
            tl.store(out + of_step, slope.to(out.dtype.element_ty), mask=ok)


def _launch(
    hidden: Tensor, features: Tensor, grad: Tensor | None, out: Tensor, beta: float
) -> Tensor:
    steps, rows, size = hidden.shape
    pad = triton.next_power_of_2(size)
    block = max(1, TILE // pad)
    _regression[(triton.cdiv(rows, block),)](
        hidden, features, grad, out, rows, steps, SIZE=size, PAD=pad, R=block, BETA=beta,
        **({} if INTERPRET else {"num_warps": 8 if pad > TILE else WARPS}),
    )  # fmt: skip
    return out


class _Regression(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, features: Tensor, beta: float) -> Tensor:
        hidden, features = hidden.contiguous(), features.contiguous()
        ctx.save_for_backward(hidden, features)
        ctx.beta = beta
        error = torch.empty(hidden.shape[:2], dtype=torch.float32, device=hidden.device)
        return _launch(hidden, features, None, error, beta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, features = ctx.saved_tensors
        slope = torch.empty_like(hidden)
        return _launch(hidden, features, grad.contiguous(), slope, ctx.beta), None, None


def regression(hidden: Tensor, features: Tensor, beta: float) -> Tensor:
    """See ops.regression."""
    return _Regression.apply(hidden, features, beta)  # type: ignore[no-any-return]
