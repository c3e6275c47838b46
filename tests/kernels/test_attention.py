"""Tree attention, both implementations, against a dense float64 softmax over listed keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from aquiline.kernels import cpu, ops, reference

PAGE = 4
HEAD = 8
PREFIXES = [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE - 1, 3 * PAGE]
TREE = torch.tensor(  # a root, two children, a child of each
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
).bool()


@dataclass
class Case:
    """The arguments of one call."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    prefix_lengths: Tensor
    suffix_rows: int
    mask: Tensor | None

    def args(self, dtype=torch.float64):
        return (
            self.q.to(dtype), self.k_cache.to(dtype), self.v_cache.to(dtype), self.page_table,
            PAGE, self.prefix_lengths, self.suffix_rows, self.mask,
        )  # fmt: skip


def make_case(prefixes, rows, suffix_rows, mask, groups=2, pages="scattered", seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads = len(prefixes), 2
    columns = -(-(max(prefixes) + suffix_rows) // PAGE) + 1
    count = 1 + 2 * batch * columns
    order = torch.randperm(count - 1, generator=generator)
    if pages == "adjacent":
        order = order.sort().values
    page_table = 1 + order[: batch * columns].view(batch, columns)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Case(
        2 * normal(batch, rows, kv_heads * groups, HEAD), normal(count * PAGE, kv_heads, HEAD),
        normal(count * PAGE, kv_heads, HEAD), page_table, torch.tensor(prefixes), suffix_rows, mask,
    )  # fmt: skip


def slot(case: Case, row: int, index: int) -> int:
    return int(case.page_table[row, index // PAGE]) * PAGE + index % PAGE


def visible_slots(case: Case, row: int, query: int) -> list[int]:
    """Slots that a query row sees, one by one."""
    length = int(case.prefix_lengths[row])
    seen = [slot(case, row, i) for i in range(length)]
    for column in range(case.suffix_rows):
        if case.mask is None:
            sees = column <= query
        else:
            sees = bool(case.mask[query, column] if case.mask.dim() == 2
                        else case.mask[row, query, column])  # fmt: skip
        if sees:
            seen.append(slot(case, row, length + column))
    return seen


def dense(case: Case) -> Tensor:
    """Softmax over the visible keys, query by query and head by head."""
    out = torch.zeros_like(case.q)
    batch, rows, heads, size = case.q.shape
    group = heads // case.k_cache.shape[1]
    for b in range(batch):
        for t in range(rows):
            seen = visible_slots(case, b, t)
            for h in range(heads):
                keys, values = case.k_cache[seen, h // group], case.v_cache[seen, h // group]
                weights = (keys @ case.q[b, t, h] / math.sqrt(size)).softmax(dim=0)
                out[b, t, h] = weights @ values
    return out


def planned(*args) -> Tensor:
    """As the engine calls it: one plan, then every layer."""
    plan = ops.plan_attention(*args[3:])
    assert plan is not None
    ops.tree_attention(*args, plan)  # a first layer leaves the plan as good as new
    return ops.tree_attention(*args, plan)


IMPLEMENTATIONS = {
    "cpu": cpu.tree_attention,
    "reference": reference.tree_attention,
    "planned": planned,
    "ops": ops.tree_attention,
}
every = pytest.mark.parametrize("attend", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def assert_exact(attend, case: Case) -> None:
    torch.testing.assert_close(attend(*case.args()), dense(case), rtol=1e-10, atol=1e-12)


@every
@pytest.mark.parametrize("pages", ["adjacent", "scattered"])
@pytest.mark.parametrize("groups", [1, 3, 4])
def test_ragged_prefixes_with_a_tree(attend, groups, pages):
    assert_exact(attend, make_case(PREFIXES, 5, 5, TREE, groups, pages))


@every
@pytest.mark.parametrize("pages", ["adjacent", "scattered"])
@pytest.mark.parametrize("prefixes", [[0], [0, 0, 0], [0, 5], [PAGE], PREFIXES])
@pytest.mark.parametrize("groups", [1, 3])
def test_causal_suffix(attend, groups, prefixes, pages):
    """Prompts: all at once (no prefix) and behind one."""
    assert_exact(attend, make_case(prefixes, 6, 6, None, groups, pages))


@every
@pytest.mark.parametrize("pages", ["adjacent", "scattered"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_no_suffix(attend, groups, rows, pages):
    assert_exact(attend, make_case(PREFIXES[1:], rows, 0, None, groups, pages))


@every
@pytest.mark.parametrize("groups", [1, 3])
def test_a_mask_for_each_request(attend, groups):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(len(PREFIXES), 4, 7, generator=generator) < 0.5
    mask[:, :, 0] = True
    assert_exact(attend, make_case(PREFIXES, 4, 7, mask, groups))


@every
def test_one_level_of_a_tree(attend):
    """The query may be a part of the tree: T < S."""
    assert_exact(attend, make_case(PREFIXES, 2, 5, TREE[3:]))


@every
def test_rows_that_see_no_suffix_or_no_prefix(attend):
    """Each row must see one key in all; either side alone may be empty."""
    mask = torch.tensor([[False, False], [True, False]])
    assert_exact(attend, make_case([1, PAGE, 2 * PAGE + 1], 2, 2, mask))
    ragged = torch.tensor([[[True, False], [True, True]], [[False, False], [False, True]]])
    assert_exact(attend, make_case([0, 5], 2, 2, ragged))


@every
def test_batches_of_one_and_their_rows_agree(attend):
    case = make_case([3, 9, 0], 5, 5, TREE)
    together = attend(*case.args())
    for b in range(3):
        alone = Case(
            case.q[b : b + 1], case.k_cache, case.v_cache, case.page_table[b : b + 1],
            case.prefix_lengths[b : b + 1], 5, TREE,
        )  # fmt: skip
        torch.testing.assert_close(attend(*alone.args())[0], together[b], rtol=1e-12, atol=1e-13)


@every
def test_large_logits_stay_finite(attend):
    case = make_case([0, 3, 9], 5, 5, TREE)
    case.q *= 400
    assert_exact(attend, case)


@every
@pytest.mark.parametrize("pages", ["adjacent", "scattered"])
@pytest.mark.parametrize("mask", [TREE, None], ids=["tree", "causal"])
def test_float32(attend, mask, pages):
    case = make_case(PREFIXES, 5, 5, mask, groups=3, pages=pages)
    out = attend(*case.args(torch.float32))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), dense(case), rtol=1e-4, atol=3e-6)


@every
@pytest.mark.parametrize("pages", ["adjacent", "scattered"])
@pytest.mark.parametrize("suffix_rows", [0, 5])
def test_slots_beyond_a_request_do_not_leak(attend, suffix_rows, pages):
    """NaN wherever no request has a prefix or a suffix; slot 0, which pads, is finite."""
    mask = TREE if suffix_rows else None
    case = make_case(PREFIXES[1:], 5, suffix_rows, mask, pages=pages)
    expected = dense(case)
    poisoned = torch.ones(len(case.k_cache), dtype=torch.bool)
    poisoned[0] = False
    for b, length in enumerate(case.prefix_lengths.tolist()):
        poisoned[[slot(case, b, i) for i in range(length + suffix_rows)]] = False
    assert poisoned.any()
    case.k_cache[poisoned] = case.v_cache[poisoned] = float("nan")
    torch.testing.assert_close(attend(*case.args()), expected, rtol=1e-10, atol=1e-12)


@every
def test_masked_slots_weigh_nothing(attend):
    """Exactly nothing: huge finite garbage there changes no bit."""
    case = make_case([0, 3, PAGE], 2, 5, None)
    case.mask = TREE[3:].clone()
    case.mask[:, 2] = case.mask[:, 4] = False
    before = attend(*case.args())
    for b, length in enumerate(case.prefix_lengths.tolist()):
        for column in (2, 4):
            garbage = slot(case, b, length + column)
            case.k_cache[garbage], case.v_cache[garbage] = 1e6, -1e6
    case.k_cache[0], case.v_cache[0] = 1e6, 1e6
    assert torch.equal(attend(*case.args()), before)


def test_page_tables_may_end_with_the_request():
    """A short request's columns are padded with page 0, as the engine pads them."""
    case = make_case([1, 9], 5, 5, TREE)
    case.page_table[0, 2:] = 0
    for attend in IMPLEMENTATIONS.values():
        assert_exact(attend, case)


@pytest.mark.parametrize("empty", ["neither", "a", "b"])
def test_merge_states_is_attention_over_both_parts(empty):
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, n, 2, HEAD, generator=generator).double() for n in (3, 9, 9))
    mask = torch.rand(1, 3, 9, generator=generator) < 0.7
    mask[..., 0] = mask[..., 8] = True
    if empty == "a":
        mask[..., :4] = False
    if empty == "b":
        mask[..., 4:] = False
    whole, lse = reference.attention_state(q, k, v, mask)
    a = reference.attention_state(q, k[:, :4], v[:, :4], mask[..., :4])
    b = reference.attention_state(q, k[:, 4:], v[:, 4:], mask[..., 4:])
    torch.testing.assert_close(reference.merge_states(*a, *b), whole)
    torch.testing.assert_close(torch.logaddexp(a[1], b[1]), lse)
