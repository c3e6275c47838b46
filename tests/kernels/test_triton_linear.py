"""The skinny linear, in the interpreter, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aquiline.kernels.triton.linear import skinny_linear

SHAPES = [(1, 48, 64), (4, 96, 576), (5, 100, 256), (33, 64, 128)]  # rows, N, K
EPS = 1e-5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int, columns: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, weight = normal(1, rows, width, seed=0), normal(columns, width, seed=1) * width**-0.5
    return x.to(dtype), weight.to(dtype), (1 + normal(width, seed=2) / 4).to(dtype)


def prepared(x: Tensor, weight: Tensor, norm: Tensor, bias: Tensor | None):
    """The arguments that read x through a norm: as if a layer before had written it."""
    identity = torch.eye(x.shape[-1], dtype=x.dtype)
    zeros = torch.zeros_like(x)
    _, scaled, squares = skinny_linear(x, identity, residual=zeros, next_weight=norm)
    return scaled, weight, bias, squares, EPS


def check(got: Tensor, reference: Callable[[torch.dtype], Tensor]) -> None:
    """fp32 near exact; bf16 at most four times the error of plain torch in bf16: the interpreter
    truncates where the card rounds (tests/gpu allows twice)."""
    real = reference(torch.float64)
    error = (reference(got.dtype).double() - real).norm()
    allowed = 1e-5 * real.norm() if got.dtype == torch.float32 else 4 * error
    assert (got.double() - real).norm() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "width"), SHAPES)
def test_everything_fused(rows, columns, width, dtype):
    x, weight, norm = inputs(rows, columns, width, dtype)
    bias, residual = normal(columns, seed=3).to(dtype), normal(1, rows, columns, seed=4).to(dtype)
    got, *_ = skinny_linear(*prepared(x, weight, norm, bias), residual=residual)

    def reference(to: torch.dtype) -> Tensor:
        normed = F.rms_norm(x.to(to), (width,), norm.to(to), EPS)
        return F.linear(normed, weight.to(to), bias.to(to)) + residual.to(to)

    check(got, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "width"), SHAPES)
def test_gated(rows, columns, width, dtype):
    x, weight, norm = inputs(rows, columns, width, dtype)
    got, *_ = skinny_linear(*prepared(x, weight, norm, None), gated=True)

    def reference(to: torch.dtype) -> Tensor:
        normed = F.rms_norm(x.to(to), (width,), norm.to(to), EPS)
        gate, up = F.linear(normed, weight.to(to)).chunk(2, dim=-1)
        return F.silu(gate) * up

    check(got, reference)


def test_nothing_fused():
    x, weight, _ = inputs(3, 64, 128, torch.float32)
    check(skinny_linear(x, weight)[0], lambda to: F.linear(x.to(to), weight.to(to)))
