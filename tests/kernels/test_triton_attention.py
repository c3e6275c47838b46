"""The Triton attention, in the interpreter, against the dense float64 softmax."""

from __future__ import annotations

import pytest
import torch

from aquiline.kernels.triton.attention import AttentionShape, tree_attention
from tests.kernels.test_attention import PAGE, PREFIXES, TREE, Case, dense, make_case

CUTS = {
    "one share": AttentionShape(16, 16, 1, 4, 2),
    "three shares": AttentionShape(16, 16, 3, 4, 2),
    "row tiles": AttentionShape(16, 4, 2, 4, 2),
}
every = pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)


def check(case: Case, cut: AttentionShape, dtype: torch.dtype = torch.float32) -> None:
    """In fp32 near exact; in bf16 at most twice the error of rounding q, k, v and the result."""
    real = dense(case)
    got = tree_attention(*case.args(dtype), shape=cut)
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), real, rtol=2e-5, atol=2e-5)
        return
    rounded = Case(
        *(x.to(dtype).double() for x in (case.q, case.k_cache, case.v_cache)),
        case.page_table, case.prefix_lengths, case.suffix_rows, case.mask,
    )  # fmt: skip
    error = (dense(rounded).to(dtype).double() - real).norm()
    assert (got.double() - real).norm() <= 2 * error


@every
@pytest.mark.parametrize("groups", [1, 3, 4])
def test_ragged_prefixes_with_a_tree(cut, groups):
    check(make_case(PREFIXES, 5, 5, TREE, groups), cut)


@every
@pytest.mark.parametrize("prefixes", [[0], [0, 5], [PAGE], PREFIXES])
def test_causal_suffix(cut, prefixes):
    check(make_case(prefixes, 7, 7, None, 3), cut)


@every
def test_no_suffix(cut):
    check(make_case(PREFIXES[1:], 1, 0, None, 4), cut)


@every
def test_one_level_of_the_tree(cut):
    """Queries are a part of the tree, keys all of it so far; a mask for each request."""
    mask = torch.rand(len(PREFIXES), 2, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, :, 0] = True
    check(make_case(PREFIXES, 2, 5, mask, 3), cut)


def test_bf16():
    check(make_case(PREFIXES, 5, 5, TREE, 3), CUTS["three shares"], torch.bfloat16)


def test_the_choice_of_shape_fits_the_card():
    assert AttentionShape.of(1, 4, 4, 8, 8192).splits == 32
    assert AttentionShape.of(64, 4, 4, 8, 8192).splits == 1
    assert AttentionShape.of(1, 32, 4, 8, 8192).block_r == 64
    assert AttentionShape.of(1, 1000, 3, 3, 8192).splits == 1
