"""The skinny linear, in the interpreter, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aquiline.kernels import reference
from aquiline.kernels.triton.linear import skinny_linear, skinny_rotary

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


@pytest.mark.parametrize(("heads", "kv_heads", "size", "rows"), [(4, 2, 64, 3), (3, 1, 32, 20)])
def test_rotary_and_cache(heads, kv_heads, size, rows):
    """What a separate rotation and write of the projected heads do."""
    width, slots = 64, 40
    x, weight, norm = inputs(rows, (heads + 2 * kv_heads) * size, width, torch.float32)
    bias = normal(len(weight), seed=3)
    cos, signed_sin = normal(1, rows, 2, 1, size, seed=5).unbind(2)
    where = 1 + torch.randperm(slots - 1)[:rows]
    caches = [normal(slots, kv_heads, size, seed=s) for s in (6, 7)]
    expected = [cache.clone() for cache in caches]
    projected = F.linear(F.rms_norm(x, (width,), norm, EPS), weight, bias)
    q = reference.rotary_write(
        projected.unflatten(-1, (-1, size)), cos, signed_sin, *expected, where
    )  # fmt: skip
    got = skinny_rotary(*prepared(x, weight, norm, bias), cos, signed_sin, where, *caches)
    torch.testing.assert_close(got, q, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(caches, expected, rtol=1e-4, atol=1e-5)
