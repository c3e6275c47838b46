"""draw() is argmax of the oracle's log-probabilities plus noise, and its law is the oracle's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aquiline.core.params import SamplingParams
from aquiline.evaluation.losslessness import chi_square
from aquiline.evaluation.oracle import target_distribution
from aquiline.sampling.batch import SamplingBatch
from aquiline.sampling.draw import draw, draw_top, position_noise
from tests.sampling.test_filters import logits_strategy, on_an_edge, params_strategy

CPU = torch.device("cpu")


def batch_of(params, seeds) -> SamplingBatch:
    return SamplingBatch.of(params, seeds, CPU)


@settings(max_examples=300, deadline=None)
@given(
    logits=logits_strategy,
    params=params_strategy,
    seed=st.integers(0, 2**63 - 1),
    position=st.integers(0, 2**20),
)
def test_draw_is_the_argmax_over_what_the_filters_keep(logits, params, seed, position):
    assume(not on_an_edge(logits, params))
    batch = batch_of([params], [seed])
    noise = position_noise(batch, torch.tensor([[position]]), len(logits))
    drawn = draw(logits[None, None], batch, noise)
    perturbed = target_distribution(logits, params).log()
    if noise is not None:
        perturbed = perturbed + noise.table[0, 0]
    assert int(drawn) == int(perturbed.argmax())


@settings(max_examples=60, deadline=None)
@given(params=st.lists(params_strategy, min_size=2, max_size=5), seed=st.integers(0, 2**32))
def test_rows_and_nodes_do_not_touch_each_other(params, seed):
    rows, nodes, vocab = len(params), 4, 30
    logits = torch.randn(rows, nodes, vocab, generator=torch.Generator().manual_seed(seed))
    logits = 2 * logits.double()
    for row, one in zip(logits, params, strict=True):
        assume(not any(on_an_edge(node, one) for node in row))
    batch = batch_of(params, range(rows))
    positions = torch.arange(nodes).expand(rows, nodes) + 10
    together = draw(logits, batch, position_noise(batch, positions, vocab))
    for row, one in enumerate(params):
        for node in range(nodes):
            single = batch_of([one], [row])
            noise = position_noise(single, positions[row : row + 1, node : node + 1], vocab)
            alone = draw(logits[row : row + 1, node : node + 1], single, noise)
            assert int(alone) == int(together[row, node])


def test_greedy_rows_are_unaffected_by_filters_and_neighbours():
    logits = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1))
    logits[0, 0, [4, 9]] = 50.0  # a tie goes to the lowest id
    greedy = SamplingParams(temperature=0)
    cut = SamplingParams(temperature=0, top_k=1, top_p=0.01, min_p=1.0)
    sampled = SamplingParams(temperature=1.5, top_k=7, top_p=0.5, min_p=0.1)
    best = logits.argmax(dim=-1)
    assert int(best[0, 0]) == 4
    for params in ([greedy] * 3, [cut] * 3, [greedy, cut, sampled], [cut, greedy, sampled]):
        batch = batch_of(params, [1, 2, 3])
        noise = position_noise(batch, torch.arange(5).expand(3, 5), 40)
        assert (noise is None) == all(p.temperature == 0 for p in params)
        assert torch.equal(draw(logits, batch, noise)[:2], best[:2])


def test_equal_scores_without_noise_go_to_the_lowest_id():
    batch = batch_of([SamplingParams(top_p=0.5)], [0])
    key = position_noise(batch, torch.tensor([[3]]), 6)
    vars(key)["table"] = torch.zeros(1, 1, 6)
    assert int(draw(torch.zeros(1, 1, 6), batch, key)) == 0
    assert draw_top(torch.zeros(1, 1, 6), batch, key, None, None, 3).tolist() == [[[0, 1, 2]]]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6, top_p=0.7),
        SamplingParams(temperature=1.4, top_k=9, top_p=0.85, min_p=0.05),
    ],
)
def test_the_law_of_the_draw(params):
    """40k positions of one seed; a reused or biased noise would show."""
    count, vocab = 40_000, 20
    logits = 1.5 * torch.randn(vocab, generator=torch.Generator().manual_seed(2))
    batch = batch_of([params], [123])
    noise = position_noise(batch, torch.arange(count)[None], vocab)
    drawn = draw(logits.expand(1, count, vocab), batch, noise)[0]
    counts = torch.bincount(drawn, minlength=vocab)
    assert chi_square(counts, count * target_distribution(logits, params)) > 1e-4


def test_draw_changes_neither_its_logits_nor_its_noise():
    batch = batch_of([SamplingParams(temperature=0.8, top_k=3, top_p=0.5, min_p=0.1)], [5])
    logits = torch.randn(1, 2, 30, generator=torch.Generator().manual_seed(3))
    noise = position_noise(batch, torch.tensor([[3, 4]]), 30)
    before = logits.clone(), noise.table.clone()
    draw(logits, batch, noise)
    assert torch.equal(logits, before[0])
    assert torch.equal(noise.table, before[1])
