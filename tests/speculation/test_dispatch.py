"""Best trees against brute force, costs that stay monotone, choices, and files that are refused."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquiline.core.errors import AquilineError
from aquiline.speculation.dispatch.costs import CostPoint, CostTable
from aquiline.speculation.dispatch.default import RANKS, BatchRule, default_table, likeliest_paths
from aquiline.speculation.dispatch.dispatcher import GAIN, PLAIN, Dispatcher, tree_pool
from aquiline.speculation.dispatch.paths import (
    BANDS,
    PathShares,
    PathTable,
    band_of,
    best_tree,
    expected_tokens,
    isotonic,
)
from aquiline.speculation.dispatch.table import DispatchTable, Provenance
from aquiline.speculation.tree import TreeShape

TreePaths = frozenset[tuple[int, ...]]


@st.composite
def share_tables(draw, most: int = 12) -> dict[tuple[int, ...], float]:
    """Arbitrary shares on a random closed set of paths."""
    paths: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(1, most))):
        parent = draw(st.sampled_from([(), *paths]))
        rank = sum(path[:-1] == parent and len(path) == len(parent) + 1 for path in paths)
        paths.append((*parent, rank))
    return {path: draw(st.integers(0, 20)) / 20 for path in paths}


def predecessor(path: tuple[int, ...]) -> tuple[int, ...]:
    return path[:-1] if path[-1] == 0 else (*path[:-1], path[-1] - 1)


def subtrees(paths) -> list[TreePaths]:
    """Every closed, non-empty subset."""
    found = []
    for count in range(1, len(paths) + 1):
        for chosen in itertools.combinations(paths, count):
            inside = {(), *chosen}
            if all(predecessor(path) in inside for path in chosen):
                found.append(frozenset(chosen))
    return found


# ------------------------------------------------------------------------------------------ paths


@settings(max_examples=60, deadline=None)
@given(shares=share_tables(most=8))
def test_isotonic_is_the_projection(shares):
    """The conditions of the projection onto the cone that closed subtrees generate."""
    clean = isotonic(shares)
    assert set(clean) == set(shares)
    for path in shares:
        before = predecessor(path)
        assert not before or clean[path] <= clean[before] + 1e-12
    gap = {path: shares[path] - clean[path] for path in shares}
    assert sum(gap.values()) == pytest.approx(0, abs=1e-9)
    assert sum(gap[path] * clean[path] for path in shares) == pytest.approx(0, abs=1e-9)
    for tree in subtrees(shares):
        assert sum(gap[path] for path in tree) <= 1e-9


@settings(max_examples=100, deadline=None)
@given(shares=share_tables(most=25), depth=st.integers(1, 6))
def test_the_trees_of_a_depth_are_nested(shares, depth):
    clean = isotonic(shares)
    known = sum(len(path) <= depth for path in shares)
    smaller: set[tuple[int, ...]] = set()
    for nodes in range(1, len(shares) + 2):
        tree = best_tree(clean, nodes, depth)  # TreeShape.of refuses a set that is not closed
        assert len(tree.paths) == min(nodes, known)
        assert tree.depth <= depth
        assert smaller <= set(tree.paths)
        smaller = set(tree.paths)


@settings(max_examples=60, deadline=None)
@given(shares=share_tables(most=9), depth=st.integers(1, 4))
def test_no_tree_of_equal_size_is_better(shares, depth):
    clean = isotonic(shares)
    within = [path for path in clean if len(path) <= depth]
    for tree in subtrees(within):
        ours = best_tree(clean, len(tree), depth)
        assert len(ours.paths) == len(tree)
        assert expected_tokens(clean, ours) >= 1 + sum(clean[path] for path in tree) - 1e-9


def test_likeliest_paths_against_every_path():
    ranks, depth = (0.6, 0.2, 0.1), 3
    every = {
        path: math.prod(ranks[rank] for rank in path)
        for length in range(1, depth + 1)
        for path in itertools.product(range(3), repeat=length)
    }
    for nodes in (1, 5, 17, len(every)):
        found = likeliest_paths(ranks, nodes, depth)
        assert len(found) == nodes
        assert sorted(found.values()) == pytest.approx(sorted(every.values())[-nodes:])
        assert all(found[path] == pytest.approx(every[path]) for path in found)
        assert set(TreeShape.of(list(found)).paths) == set(found)
    assert len(likeliest_paths(ranks, 1000, depth)) == len(every)


def test_bands():
    assert [band_of(t) for t in (0, 0.01, 0.79, 0.8, 2)] == ["greedy", "low", "low", "high", "high"]


def test_a_rule_or_band_that_was_not_measured_takes_the_nearest():
    def one(rule, band, share):
        return PathShares(rule, band, 10, {(0,): share})

    table = PathTable((one("coupled", "greedy", 0.1), one("multi-round", "high", 0.3)))
    assert table.of("coupled", "greedy")[0,] == 0.1
    assert table.of("coupled", "high")[0,] == 0.1
    assert table.of("multi-round", "greedy")[0,] == 0.3
    other = PathTable((one("coupled", "greedy", 0.1), one("coupled", "high", 0.3)))
    assert other.of("multi-round", "high")[0,] == 0.3
    assert other.mean("coupled")[0,] == pytest.approx((0.1 + 0.1 + 0.3) / 3)


# ------------------------------------------------------------------------------------------ costs

BATCHES, CONTEXTS = (1, 4, 16, 64), (1024, 8192)


def round_cost(batch: int, nodes: int, depth: int, kv: float) -> float:
    """Affine: weights, rows, depth, KV tokens."""
    return 5.0 + 0.01 * batch * nodes + 0.3 * depth + kv * 1e-5


def affine_table(shapes, batches=BATCHES, contexts=CONTEXTS) -> CostTable:
    return CostTable(
        [
            CostPoint(b, n, d, b * c, round_cost(b, n, d, b * c))
            for b in batches
            for c in contexts
            for n, d in shapes
        ]
    )


@pytest.mark.parametrize(("nodes", "depth"), [(1, 0), (4, 3), (32, 5)])
def test_affine_costs_are_met_everywhere(nodes, depth):
    """At, between and beyond measured loads; a context below them counts as the first."""
    table = affine_table([(1, 0), (4, 3), (32, 5)])
    for batch, context in itertools.product((1, 2, 4, 10, 40, 64, 200), (1024, 3000, 8192, 30000)):
        kv = batch * context
        expected = round_cost(batch, nodes, depth, kv)
        assert table.round_ms(batch, nodes, depth, kv) == pytest.approx(expected)
    assert table.round_ms(4, nodes, depth, 0) == table.round_ms(4, nodes, depth, 4096)


def test_a_tree_between_two_measured_ones_and_one_beyond():
    table = affine_table([(1, 0), (8, 3), (16, 3)])
    assert table.round_ms(4, 12, 3, 8192) == pytest.approx(round_cost(4, 12, 3, 8192))
    assert table.round_ms(4, 17, 3, 8192) == math.inf
    assert table.round_ms(4, 16, 4, 8192) == math.inf


def test_a_corner_that_did_not_fit_into_memory_is_filled_by_growth_with_the_batch():
    shapes = [(1, 0), (4, 3)]
    points = [p for p in affine_table(shapes).points if p.kv_tokens < 64 * 8192]
    table = CostTable(points)
    for nodes, depth in shapes:
        expected = round_cost(64, nodes, depth, 64 * 8192)
        assert table.round_ms(64, nodes, depth, 64 * 8192) == pytest.approx(expected)


@st.composite
def noisy_tables(draw) -> CostTable:
    """Plain and a few trees at some of the loads, with costs in no order at all."""
    shapes = draw(st.lists(st.sampled_from([(2, 1), (4, 3), (8, 3), (9, 5)]), unique=True))
    loads = st.sampled_from([(b, c) for b in (1, 4, 16) for c in (100, 1000)])
    points = []
    for nodes, depth in [(1, 0), *shapes]:
        for batch, context in draw(st.lists(loads, min_size=1, unique=True)):
            ms = draw(st.integers(1, 100)) / 10
            points.append(CostPoint(batch, nodes, depth, batch * context, ms))
    return CostTable(points)


@settings(max_examples=150, deadline=None)
@given(table=noisy_tables(), data=st.data())
def test_costs_rise_along_every_axis_and_never_undercut_what_was_measured(table, data):
    least = min(point.ms for point in table.points)
    place = [
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 3000)),
        data.draw(st.integers(1, 10)),
        data.draw(st.integers(0, 6)),
    ]
    for axis in range(4):
        other = list(place)
        other[axis] += data.draw(st.integers(1, 5))
        costs = [table.round_ms(b, n, d, b * c) for b, c, n, d in (place, other)]
        assert costs[1] >= costs[0] - 1e-9
        assert costs[0] >= least - 1e-9
    for point in table.points:
        ms = table.round_ms(point.batch, point.nodes, point.depth, point.kv_tokens)
        assert ms >= point.ms - 1e-9


def test_costs_without_plain_decoding_are_refused():
    with pytest.raises(AquilineError, match="plain decoding"):
        affine_table([(4, 3)])


# ----------------------------------------------------------------------------------------- choice


def h100_costs(trees, batches=(1, 4, 16, 64, 256)) -> CostTable:
    """The shape of an H100's costs: rows are free up to 64 and then rise."""

    def ms(batch, tree, kv):
        rows = batch * tree.size
        return 5.7 + max(rows - 64, 0) * 0.013 + 0.25 * tree.depth + kv * 4.4e-5

    return CostTable(
        [
            CostPoint(b, t.size, t.depth, b * c, ms(b, t, b * c))
            for b, c, t in itertools.product(batches, CONTEXTS, trees)
        ]
    )


