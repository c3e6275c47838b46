"""Kernels with gradients (norm, activation, rotary, regression), interpreted, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from aquiline.kernels import reference, reference_training
from aquiline.kernels.triton import differentiable, regression

EPS = 1e-5
Function = Callable[..., Tensor | Sequence[Tensor]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(function: Function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then the gradients of the inputs for random gradients of the outputs."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    found = function(*(1 * leaf for leaf in leaves))  # no leaves, for one may be spent
    outs = [found] if isinstance(found, Tensor) else list(found)
    kept = [out.detach().clone() for out in outs]
    ups = [normal(*out.shape, seed=9).to(dtype).to(out.dtype) for out in outs]
    torch.autograd.backward(outs, ups)
    return kept + [leaf.grad for leaf in leaves if leaf.grad is not None]


def compare(ours: Function, twin: Function, inputs: list[Tensor]) -> None:
    """fp32 to its rounding; bf16 no further off than the twin in bf16, bar the last bit, which the
    interpreter cuts off where the card rounds."""
    for found, exact in zip(
        results(ours, inputs, torch.float32), results(twin, inputs, torch.float64), strict=True
    ):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-5)
    low = [x.bfloat16() for x in inputs]
    mine, theirs = (results(f, low, torch.bfloat16) for f in (ours, twin))
    for found, other, exact in zip(mine, theirs, results(twin, low, torch.float64), strict=True):
        assert found.dtype == other.dtype
        assert (found.double() - exact).norm() <= 3 * (other.double() - exact).norm() + 1e-6


@pytest.mark.parametrize(("rows", "size"), [(1, 8), (7, 576), (5, 1000), (3, 4100)])
def test_rms_norm(rows: int, size: int) -> None:
    inputs = [normal(2, rows, size), 1 + normal(size, seed=1)]
    compare(
        lambda x, weight: differentiable.rms_norm(x, weight, EPS),
        lambda x, weight: reference.rms_norm(x, weight, EPS),
        inputs,
    )


@pytest.mark.parametrize("programs", [2, 264])
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (19, 96), (11, 576), (3, 2500)])
def test_add_norm(rows: int, size: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differentiable, "PROGRAMS", programs)  # few: each takes several turns
    monkeypatch.setattr(differentiable, "ROWS", 256)

    def twin(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return total, reference.rms_norm(total, weight, EPS)

    inputs = [normal(1, rows, size), normal(1, rows, size, seed=1), 1 + normal(size, seed=2)]
    compare(lambda *given: differentiable.add_norm(*given, EPS), twin, inputs)


@pytest.mark.parametrize(("rows", "size"), [(1, 4), (5, 96), (3, 1000)])
def test_silu_mul(rows: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differentiable, "TILE", 256)  # programs begin inside a row
    inputs = [3 * normal(2, rows, 2 * size)]
    compare(differentiable.silu_mul, reference.silu_mul, inputs)


def test_the_slope_of_large_gates_is_finite() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 3.0, -2.0]], requires_grad=True)
    differentiable.silu_mul(gate_up).sum().backward()
    torch.testing.assert_close(gate_up.grad, torch.tensor([[0.0, -2.0, 0.0, 200.0]]))


@pytest.mark.parametrize(("heads", "kv", "size"), [(4, 2, 8), (9, 3, 64), (6, 1, 12), (5, 5, 2)])
def test_rotary_split(heads: int, kv: int, size: int) -> None:
    cos, signed_sin = normal(1, 23, 2, 1, size, seed=1).unbind(2)  # views, as in a pass

    def of(split: Function) -> Function:
        return lambda x: split(x, cos.to(x.dtype), signed_sin.to(x.dtype), kv)

    inputs = [normal(1, 23, heads + 2 * kv, size)]
    compare(of(differentiable.rotary_split), of(reference.rotary_split), inputs)


def test_rotary_takes_no_memory_of_its_own() -> None:
    heads = normal(1, 6, 8, 16)
    q, k, v = differentiable.rotary_split(heads, *normal(2, 1, 6, 1, 16, seed=1), 2)
    assert {x.untyped_storage().data_ptr() for x in (q, k, v)} == {heads.data_ptr()}


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize(("steps", "rows", "size"), [(1, 9, 64), (3, 5, 20), (2, 3, 2500)])
def test_regression(steps: int, rows: int, size: int, beta: float) -> None:
    features = normal(rows, size, seed=1).bfloat16()
    features[0] = 0  # errors of nothing, and a slope of nothing in L1
    hidden = normal(steps, rows, size)
    hidden[:, 0, ::2] = 0

    def of(function: Function) -> Function:
        return lambda x: function(x, features.to(x.dtype), beta)

    compare(of(regression.regression), of(reference_training.regression), [hidden.bfloat16()])


def test_a_decoder_layer_learns_as_torch_has_it() -> None:
    """All of them in one graph: streams that fork, a spent projection, a norm's second reader."""
    heads, kv, size, wide, inner = 4, 2, 8, 32, 48
    shapes = [(6, wide), (wide,), (64, wide), (wide, wide), (wide,), (2 * inner, wide),
              (wide, inner), (wide,)]  # fmt: skip
    inputs = [normal(*shape, seed=seed) / 2 for seed, shape in enumerate(shapes)]
    cos, signed_sin = normal(2, 1, 6, 1, size, seed=20)

    def layer(rms_norm: Function, add_norm: Function, silu_mul: Function, rotary_split: Function,
              x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        first, qkv, out, second, gate_up, down, third = weights
        projected = (rms_norm(x, first, EPS) @ qkv.T).view(1, 6, heads + 2 * kv, size)
        angles = cos.to(x.dtype), signed_sin.to(x.dtype)
        q, k, v = rotary_split(projected, *angles, kv)
        mixed = q.softmax(dim=0) * torch.cat((k, v), dim=1)
        total, normed = add_norm(mixed.flatten(1) @ out.T, x, second, EPS)
        total, normed = add_norm(silu_mul(normed @ gate_up.T) @ down.T, total, third, EPS)
        return total, normed

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return residual + x, reference.rms_norm(residual + x, weight, eps)

    ours = [getattr(differentiable, n) for n in ("rms_norm", "add_norm", "silu_mul")]
    twins = [reference.rms_norm, add_norm, reference.silu_mul]
    compare(
        lambda *given: layer(*ours, differentiable.rotary_split, *given),
        lambda *given: layer(*twins, reference.rotary_split, *given),
        inputs,
    )
