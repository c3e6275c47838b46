"""The fused loss over the vocabulary, in the interpreter, against its torch twin in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aquiline.kernels import reference_training
from aquiline.kernels.triton import divergence as laws

V, ROWS, ETA = 1003, 5, 3.0  # not a multiple of a block
KINDS = ["ce", "kl", "tv", "lk"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "WARPS", 1)  # blocks of 512: two to a row


def normal(*shape: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_ids() -> Tensor:
    return torch.randperm(V, generator=torch.Generator().manual_seed(7))[:401]


def assert_equals_the_twin(
    draft: Tensor, target: Tensor, ids: Tensor | None, weights: Tensor, kind: str, rtol: float
) -> Tensor:
    """Sums within ``rtol`` and every row's slope within ``rtol`` of its norm; the sums."""
    wide = draft.double(), target.double(), ids, weights.double(), kind, ETA
    sums, slope = reference_training.divergence(*wide)
    found, gradient = laws.divergence(draft.clone(), target, ids, weights, kind, ETA)
    torch.testing.assert_close(found.double(), sums, rtol=rtol, atol=rtol * float(weights.sum()))
    assert gradient.dtype == draft.dtype
    assert bool(
        ((gradient.double() - slope).norm(dim=-1) <= 2 * rtol * slope.norm(dim=-1) + 1e-9).all()
    )
    return found


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_slope(kind: str, reduced: bool, steps: int) -> None:
    ids = some_ids() if reduced else None
    size = V if ids is None else len(ids)
    target = normal(ROWS, V, seed=1)
    near = target if ids is None else target[:, ids]
    draft = near + normal(steps, ROWS, size, seed=2, scale=1.0)
    weights = normal(steps, ROWS, seed=3).abs()
    weights[0, 1] = weights[-1, 4] = 0
    assert_equals_the_twin(draft, target, ids, weights, kind, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_weight_is_not_read(kind: str) -> None:
    draft, target = normal(2, ROWS, 40, seed=1), normal(ROWS, 40, seed=2)
    weights = torch.ones(2, ROWS)
    weights[:, 2], weights[1, 3] = 0, 0
    clean, slope = laws.divergence(draft.clone(), target, None, weights, kind, ETA)
    draft[:, 2], target[2], draft[1, 3] = torch.nan, torch.nan, torch.nan
    sums, found = laws.divergence(draft, target, None, weights, kind, ETA)
    assert sums.equal(clean)
    assert found.equal(slope)
    assert not found[:, 2].any()
    assert not found[1, 3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_rounds_only_what_is_stored(kind: str, dtype: torch.dtype) -> None:
    ids, weights = some_ids(), torch.ones(2, ROWS)
    draft, target = normal(2, ROWS, len(ids), seed=1).to(dtype), normal(ROWS, V, seed=2).to(dtype)
    found = assert_equals_the_twin(draft, target, ids, weights, kind, 4e-3)
    exact, _ = reference_training.divergence(
        draft.double(), target.double(), ids, weights.double(), kind, ETA
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_tied_tokens_are_all_the_likeliest() -> None:
    draft, target = torch.zeros(1, 4, 600), torch.zeros(4, 600)
    draft[0, :, [3, 590]] = 2.0
    target[0, 590] = target[1, 3] = target[2, 4] = 1.0  # in the last row all are
    sums, _ = laws.divergence(draft, target, None, torch.ones(1, 4), "ce", ETA)
    assert float(sums[3, 0]) == 3


def test_large_logits_far_apart() -> None:
    """The target's likeliest token is none of the draft's: p underflows there, its law does not."""
    ids = some_ids()
    draft = normal(1, ROWS, len(ids), seed=1, scale=300.0)
    target = normal(ROWS, V, seed=2, scale=300.0) - 1000
    target[:, next(i for i in range(V) if i not in ids)] = 3000.0
    sums = assert_equals_the_twin(draft, target, ids, torch.ones(1, ROWS), "lk", 1e-5)
    assert float(sums[2, 0]) == 0
    assert float(sums[1, 0]) > 100


def test_what_is_not_a_number_reaches_the_loss() -> None:
    draft, target = normal(1, 2, 40, seed=1), normal(2, 40, seed=2)
    draft[0, 1, 7] = torch.nan
    sums, _ = laws.divergence(draft, target, None, torch.ones(1, 2), "lk", ETA)
    assert bool(sums[0].isnan().all())


def test_no_rows() -> None:
    sums, slope = laws.divergence(
        torch.empty(2, 0, 40), torch.empty(0, 40), None, torch.empty(2, 0), "kl", ETA
    )
    assert sums.equal(torch.zeros(4, 2))
    assert slope.shape == (2, 0, 40)