def test_choose_against_brute_force():
    paths = default_table()
    trees = tree_pool(paths, "coupled")
    costs = h100_costs(trees)
    for batch, context, band in itertools.product((1, 4, 16, 64, 256), CONTEXTS, BANDS):
        dispatcher = Dispatcher(trees, paths, costs)
        picked = dispatcher.candidates[dispatcher.choose(batch, batch * context, band)]

        def rate(tree, load=(batch, batch * context), band=band):
            ms = costs.round_ms(load[0], tree.size, tree.depth, load[1])
            return expected_tokens(paths.of("coupled", band), tree) / ms

        # A bucket of KV tokens spans 19 %: the pick is best up to that and the hysteresis.
        assert rate(picked) >= max(map(rate, trees)) / (1 + GAIN) * 0.99
    assert trees[0] == PLAIN
    assert len(trees) == len(set(trees)) > 5


def test_small_batches_get_rich_trees_and_large_ones_little():
    paths = default_table()
    trees = tree_pool(paths, "coupled")
    sizes = []
    for batch in (1, 16, 256, 4096):
        dispatcher = Dispatcher(trees, paths, h100_costs(trees))
        sizes.append(dispatcher.candidates[dispatcher.choose(batch, batch * 1024, "high")].size)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] >= 16
    assert sizes[-1] <= 2


