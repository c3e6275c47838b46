"""Unrolled attention: its formulas against autograd of one explicit softmax."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from aquiline.attention.unrolled import chained_attention

EDGES = [0, 5, 6, 13]  # a document of one row among them
KV, GROUP, SIZE = 2, 3, 4


def explicit(q: Tensor, k0: Tensor, v0: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One row and head at a time: every visible key, listed."""
    rows = []
    for start, end in itertools.pairwise(EDGES):
        for row in range(start, end):
            heads = []
            for head in range(KV * GROUP):
                kv = head // GROUP
                seen = [k0[i, kv] for i in range(start, row + 1)] + [k[row, kv] for k in keys]
                read = [v0[i, kv] for i in range(start, row + 1)] + [v[row, kv] for v in values]
                probs = (torch.stack(seen) @ q[row, head] / SIZE**0.5).softmax(dim=0)
                heads.append(probs @ torch.stack(read))
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def inputs(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(steps)

    def draw(heads: int) -> Tensor:
        shape = (EDGES[-1], heads, SIZE)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [draw(KV * GROUP), *(draw(KV) for _ in range(2 + 2 * steps))]


def ours(q: Tensor, k0: Tensor, v0: Tensor, *chain: Tensor) -> Tensor:
    half = len(chain) // 2
    cu = torch.tensor(EDGES, dtype=torch.int32)
    return chained_attention(q, k0, v0, chain[:half], chain[half:], cu, 7)


@pytest.mark.parametrize("steps", [1, 3])
def test_chained_attention_is_one_softmax_over_prefix_and_chain(steps: int) -> None:
    found, expected = inputs(steps), inputs(steps)
    q, k0, v0, *chain = expected
    reference = explicit(q, k0, v0, chain[:steps], chain[steps:])
    out = ours(*found)
    torch.testing.assert_close(out, reference, rtol=1e-12, atol=1e-12)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(up)
    reference.backward(up)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-11)


def test_gradients_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(ours, inputs(2), fast_mode=True)


def test_half_precision_is_near_the_truth() -> None:
    low = [x.detach().bfloat16().requires_grad_() for x in inputs(3)]
    high = [x.detach().double().requires_grad_() for x in low]
    for found in (low, high):
        out = ours(*found)
        assert out.dtype == found[0].dtype
        out.backward(torch.ones_like(out) * torch.arange(SIZE))
    for mine, theirs in zip(low, high, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert (mine.grad.double() - theirs.grad).norm() < 2e-2 * theirs.grad.norm()


def test_strided_heads_and_large_scores() -> None:
    """Projections hand over slices of one tensor; scores of a thousand must not overflow."""
    q, k0, v0, key, value = (x.detach() for x in inputs(1))
    wide = torch.cat((q, k0, v0), dim=1)
    parts = wide.split([KV * GROUP, KV, KV], dim=1)
    cu = torch.tensor(EDGES, dtype=torch.int32)
    out = chained_attention(*parts, (300 * key,), (value,), cu, 7)
    torch.testing.assert_close(out, explicit(q, k0, v0, [300 * key], [value]))
