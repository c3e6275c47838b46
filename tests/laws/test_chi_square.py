"""Law 2: every rule, tree and filter emits the target's exact distribution; planted bugs are seen.

Real rules over tables instead of models (aquiline.evaluation.losslessness). The seeds are fixed, so
a p-value below the line is a bug and no accident. The plants are bugs that real engines have had;
the same measurement has to reject each.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy import stats

from aquiline.core.params import MATCHING_RULES, SamplingParams
from aquiline.evaluation.losslessness import (
    MarkovPair,
    chi_square,
    joint_cells,
    measure_fit,
)
from aquiline.evaluation.oracle import target_distribution
from aquiline.kernels import noise as noise_module
from aquiline.kernels import ops, reference_sampling
from aquiline.speculation.tree import TreeShape
from aquiline.speculation.verification import block, coupled, multi_round
from aquiline.speculation.verification.rules import RULES

ACCEPT, REJECT = 1e-4, 1e-6
VOCAB = 16
BUSHY = TreeShape.of([[0], [1], [2], [0, 0], [0, 1], [1, 0]])
TREES = {  # tree, requests (each takes one round or more)
    "chain-1": (TreeShape.chain(1), 200_000),
    "chain-3": (TreeShape.chain(3), 120_000),
    "bushy": (BUSHY, 150_000),
    "eagle-25": (TreeShape.named("eagle-25"), 10_000),
}
PARAMS = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "top-k": SamplingParams(top_k=5),
    "top-p": SamplingParams(top_p=0.8),
    "min-p": SamplingParams(min_p=0.1),
    "all": SamplingParams(temperature=1.3, top_k=8, top_p=0.9, min_p=0.05),
    "reduced-vocabulary": SamplingParams(temperature=0.9),
}
CHAIN = TREES["chain-3"][0]
REDUCED = torch.tensor([1, 2, 3, 5, 6, 8, 9, 12, 13, 15])
PAIR = MarkovPair.random(VOCAB, seed=1)
REDUCED_PAIR = MarkovPair.random(VOCAB, seed=1, draft_ids=REDUCED)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


BASELINES = [  # rule, tree
    ("target-only", "chain-3"), ("target-only", "bushy"), ("independent", "bushy"),
    ("block", "chain-1"), ("block", "chain-3"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "tree", "params"),
    [(r, t, p) for r in ("coupled", "multi-round") for t in TREES for p in PARAMS]
    + [(r, t, p) for r, t in BASELINES for p in ("plain", "all", "reduced-vocabulary")],
)
def test_emits_the_target_distribution(rule, tree, params):
    shape, rows = TREES[tree]
    pair = REDUCED_PAIR if params == "reduced-vocabulary" else PAIR
    fit = measure_fit(pair, shape, RULES[rule], PARAMS[params], rows)
    assert fit.rounds >= (200_000 if rows > 100_000 else rows)
    assert fit.tokens_per_round > 1.3, "too few drafts were accepted to test anything"
    assert min(fit.first_token, fit.joint) > ACCEPT, fit


RETRIEVING = {
    "chain": TreeShape.chain(2).retrieving(3),
    "bushy": TreeShape.of([[0], [1], [0, 0], [1, 0]]).retrieving(2),
}


def _retrieving(pair, shape, seed=5):
    """What the text may say next, of some likelihood: a guess of its own, the draft's or wrong."""
    generator = torch.Generator().manual_seed(seed)
    tokens, found = torch.arange(VOCAB), []
    for _ in range(shape.retrieved):
        ranks = torch.randint(3, (VOCAB, 1), generator=generator)
        tokens = pair.target[tokens].argsort(dim=-1, descending=True).gather(1, ranks).squeeze(1)
        found.append(tokens)
    return replace(pair, retrieved=torch.stack(found, dim=1))


@pytest.mark.parametrize("rule", MATCHING_RULES)
@pytest.mark.parametrize("tree", RETRIEVING)
@pytest.mark.parametrize("params", ["plain", "all", "reduced-vocabulary"])
def test_retrieved_nodes_leave_the_distribution(rule, tree, params):
    """With children drafted beside them that may say the same, and on retrieved nodes alone."""
    shape, base = RETRIEVING[tree], REDUCED_PAIR if params == "reduced-vocabulary" else PAIR
    pair = _retrieving(base, shape)
    fit = measure_fit(pair, shape, RULES[rule], PARAMS[params], 150_000)
    drafted = measure_fit(base, shape.retrieving(0), RULES[rule], PARAMS[params], 20_000)
    assert fit.rounds >= 200_000
    assert fit.tokens_per_round > drafted.tokens_per_round + 0.02, "nothing retrieved was accepted"
    assert min(fit.first_token, fit.joint) > ACCEPT, fit


# ------------------------------------------------------------------------------- planted bugs


def _fit_of_plant(rule, shape=BUSHY, params=PARAMS["plain"], rows=60_000):
    return measure_fit(PAIR, shape, rule, params, rows)


def _assert_rejected(fit):
    assert min(fit.first_token, fit.joint) < REJECT, f"the planted bug went unseen: {fit}"