def test_where_every_row_is_paid_for_nothing_is_drafted():
    paths = default_table()
    trees = tree_pool(paths, "coupled")
    points = [CostPoint(b, t.size, t.depth, 100 * b, b * t.size) for b in (1, 64) for t in trees]
    dispatcher = Dispatcher(trees, paths, CostTable(points))
    assert all(trees[dispatcher.choose(b, 100 * b, "greedy")] == PLAIN for b in (1, 8, 64, 500))


def test_plain_is_always_a_candidate_and_indices_stay():
    chain = TreeShape.chain(3)
    costs = affine_table([(1, 0), (4, 3)])
    assert Dispatcher([chain], default_table(), costs).candidates == (chain, PLAIN)
    assert Dispatcher([PLAIN, chain], default_table(), costs).candidates == (PLAIN, chain)
    unmeasured = Dispatcher([TreeShape.chain(9)], default_table(), costs)
    assert unmeasured.choose(1, 100, "greedy") == 1


@pytest.mark.parametrize(("gain", "switches"), [(0.01, False), (0.03, True)])
def test_a_switch_must_promise_more_than_two_percent(gain, switches):
    """Plain and chain-1 swap places at a batch of 4 by ``gain``."""
    paths = PathTable((PathShares("coupled", "greedy", 100, {(0,): 0.5}),))
    plain, chain = 10.0, 15.0  # at equal rates
    points = [
        CostPoint(1, 1, 0, 100, plain), CostPoint(1, 2, 1, 100, chain / (1 + gain)),
        CostPoint(4, 1, 0, 400, plain * 2), CostPoint(4, 2, 1, 400, chain * 2 * (1 + gain)),
    ]  # fmt: skip
    dispatcher = Dispatcher([PLAIN, TreeShape.chain(1)], paths, CostTable(points))
    picks = [dispatcher.choose(batch, 100 * batch, "greedy") for batch in (4, 1, 4, 1)]
    assert picks == ([0, 1, 0, 1] if switches else [0, 0, 0, 0])


def test_a_choice_takes_microseconds():
    paths = default_table()
    trees = tree_pool(paths, "coupled")
    dispatcher = Dispatcher(trees, paths, h100_costs(trees))
    dispatcher.choose(7, 50_000, "low")
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        for kv in range(50_000, 51_000):
            dispatcher.choose(7, kv, "low")
        best = min(best, (time.perf_counter() - started) / 1000)
    assert best < 50e-6


def test_batch_rule():
    rule = BatchRule()
    names = [(t.size, t.depth) for t in rule.candidates]
    assert names == [(24, 5), (8, 3), (4, 3), (3, 2), (1, 0)]
    picks = [rule.choose(batch, 1000, "greedy") for batch in (1, 4, 5, 16, 17, 64, 65, 128, 129)]
    assert picks == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert {band for _, band in RANKS} == set(BANDS)
    for ranks in RANKS.values():
        assert sum(ranks) < 1
        assert sorted(ranks, reverse=True) == list(ranks)


# ------------------------------------------------------------------------------------------ files


