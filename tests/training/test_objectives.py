"""Objectives: values and gradients against autograd of the plain formulas, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aquiline.core.errors import AquilineError
from aquiline.kernels.ops import Divergence
from aquiline.training import vocabulary_loss as vocabulary
from aquiline.training.config import TrainConfig
from aquiline.training.objectives import Rows, objective_loss
from aquiline.training.vocabulary_loss import Heads, vocabulary_loss

V, D, ROWS, ETA = 40, 12, 23, 3.0
IDS = torch.tensor([0, 3, 4, 9, 17, 18, 30, 39])


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Case:
    """Hidden states of some steps, their heads, and weights of which some are zero."""

    def __init__(self, steps: int, token_ids: Tensor | None) -> None:
        self.token_ids = token_ids
        size = V if token_ids is None else len(token_ids)
        self.hidden = draw(steps, ROWS, D, seed=1).requires_grad_()
        self.head = (draw(size, D, seed=2) / 2).requires_grad_()
        self.features, self.target_head = draw(ROWS, D, seed=3), draw(V, D, seed=4) / 2
        self.weights = draw(steps, ROWS, seed=5).abs() * (draw(steps, ROWS, seed=6) > -1)

    def ours(self, divergence: Divergence) -> tuple[Tensor, Tensor]:
        heads = Heads(self.head, self.target_head, self.token_ids)
        return vocabulary_loss(divergence, ETA, self.hidden, self.features, heads, self.weights)

    def naive(self, divergence: Divergence) -> tuple[Tensor, Tensor]:
        """The definitions, with a draft law over all V tokens."""
        target_probs = (self.features @ self.target_head.T).softmax(dim=-1)
        ids = torch.arange(V) if self.token_ids is None else self.token_ids
        draft_probs = torch.zeros(*self.hidden.shape[:2], V, dtype=torch.float64)
        draft_probs[..., ids] = (self.hidden @ self.head.T).softmax(dim=-1)
        law = target_probs[:, ids] / target_probs[:, ids].sum(dim=-1, keepdim=True)
        log_draft = draft_probs[..., ids].log()
        cross_entropy = -(law * log_draft).sum(dim=-1)
        kl = (law * (law.log() - log_draft)).sum(dim=-1)
        acceptance = torch.minimum(target_probs, draft_probs).sum(dim=-1)
        agreed = (target_probs.argmax(dim=-1) == draft_probs.argmax(dim=-1)).double()
        blend = torch.exp(-ETA * acceptance.detach())
        value = {
            "ce": cross_entropy,
            "kl": kl,
            "tv": 1 - acceptance,
            "lk": blend * kl + (1 - blend) * (1 - acceptance),
        }[divergence]
        counted = self.weights > 0
        sums = torch.stack([(counted * x).sum(-1) for x in (cross_entropy, acceptance, agreed)])
        return (self.weights * value).sum(), sums.detach()


@pytest.mark.parametrize("divergence", ["ce", "kl", "tv", "lk"])
@pytest.mark.parametrize("token_ids", [None, IDS], ids=["full", "reduced"])
@pytest.mark.parametrize("steps", [1, 3])
def test_value_and_gradients_are_autograds(
    steps: int, token_ids: Tensor | None, divergence: Divergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vocabulary.LOGITS, "cpu", 7 * V * steps)  # 23 rows are four uneven chunks
    found, expected = Case(steps, token_ids), Case(steps, token_ids)
    loss, sums = found.ours(divergence)
    naive, naive_sums = expected.naive(divergence)
    (3 * loss).backward()
    (3 * naive).backward()
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(sums, naive_sums)
    torch.testing.assert_close(found.hidden.grad, expected.hidden.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.head.grad, expected.head.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("logits", [1, V * 5, V * ROWS, V * 1000])
def test_chunks_do_not_matter(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = Case(1, None), Case(1, None)
    whole.ours("lk")[0].backward()
    monkeypatch.setitem(vocabulary.LOGITS, "cpu", logits)
    cut.ours("lk")[0].backward()
    torch.testing.assert_close(cut.hidden.grad, whole.hidden.grad)
    torch.testing.assert_close(cut.head.grad, whole.head.grad)


def test_a_frozen_head_and_no_rows_at_all() -> None:
    """A rank whose batch has nothing to score still takes part in the step."""
    case = Case(2, None)
    case.head.requires_grad_(False)
    hidden = case.hidden[:, :0]
    heads = Heads(case.head, case.target_head, None)
    weights = case.weights[:, :0]
    loss, sums = vocabulary_loss("lk", ETA, hidden, case.features[:0], heads, weights)
    loss.backward()
    assert float(loss.detach()) == 0
    assert sums.equal(torch.zeros(3, 2, dtype=torch.float64))
    assert case.hidden.grad is not None
    assert case.head.grad is None


def test_a_target_whose_likely_tokens_the_draft_lacks() -> None:
    """Its law over the draft's tokens underflows in the whole, not in the renormalised law."""
    case = Case(1, IDS)
    case.features = 1e4 * case.features
    case.weights = torch.ones_like(case.weights)
    loss, sums = case.ours("lk")
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(case.hidden.grad).all()
    outside = ~torch.isin((case.features @ case.target_head.T).argmax(dim=-1), IDS)
    assert outside.sum() > 5
    assert float(sums[1, 0]) < ROWS - float(outside.sum()) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_near_the_truth(dtype: torch.dtype) -> None:
    exact, low = Case(2, IDS), Case(2, IDS)
    for name in ("hidden", "head", "features", "target_head"):
        rounded, learns = getattr(low, name).detach().to(dtype), name in ("hidden", "head")
        setattr(exact, name, rounded.double().requires_grad_(learns))
        setattr(low, name, rounded.requires_grad_(learns))
    low.weights = low.weights.float()
    loss, _ = low.ours("lk")
    expected, _ = exact.ours("lk")
    loss.backward()
    expected.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    for mine, theirs in ((low.hidden, exact.hidden), (low.head, exact.head)):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == dtype
        gap = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert gap < tolerance