def test_rejects_a_sibling_kept_in_the_draft_distribution(monkeypatch):
    real = reference_sampling.after_rejection

    def plant(residual, proposal, token):
        return real(residual, proposal, token)[0], proposal

    monkeypatch.setattr(reference_sampling, "after_rejection", plant)
    _assert_rejected(_fit_of_plant(multi_round.MultiRound))


def test_rejects_a_target_not_reduced_to_its_residual(monkeypatch):
    real = reference_sampling.after_rejection

    def plant(residual, proposal, token):
        return residual, real(residual, proposal, token)[1]

    monkeypatch.setattr(reference_sampling, "after_rejection", plant)
    _assert_rejected(_fit_of_plant(multi_round.MultiRound))


def test_rejects_argmax_for_the_residual_draw(monkeypatch):
    def plant(seeds, choices, positions, vocab, stream):
        noise = ops.gumbel_noise(seeds, choices, positions, vocab, stream)
        return torch.zeros_like(noise) if stream is ops.Stream.RESIDUAL else noise

    monkeypatch.setattr(noise_module, "gumbel_noise", plant)
    _assert_rejected(_fit_of_plant(multi_round.MultiRound))


@pytest.mark.parametrize("shared", [ops.Stream.ACCEPT, ops.Stream.RESIDUAL])
def test_rejects_a_stream_shared_with_the_proposal(monkeypatch, shared):
    def stream_of(stream):
        return ops.Stream.PROPOSE if stream is shared else stream

    def gumbel(seeds, choices, positions, vocab, stream):
        return ops.gumbel_noise(seeds, choices, positions, vocab, stream_of(stream))

    def uniform(seeds, choices, positions, count, stream):
        return ops.uniform_noise(seeds, choices, positions, count, stream_of(stream))

    monkeypatch.setattr(noise_module, "gumbel_noise", gumbel)
    monkeypatch.setattr(noise_module, "uniform_noise", uniform)
    _assert_rejected(_fit_of_plant(multi_round.MultiRound))


class PrunedByConfidence(multi_round.MultiRound):
    """Samples two children more than it needs and keeps those that the draft believes in most."""

    spare = 2

    def propose(self, logits, depth, count):
        sampled = super().propose(logits, depth, count + self.spare)
        return sampled.gather(-1, logits.gather(-1, sampled).topk(count).indices)


@pytest.mark.parametrize("tree", ["chain-1", "bushy"])
def test_rejects_children_pruned_by_confidence(tree):
    _assert_rejected(_fit_of_plant(PrunedByConfidence, TREES[tree][0]))


class RankedByConfidence(PrunedByConfidence):
    """Samples just the children it needs, but tries the likeliest first."""

    spare = 0


def test_rejects_children_ranked_by_confidence():
    _assert_rejected(_fit_of_plant(RankedByConfidence))


def test_rejects_block_verification_whose_residual_ignores_the_weight(monkeypatch):
    """max(0, P - Q), the ratio rule's, where only weight w of the target is left."""
    real = block.residual_of

    def plant(weights, target_probs, draft_probs):
        return real(torch.ones_like(weights), target_probs, draft_probs)

    monkeypatch.setattr(block, "residual_of", plant)
    _assert_rejected(_fit_of_plant(RULES["block"], CHAIN))


def test_rejects_block_verification_with_noise_that_a_later_round_meets_again(monkeypatch):
    """Keyed by position alone, as the other rules are: a round ends because of nodes below it."""
    monkeypatch.setattr(block, "round_keys", lambda round_: round_.positions)
    fit = _fit_of_plant(RULES["block"], CHAIN)
    assert fit.first_token > ACCEPT, "one round is exact: the joint law has to tell"
    _assert_rejected(fit)


def test_rejects_noise_not_keyed_by_position(monkeypatch):
    real = coupled.position_noise

    def plant(sampling, positions, vocab):
        return real(sampling, positions[:, :1].expand_as(positions), vocab)

    monkeypatch.setattr(coupled, "position_noise", plant)
    fit = _fit_of_plant(coupled.Coupled)
    assert fit.first_token > ACCEPT, "the first token cannot tell: the joint law has to"
    _assert_rejected(fit)


def test_rejects_a_child_followed_without_a_match(monkeypatch):
    real = coupled.accept

    def plant(tree, tokens, drawn):
        # Every first child counts as a match.
        first = tree.routes[-1, 1]
        swapped = tokens.clone()
        swapped[:, first] = drawn[:, 0]
        return real(tree, swapped, drawn)

    monkeypatch.setattr(coupled, "accept", plant)
    fit = _fit_of_plant(coupled.Coupled)
    _assert_rejected(fit)


def test_rejects_a_retrieved_child_that_is_trusted(monkeypatch):
    """The text said it before, after the same tokens; that does not make it what is drawn now."""
    real, shape = coupled.accept, RETRIEVING["bushy"]

    def plant(tree, tokens, drawn):
        drawn = drawn.clone()
        seen_before = tokens[:, 0] % 4 == 0  # the plant need not be everywhere
        drawn[:, 0] = torch.where(seen_before, tokens[:, shape.drafted_size], drawn[:, 0])
        return real(tree, tokens, drawn)

    monkeypatch.setattr(coupled, "accept", plant)
    _assert_rejected(
        measure_fit(_retrieving(PAIR, shape), shape, coupled.Coupled, PARAMS["plain"], 60_000)
    )


