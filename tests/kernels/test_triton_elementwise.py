"""The small Triton kernels, in the interpreter, against their torch twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aquiline.kernels import reference
from aquiline.kernels.triton import elementwise


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [8, 576, 1000])
def test_rms_norm(size):
    x, weight = normal(2, 3, size), normal(size, seed=1)
    torch.testing.assert_close(
        elementwise.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)
    )


def test_add_norm():
    x, residual, weight = normal(2, 3, 40), normal(2, 3, 40, seed=1), normal(40, seed=2)
    total, normed = elementwise.add_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, reference.rms_norm(x + residual, weight, 1e-5))


@pytest.mark.parametrize("size", [4, 96, 1000])
def test_silu_mul(size):
    x = normal(2, 3, 2 * size)
    torch.testing.assert_close(elementwise.silu_mul(x), reference.silu_mul(x))


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 8), (9, 3, 64), (6, 1, 12)])
def test_rotary_write(heads, kv_heads, size):
    batch, rows, slots = 2, 5, 40
    qkv = normal(batch, rows, heads + 2 * kv_heads, size)
    cos, signed_sin = normal(batch, rows, 2, 1, size, seed=1).unbind(2)  # views, as in a pass
    where = 1 + torch.randperm(slots - 1)[: batch * rows]
    caches = [normal(slots, kv_heads, size, seed=s) for s in (2, 3)]
    expected = [cache.clone() for cache in caches]
    q = reference.rotary_write(qkv, cos, signed_sin, *expected, where)
    torch.testing.assert_close(elementwise.rotary_write(qkv, cos, signed_sin, *caches, where), q)
    torch.testing.assert_close(caches, expected)


def test_move_kv_moves_as_if_at_once():
    """Node 2 goes to slot 1 and node 5 to slot 2: the first must be read before it is written."""
    cache = normal(3, 2, 20, 2, 4)
    source = torch.tensor([[2, 5, 5], [11, 12, 14]])
    target = torch.tensor([[1, 2, 3], [11, 12, 13]])
    expected = cache.clone()
    reference.move_kv(expected, source, target)
    elementwise.move_kv(cache, source, target)
    assert torch.equal(cache, expected)


def test_slots_at():
    page_table = torch.randperm(40)[:12].view(2, 6)
    positions = torch.randint(6 * 8, (2, 5))
    assert torch.equal(
        elementwise.slots_at(page_table, positions, 8), reference.slots_at(page_table, positions, 8)
    )


def test_pending_rows():
    page_table = torch.randperm(40)[:12].view(2, 6)
    arguments = page_table, torch.tensor([9, 30]), torch.tensor([3, 1]), 5, 8
    got, expected = elementwise.pending_rows(*arguments), reference.pending_rows(*arguments)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