# ------------------------------------------------------------------------------ the whole objective


def config(**changes: Any) -> TrainConfig:
    return TrainConfig("t", "d", **changes)


@pytest.mark.parametrize("regression", ["l1", "smooth_l1"])
def test_the_papers_objective_is_regression_and_a_tenth_of_cross_entropy(regression: str) -> None:
    case = Case(1, None)
    taken = torch.ones(1, ROWS, dtype=torch.bool)
    heads = Heads(case.target_head, case.target_head, None)
    rows = Rows(case.hidden, case.hidden, case.features, taken)
    count = torch.tensor(2 * ROWS)  # another rank has as many
    loss = objective_loss(config(regression=regression), rows, heads, count)
    case.head = case.target_head
    case.weights = torch.ones(1, ROWS, dtype=torch.float64)
    compare = F.l1_loss if regression == "l1" else F.smooth_l1_loss
    expected = compare(case.hidden[0], case.features) + 0.1 * case.naive("ce")[0] / ROWS
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()) / 2, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss.total, case.hidden)
    (naive,) = torch.autograd.grad(expected / 2, case.hidden)
    torch.testing.assert_close(gradient, naive, rtol=1e-5, atol=1e-9)
    assert set(loss.terms) == {"regression", "cross_entropy", "acceptance", "top1"}


def test_steps_are_weighed_by_decay_and_positions_left_out_count_as_zero() -> None:
    case = Case(3, None)
    taken = torch.arange(ROWS) >= torch.tensor([[0], [1], [2]])
    heads = Heads(case.target_head, case.target_head, None)
    rows = Rows(case.hidden, case.hidden, case.features, taken)
    settings = config(objective="kl", unroll=3, step_decay=0.5)
    loss = objective_loss(settings, rows, heads, torch.tensor(ROWS))
    case.head = case.target_head
    case.weights = taken * torch.tensor([[4.0], [2.0], [1.0]], dtype=torch.float64) / (7 * ROWS)
    value, sums = case.naive("kl")
    assert float(loss.total.detach()) == pytest.approx(float(value.detach()), rel=1e-6)
    torch.testing.assert_close(loss.terms["acceptance"], sums[1] / ROWS)
    assert "regression" not in loss.terms


def test_weights_by_default_and_by_name() -> None:
    found = [
        (c.weight_of_regression, c.weight_of_distribution)
        for c in (
            config(), config(objective="lk"), config(method="eagle3"),
            config(objective="tv", regression_weight=0.2, distribution_weight=0.5),
        )
    ]  # fmt: skip
    assert found == [(1, 0.1), (0, 1), (0, 1), (0.2, 0.5)]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("objective", {"objective": "mse"}), ("method", {"method": "medusa"}),
        ("regression", {"regression": "l2"}), ("init", {"init": "zeros"}),
        ("unroll", {"unroll": 0}), ("unroll", {"unroll": 9}), ("step_decay", {"step_decay": 0}),
        ("lk_eta", {"lk_eta": -1}), ("regression_weight", {"regression_weight": -1.0}),
        ("regression_weight", {"method": "eagle3", "regression_weight": 1.0}),
        ("init", {"init": "target", "layers": 1}),
        ("init", {"init": "target", "intermediate_size": 99}),
    ],
)  # fmt: skip
def test_bad_objective_is_refused_by_name(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(AquilineError, match=f"^{field}="):
        config(**changes)