@pytest.fixture
def table() -> DispatchTable:
    shares = {(0,): 0.7, (1,): 0.1, (0, 0): 0.5, (0, 1): 0.2, (0, 2): 0.3}  # 2 beats 1: kept as is
    paths = PathTable((PathShares("coupled", "greedy", 900, shares),))
    trees = (TreeShape.chain(2), TreeShape.of([[0], [1]]), PLAIN)
    origin = Provenance("H100", "llama", "draft", "bfloat16", {"torch": "2.11"}, "2026-01-01")
    costs = affine_table([(tree.size, tree.depth) for tree in trees])
    return DispatchTable(origin, paths, costs, trees)


def test_a_table_survives_its_file(table, tmp_path):
    table.save(tmp_path / "table.json")
    again = DispatchTable.load(tmp_path / "table.json")
    assert again.provenance == table.provenance
    assert again.paths.measured == table.paths.measured
    assert again.costs.points == table.costs.points
    assert again.trees == table.trees
    ours, theirs = table.dispatcher(), again.dispatcher()
    assert ours.choose(1, 2000, "greedy") == theirs.choose(1, 2000, "greedy")
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("at", "value", "field"),
    [
        (["format"], 2, "format must be 1, not 2"),
        (["device"], 3, "device"),
        (["versions"], None, "versions"),
        (["paths"], [], "paths"),
        (["paths", 0, "rule"], "typical", r"paths\[0\]\.rule"),
        (["paths", 0, "band"], "hot", r"paths\[0\]\.band"),
        (["paths", 0, "rounds"], -1, r"paths\[0\]\.rounds"),
        (["paths", 0, "shares"], [[[0], 1.5]], r"paths\[0\]\.shares"),
        (["paths", 0, "shares"], [[[0, 0], 0.5]], r"needs \[0\]"),
        (["paths", 0, "shares"], [[[0], 0.5], [[0], 0.5]], "listed twice"),
        (["costs", 1], 7, r"costs\[1\]"),
        (["costs", 1, "batch"], 0, r"costs\[1\]\.batch"),
        (["costs", 1, "nodes"], 2.5, r"costs\[1\]\.nodes"),
        (["costs", 1, "depth"], 50, r"costs\[1\]\.depth"),
        (["costs", 1, "ms"], 0, r"costs\[1\]\.ms"),
        (["costs", 1, "ms"], math.nan, r"costs\[1\]\.ms"),
        (["costs"], [{"batch": 1, "nodes": 2, "depth": 1, "kv_tokens": 9, "ms": 1.0}], "plain"),
        (["trees"], 0, "trees"),
        (["trees", 0], [[0], [0, 0], [1]], r"trees\[0\].*among the costs"),
        (["trees", 0], [[1]], r"trees\[0\].*needs \[0\]"),
        (["trees", 0], [["a"]], r"trees\[0\]"),
    ],
)
def test_a_bad_field_is_named_with_file_and_remedy(table, tmp_path, at, value, field):
    file = tmp_path / "table.json"
    table.save(file)
    data = json.loads(file.read_text())
    place = data
    for key in at[:-1]:
        place = place[key]
    place[at[-1]] = value
    file.write_text(json.dumps(data))
    with pytest.raises(AquilineError, match=field) as caught:
        DispatchTable.load(file)
    message = str(caught.value)
    assert "table.json" in message
    assert "run aquiline tune again" in message
    assert "\n" not in message


@pytest.mark.parametrize("text", [None, "{", "[]", "\x80"])
def test_an_unreadable_file_is_named(tmp_path: Path, text):
    file = tmp_path / "table.json"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(AquilineError, match=r"table\.json.*aquiline tune"):
        DispatchTable.load(file)


def test_a_file_that_cannot_be_written(table, tmp_path):
    with pytest.raises(AquilineError, match="writable"):
        table.save(tmp_path / "no" / "table.json")


def test_a_tree_hardly_better_than_the_chain_of_three_is_not_chosen():
    """Whatever was picked before: a table's noise must not lose against what others run."""
    paths = default_table()
    chain, other = TreeShape.chain(3), best_tree(paths.mean("coupled"), 7, 4)
    tokens = {tree: expected_tokens(paths.of("coupled", "greedy"), tree) for tree in (chain, other)}
    for gain, expected in ((1.015, chain), (1.03, other)):
        ms = {PLAIN: 1.0, chain: 1.0, other: tokens[other] / tokens[chain] / gain}
        costs = CostTable(
            [CostPoint(b, t.size, t.depth, 100 * b, ms[t]) for b in (1, 64) for t in ms]
        )
        dispatcher = Dispatcher((other, PLAIN, chain), paths, costs)
        assert dispatcher.candidates[dispatcher.choose(1, 100, "greedy")] == expected