def test_rejects_a_retrieved_node_judged_by_the_noise_of_another_depth(monkeypatch):
    """The chain is numbered behind the tree; its noise is still that of its own depths."""
    shape = RETRIEVING["bushy"]
    real = coupled.draw

    def plant(logits, sampling, noise, levels):
        shifted = levels.clone()
        shifted[shape.drafted_size] = 0
        return real(logits, sampling, noise, shifted)

    monkeypatch.setattr(coupled, "draw", plant)
    fit = measure_fit(_retrieving(PAIR, shape), shape, coupled.Coupled, PARAMS["plain"], 60_000)
    assert fit.first_token > ACCEPT, "the first token cannot tell: the joint law has to"
    _assert_rejected(fit)


# ---------------------------------------------------------------- the instruments themselves


def test_chi_square_agrees_with_scipy():
    generator = torch.Generator().manual_seed(0)
    expected = 5 + 100 * torch.rand(40, generator=generator, dtype=torch.float64)
    counts = torch.poisson(expected, generator=generator)
    expected *= counts.sum() / expected.sum()
    assert float(expected.min()) >= 5
    reference = stats.chisquare(counts.numpy(), expected.numpy()).pvalue
    assert chi_square(counts, expected) == pytest.approx(reference, rel=1e-9)


def test_chi_square_pools_small_cells_and_refuses_the_impossible():
    counts = torch.tensor([50, 40, 3, 4, 3])
    expected = torch.tensor([48.0, 42.0, 4.0, 3.0, 3.0])
    pooled = stats.chisquare([50, 40, 10], [48, 42, 10]).pvalue
    assert chi_square(counts, expected) == pytest.approx(pooled)
    small_pool = stats.chisquare([60, 44], [58, 46]).pvalue  # 4 alone is too small: 42 + 4
    assert chi_square(torch.tensor([60, 40, 4]), torch.tensor([58.0, 42, 4])) == pytest.approx(
        small_pool
    )
    assert chi_square(torch.tensor([99, 1]), torch.tensor([100.0, 0.0])) == 0.0


def test_joint_cells_lose_no_mass_and_match_brute_force():
    generator = torch.Generator().manual_seed(3)
    transition = torch.rand(4, 4, generator=generator, dtype=torch.float64) ** 3
    transition /= transition.sum(-1, keepdim=True)
    rows = 3000
    column, columns = torch.zeros(rows, dtype=torch.int64), []
    for _ in range(3):
        column = torch.multinomial(transition[column], 1, generator=generator).squeeze(1)
        columns.append(column)
    tokens = torch.stack(columns, dim=1)
    cells = joint_cells(
        tokens, lambda said: transition[said[:, -1]] if said.numel() else transition[:1]
    )
    assert int(cells.counts.sum()) == rows
    assert float(cells.expected.sum()) == pytest.approx(rows)
    large = []
    for a in range(4):
        for b in range(4):
            for c in range(4):
                mean = float(rows * transition[0, a] * transition[a, b] * transition[b, c])
                seen = int((tokens == torch.tensor([a, b, c])).all(-1).sum())
                large += [(round(mean, 6), seen)] * (mean >= 5)
    ours = {(round(float(e), 6), int(n)) for e, n in zip(cells.expected, cells.counts, strict=True)}
    assert large
    assert set(large) <= ours
    assert cells.p_value > ACCEPT


def test_oracle_by_hand():
    probs = torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1], dtype=torch.float64)

    def of(**params):
        return target_distribution(probs.log(), SamplingParams(**params)).tolist()

    assert of() == pytest.approx(probs.tolist())
    assert of(temperature=0) == [0, 1, 0, 0, 0]
    assert of(temperature=0.5) == pytest.approx((probs**2 / (probs**2).sum()).tolist())
    assert of(top_k=2) == pytest.approx([0, 4 / 7, 3 / 7, 0, 0])
    assert of(top_p=0.75) == pytest.approx([0, 8 / 17, 6 / 17, 3 / 17, 0])
    assert of(min_p=0.3) == pytest.approx([0, 8 / 17, 6 / 17, 3 / 17, 0])
    # After top-k the nucleus is that of the two left: 4/7 is not yet 0.6, so both stay.
    assert of(top_k=2, top_p=0.6) == pytest.approx([0, 4 / 7, 3 / 7, 0, 0])
    assert of(top_k=2, top_p=0.5) == pytest.approx([0, 1, 0, 0, 0])
    ties = torch.zeros(4, dtype=torch.float64)
    assert target_distribution(ties, SamplingParams(top_k=1)).tolist() == [0.25] * 4
    assert target_distribution(ties, SamplingParams(top_p=0.1)).tolist() == [0.25] * 4
