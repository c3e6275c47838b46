"""Counted paths are what the decoder accepted, and price smaller trees; rounds can be timed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquiline.core.params import SamplingParams
from aquiline.decoding.loop import decode_prompts
from aquiline.evaluation.costs import available_bytes, measure_round_ms, pages_of
from aquiline.evaluation.paths import count_paths, measure_paths, measurement_tree
from aquiline.speculation.dispatch.paths import expected_tokens, isotonic
from aquiline.speculation.tree import POOL, TreeShape
from aquiline.training.acceptance import measure_acceptance
from tests.laws.tiny import memoryless_models, tiny_models

GREEDY = SamplingParams(temperature=0)
NO_END: frozenset[int] = frozenset()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(sorted(POOL)),
    leaves=st.lists(st.integers(0, 8), max_size=30),
)
def test_every_node_on_the_way_to_a_leaf_counts_once(name, leaves):
    shape = TreeShape.named(name)
    leaves = [leaf % shape.size for leaf in leaves]
    counts = count_paths(shape, leaves)
    assert counts.rounds == len(leaves)
    nodes = [(), *shape.paths]
    for path, share in counts.shares.items():
        passed = sum(nodes[leaf][: len(path)] == path for leaf in leaves)
        assert share == pytest.approx(passed / max(len(leaves), 1))
    tokens = sum(shape.depths[leaf] + 1 for leaf in leaves)
    assert counts.tokens_per_call == pytest.approx(tokens / max(len(leaves), 1))


@pytest.mark.parametrize("rule", ["coupled", "multi-round"])
def test_a_perfect_draft_accepts_the_first_child_everywhere(rule):
    models, shape = memoryless_models(), TreeShape.named("tree-8")
    shares = measure_paths(models, [[1, 2], [3], [4, 5, 6]], shape, 13, NO_END, GREEDY, rule, 2)
    assert (shares.rule, shares.band, shares.rounds) == (rule, "greedy", 9)  # 12 tokens, 4 a round
    assert {path for path, share in shares.shares.items() if share == 1} == {(0,), (0, 0), (0,) * 3}
    assert set(shares.shares.values()) == {0, 1}


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_paths_add_up_to_the_acceptance_measured_otherwise(temperature):
    """By depth and in sum; a draft that knows little, so that siblings are accepted too."""
    models, shape = tiny_models(), TreeShape.named("eagle-25")
    prompts, params = [[1, 2, 3], [7], [9, 4]], SamplingParams(temperature=temperature)
    shares = measure_paths(models, prompts, shape, 40, NO_END, params).shares
    acceptance = measure_acceptance(models, prompts, shape, 40, NO_END, params)
    assert expected_tokens(shares, shape) == pytest.approx(acceptance.tokens_per_call)
    for depth, share in enumerate(acceptance.by_depth, start=1):
        at_depth = sum(s for path, s in shares.items() if len(path) == depth)
        assert at_depth == pytest.approx(share)
    assert acceptance.tokens_per_call > 1
    assert expected_tokens(isotonic(shares), shape) == pytest.approx(acceptance.tokens_per_call)


def test_a_prompt_that_ended_leaves_the_batch():
    models = memoryless_models()
    chain, prompts = TreeShape.chain(2), [[1, 2], [3]]

    def rounds(ends):
        return list(decode_prompts(models, prompts, chain, 20, ends, GREEDY))

    texts: dict[int, list[int]] = {0: [], 1: []}
    for one in rounds(NO_END):
        for row, tokens in zip(one.rows, one.verdict.tokens.tolist(), strict=True):
            texts[row] += tokens
    end = next(token for token in texts[0] if token not in texts[1])
    stopped = rounds(frozenset({end}))
    left = [one.rows for one in stopped]
    assert left[0] == (0, 1)
    assert left[-1] == (1,)
    assert len(left) == len(rounds(NO_END))


@pytest.mark.parametrize("rule", ["coupled", "multi-round"])
def test_the_measurement_tree(rule):
    for temperature in (0, 0.6, 1.0):
        shape = measurement_tree(rule, temperature)
        assert shape.size == 64
        assert 4 <= shape.depth <= 7


@pytest.mark.parametrize("tree", [TreeShape.chain(0), TreeShape.named("tree-8")])
def test_a_round_can_be_timed(tree):
    models, batch, context = tiny_models(), 3, 40
    pages = pages_of(tree, batch, context, 16)
    assert (pages - 1) * 16 >= batch * (context + tree.size)
    ms = measure_round_ms(models, models.planes(pages, 16), tree, batch, context, repeats=3)
    assert 0 < ms < 5000
    assert available_bytes(models.device) > 0
