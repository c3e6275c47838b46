"""Law 2 for what changes logits: penalties, bias and bans are exact at every node of a tree.

The short version runs every parameter alone and a few random combinations; ``make laws`` runs them
at full length. The same measurement has to reject each planted bug.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from aquiline.core.params import SamplingParams
from aquiline.evaluation import losslessness
from aquiline.evaluation.losslessness import ROOT, MarkovPair, measure_fit
from aquiline.evaluation.oracle import adjusted_logits
from aquiline.kernels import ops
from aquiline.speculation import adjusting
from aquiline.speculation.tree import TreeShape
from aquiline.speculation.verification.multi_round import MultiRound
from aquiline.speculation.verification.rules import RULES

ACCEPT, REJECT = 1e-4, 1e-6
VOCAB = 16
PROMPT, ENDS = (5, 9, 5, ROOT), (3, 9)
REDUCED = torch.tensor([1, 2, 3, 5, 6, 8, 9, 12, 13, 15])
PAIR = MarkovPair.random(VOCAB, seed=1)
REDUCED_PAIR = MarkovPair.random(VOCAB, seed=1, draft_ids=REDUCED)
SERVED = ("coupled", "multi-round")  # the others are baselines, under law 2 in test_chi_square.py
TREES = {
    "chain-3": TreeShape.chain(3),
    "bushy": TreeShape.of([[0], [1], [2], [0, 0], [0, 1], [1, 0]]),
}
PARAMS = {
    "repetition": SamplingParams(repetition_penalty=2.0),
    "repetition below 1": SamplingParams(repetition_penalty=0.6),
    "presence": SamplingParams(presence_penalty=1.5),
    "presence below 0": SamplingParams(presence_penalty=-1.0),
    "frequency": SamplingParams(frequency_penalty=1.5),
    "frequency below 0": SamplingParams(frequency_penalty=-0.8),
    "bias": SamplingParams(logit_bias={0: 2.0, 1: -100.0, 7: -1.5, 9: 1.0, 15: 0.5}),
    "allowed": SamplingParams(allowed_token_ids=(0, 1, 4, 5, 8, 9, 14, 15)),
    "allowed, none of them drafted": SamplingParams(allowed_token_ids=(0, 4, 7, 10)),
    "banned": SamplingParams(banned_token_ids=(2, 5, 12, 13)),
    "min_tokens": SamplingParams(min_tokens=2),
    "all": SamplingParams(
        temperature=0.8, top_k=9, top_p=0.95, min_p=0.01, repetition_penalty=1.3,
        presence_penalty=0.4, frequency_penalty=0.6, logit_bias={3: 2.0, 4: -1.0},
        banned_token_ids=(7, 8), min_tokens=3, logprobs=0,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fit_of(params, tree, rule, rows, pair=PAIR):
    return measure_fit(pair, TREES[tree], rule, params, rows, prompt=PROMPT, end_tokens=ENDS)


def assert_fits(params, tree, rule, rows, pair=PAIR):
    fit = fit_of(params, tree, RULES[rule], rows, pair)
    assert min(fit.first_token, fit.joint) > ACCEPT, (fit, params)
    return fit


def pair_of(name):
    return REDUCED_PAIR if name in ("allowed, none of them drafted", "all") else PAIR


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("rule", SERVED)
def test_a_parameter_alone(rule, tree, name):
    assert_fits(PARAMS[name], tree, rule, 8_000, pair_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("rule", SERVED)
def test_a_parameter_alone_at_full_length(rule, tree, name):
    fit = assert_fits(PARAMS[name], tree, rule, 200_000, pair_of(name))
    assert fit.rounds >= 200_000
    assert fit.tokens_per_round > 1.2 or name == "allowed, none of them drafted"


TOKENS = st.integers(0, VOCAB - 1)
PENALTY = st.one_of(st.just(0.0), st.floats(-2, 2))
COMBINATIONS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.5, 0.8, 1.0, 1.5]),
    top_k=st.sampled_from([0, 0, 4, 9]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.6]),
    min_p=st.sampled_from([0.0, 0.0, 0.05]),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2.5)),
    presence_penalty=PENALTY,
    frequency_penalty=PENALTY,
    logit_bias=st.one_of(st.none(), st.dictionaries(TOKENS, st.floats(-4, 4), max_size=8)),
    # Before and after: six tokens that are left to say.
    allowed_token_ids=st.one_of(
        st.none(), st.lists(TOKENS, max_size=6).map(lambda ids: (*ids, 0, 1, 4, 6, 8, 10))
    ),
    banned_token_ids=st.lists(st.sampled_from([2, 3, 5, 7, 9, 11]), max_size=4).map(tuple),
    min_tokens=st.integers(0, 4),
    logprobs=st.sampled_from([None, 0]),
)


def combinations(count):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return lambda test: seed(5)(
        settings(max_examples=count, deadline=None, database=None, derandomize=False,
                 suppress_health_check=quiet, phases=[Phase.generate])(
            given(COMBINATIONS, st.sampled_from(sorted(TREES)), st.sampled_from(SERVED),
                  st.sampled_from([PAIR, REDUCED_PAIR]))(test)
        )
    )  # fmt: skip


@combinations(8)
def test_random_combinations(params, tree, rule, pair):
    assert_fits(params, tree, rule, 5_000, pair)


@pytest.mark.slow
@combinations(50)
def test_fifty_random_combinations(params, tree, rule, pair):
    assert_fits(params, tree, rule, 20_000, pair)


# ----------------------------------------------------------------------------------- planted bugs


def _plant(monkeypatch, wrap):
    """``wrap(real, logits, table, slots, positions, levels, history, token_ids, masks, raw)``."""
    real = ops.adjust_logits
    monkeypatch.setattr(adjusting.ops, "adjust_logits", lambda *args: wrap(real, *args))


def _assert_rejected(params, tree="bushy", rule="coupled", rows=20_000, pair=PAIR):
    factory = RULES[rule] if isinstance(rule, str) else rule
    fit = fit_of(params, tree, factory, rows, pair)
    assert min(fit.first_token, fit.joint) < REJECT, f"the planted bug went unseen: {fit}"


@pytest.mark.parametrize("name", ["repetition", "presence", "frequency"])
@pytest.mark.parametrize("rule", SERVED)
def test_rejects_a_path_left_out_of_the_history(monkeypatch, rule, name):
    def plant(real, logits, table, slots, positions, levels, history, token_ids, masks, raw):
        real(logits, table, slots, positions, levels, None, token_ids, masks, raw)

    _plant(monkeypatch, plant)
    _assert_rejected(PARAMS[name], rule=rule)


def test_rejects_penalties_after_the_temperature(monkeypatch):
    def plant(real, logits, *args):
        before = logits.clone()
        real(logits, *args)
        logits.copy_(before + (logits - before) * 0.5)

    _plant(monkeypatch, plant)
    _assert_rejected(SamplingParams(temperature=0.5, presence_penalty=1.5), "chain-3")


@pytest.mark.parametrize("off", [-1, 1])
def test_rejects_min_tokens_off_by_one(monkeypatch, off):
    def plant(real, logits, table, slots, positions, *args):
        real(logits, table, slots, positions + off, *args)

    _plant(monkeypatch, plant)
    _assert_rejected(PARAMS["min_tokens"])


@pytest.mark.parametrize("depth", [0, 1])
def test_rejects_a_bias_left_out_at_one_depth(monkeypatch, depth):
    """At the root, which decides about its children, or at the children alone."""

    def plant(real, logits, table, slots, positions, levels, history, token_ids, masks, raw):
        before = logits.clone()
        real(logits, table, slots, positions, levels, history, token_ids, masks, raw)
        if logits.shape[1] == len(levels) == TREES["bushy"].size:
            logits[:, levels == depth] = before[:, levels == depth]

    _plant(monkeypatch, plant)
    _assert_rejected(PARAMS["bias"])


# --------------------------------------------------------------------- the form of a text


def _form() -> torch.Tensor:
    """After each token some tokens may come; after every fourth, one alone."""
    form = torch.rand(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3)) < 0.4
    form[range(VOCAB), [(5 * t + 3) % VOCAB for t in range(VOCAB)]] = True
    form[1::4] = torch.eye(VOCAB, dtype=torch.bool)[
        [(3 * t + 7) % VOCAB for t in range(1, VOCAB, 4)]
    ]
    return form


FORMED, FORMED_REDUCED = (replace(pair, form=_form()) for pair in (PAIR, REDUCED_PAIR))
FORM = {"structured_outputs": {"json_object": True}}  # which form is the pair's
FORMS = {
    "form": SamplingParams(**FORM),
    "form, filters, penalties": SamplingParams(
        temperature=0.8, top_k=9, top_p=0.95, min_p=0.01, repetition_penalty=1.3,
        presence_penalty=0.4, frequency_penalty=0.6, logit_bias={3: 2.0, 4: -1.0}, **FORM,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("rule", SERVED)
@pytest.mark.parametrize("pair", [FORMED, FORMED_REDUCED], ids=["whole", "reduced"])
def test_a_form(pair, rule, tree, name):
    fit = assert_fits(FORMS[name], tree, rule, 8_000, pair)
    assert fit.tokens_per_round > 1.2


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("rule", SERVED)
def test_a_form_at_full_length(rule, tree, name):
    assert_fits(FORMS[name], tree, rule, 200_000, FORMED_REDUCED)


def test_rejects_a_mask_left_out_at_one_depth(monkeypatch):
    def plant(real, logits, table, slots, positions, levels, history, token_ids, masks, raw):
        if masks is not None and masks.shape[1] > 1:
            masks[:, levels == 1] = -1
        real(logits, table, slots, positions, levels, history, token_ids, masks, raw)

    _plant(monkeypatch, plant)
    _assert_rejected(FORMS["form"], pair=FORMED)


@pytest.mark.parametrize("rule", SERVED)
def test_rejects_the_mask_of_a_nodes_parent(monkeypatch, rule):
    def plant(real, logits, table, slots, positions, levels, history, token_ids, masks, raw):
        if masks is not None and masks.shape[1] > 1:
            masks = masks[:, list(TREES["bushy"].parents)]
        real(logits, table, slots, positions, levels, history, token_ids, masks, raw)

    _plant(monkeypatch, plant)
    _assert_rejected(FORMS["form"], rule=rule, pair=FORMED)


def test_foresight_that_is_wrong_costs_speed_alone(monkeypatch):
    """Any tokens: exact where a rule says so, and one that says so wrongly is found out."""

    class Careless(MultiRound):
        any_proposal = True

    def wrong(pair, roots, depth):
        return (roots[:, None] * 3 + torch.arange(depth)) % (VOCAB + 1) - 1

    right = fit_of(FORMS["form"], "bushy", RULES["coupled"], 20_000, FORMED)
    monkeypatch.setattr(MarkovPair, "foreseen", wrong)
    fit = assert_fits(FORMS["form"], "bushy", "coupled", 20_000, FORMED)
    assert fit.tokens_per_round < right.tokens_per_round - 0.1
    _assert_rejected(FORMS["form"], "bushy", Careless, pair=FORMED)


def test_rejects_a_filtered_draft_that_reports_its_unfiltered_distribution(monkeypatch):
    raw = []

    def plant(round_, logits, above, masks):
        raw.append(logits.clone())
        adjusting.adjust_draft(round_, logits, above, masks)

    class Unfiltered(MultiRound):
        def propose(self, logits, depth, count):
            children = super().propose(logits, depth, count)
            self._draft_logits[-1] = raw[-1]
            return children

    monkeypatch.setattr(losslessness, "adjust_draft", plant)
    _assert_rejected(FORMS["form"], rule=Unfiltered, pair=FORMED)


def test_rejects_a_draft_distribution_that_was_not_adjusted(monkeypatch):
    raw = []

    def plant(round_, logits, above, masks):
        raw.append(logits.clone())
        adjusting.adjust_draft(round_, logits, above, masks)

    class Unadjusted(MultiRound):
        def propose(self, logits, depth, count):
            children = super().propose(logits, depth, count)
            self._draft_logits[-1] = raw[-1]
            return children

    monkeypatch.setattr(losslessness, "adjust_draft", plant)
    _assert_rejected(PARAMS["bias"], rule=Unadjusted)


# ------------------------------------------------------------------------------------- the oracle


def test_the_oracle_by_hand():
    logits = torch.tensor([2.0, -2.0, 4.0, 1.0, 0.0, 3.0])
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25,
        logit_bias={3: 1.0, 5: 7.0}, banned_token_ids=(5,), min_tokens=4,
    )  # fmt: skip
    adjusted = adjusted_logits(logits, params, prompt=(1, 2), said=(0, 0, 1), end_tokens=(4,))
    infinity = float("-inf")
    assert adjusted.tolist() == [1.0 - 0.5 - 0.5, -4.0 - 0.75, 2.0, 2.0, infinity, infinity]
    later = adjusted_logits(logits, params, (1, 2), (0, 0, 1, 0), (4,))
    assert later.tolist()[4] == 0.0
    allowed = SamplingParams(allowed_token_ids=(2, 4))
    assert adjusted_logits(logits, allowed, (), (), ()).isneginf().tolist() == [
        token not in (2, 4) for token in range(6)
    ]
