"""The chain of unrolled attention, in the interpreter, against its torch twin in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aquiline.kernels import reference_training
from aquiline.kernels.triton import chain

SHAPES = [(7, 9, 3, 64, 3), (5, 4, 4, 16, 1), (3, 8, 1, 128, 2), (19, 6, 2, 20, 7)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """Projections are slices of one tensor, as in training; the chain's scores matter."""

    def __init__(self, rows: int, heads: int, kv: int, size: int, links: int) -> None:
        qkv = [2 * normal(rows, heads + 2 * kv, size, seed=link) for link in range(links)]
        self.q = qkv[-1][:, :heads]
        self.keys = [x[:, heads : heads + kv] for x in qkv]
        self.values = [x[:, heads + kv :] for x in qkv]
        self.prefix, self.grad = (normal(rows, heads, size, seed=s) for s in (20, 21))
        self.dq = normal(rows, heads, size, seed=22)
        self.prefix_lse = 3 * normal(heads, rows, seed=23)

    def to(self, dtype: torch.dtype) -> Case:
        found = Case.__new__(Case)
        for name in ("q", "prefix", "grad", "dq"):
            setattr(found, name, getattr(self, name).to(dtype))
        found.keys, found.values = ([x.to(dtype) for x in xs] for xs in (self.keys, self.values))
        found.prefix_lse = self.prefix_lse.to(torch.promote_types(dtype, torch.float32))
        return found

    def forward(self, merge: object) -> tuple[Tensor, Tensor]:
        return merge.merge_chain(self.q, self.prefix, self.prefix_lse, self.keys, self.values)  # type: ignore[attr-defined]

    def backward(self, merge: object) -> list[Tensor]:
        out, lse = self.forward(reference_training)
        dq, dkeys, dvalues = merge.merge_chain_backward(  # type: ignore[attr-defined]
            self.grad, self.q, out, lse, self.keys, self.values, self.dq.clone()
        )
        return [dq, *dkeys, *dvalues]


@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple[int, ...]) -> None:
    case = Case(*shape)
    expected = case.to(torch.float64).forward(reference_training)
    for found, exact in zip(case.forward(chain), expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape: tuple[int, ...]) -> None:
    case = Case(*shape)
    expected = case.to(torch.float64).backward(reference_training)
    for found, exact in zip(case.backward(chain), expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_half_precision_errs_no_more_than_the_twin() -> None:
    """But for the last bit: the interpreter cuts fp32 off where the card rounds it."""
    case = Case(*SHAPES[0]).to(torch.bfloat16)
    exact = case.to(torch.float64)
    expected = [*exact.forward(reference_training), *exact.backward(reference_training)]
    ours, twins = ([*case.forward(m), *case.backward(m)] for m in (chain, reference_training))
    assert ours[1].dtype == torch.float32
    torch.testing.assert_close(ours[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    for mine, twin, truth in zip(ours, twins, expected, strict=True):
        assert (mine.double() - truth).norm() <= 2.5 * (twin.double() - truth).norm() + 1e-5


def test_scores_of_a_thousand() -> None:
    case = Case(*SHAPES[1])
    case.keys = [300 * x for x in case.keys]
    expected = case.to(torch.float64).forward(reference_training)
    for found, exact in zip(case.forward(chain), expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
