"""The rows that the benchmark of rules promises, and how a row counts."""

from __future__ import annotations

import pytest

from aquiline.core.outputs import RequestOutput, SpeculationStats
from benchmarks.rules import CHAIN, NODES, RULES, SAMPLING, acceptance, shapes_of


@pytest.mark.parametrize("rule", RULES)
def test_every_setting_has_a_chain_and_a_tree(rule):
    found = shapes_of(rule)
    assert found[CHAIN] == list(SAMPLING)
    trees = {tree: settings for tree, settings in found.items() if tree != CHAIN}
    assert all(tree.size - 1 == NODES for tree in trees)
    branching = sorted(setting for settings in trees.values() for setting in settings)
    assert branching == ([] if rule == "block" else sorted(SAMPLING))


def test_long_texts_weigh_more():
    stats = [SpeculationStats(1, 4, 3, (1, 1, 1)), SpeculationStats(9, 12, 27, (2, 1, 0))]
    outputs = [
        RequestOutput(i, (1,), True, ("",), lambda: (), lambda one=one: one, lambda: None)
        for i, one in enumerate(stats)
    ]
    assert acceptance(outputs) == {
        "tokens_per_call": 1.6, "accepted_by_depth": [0.3, 0.2, 0.1], "rounds": 10
    }  # fmt: skip
