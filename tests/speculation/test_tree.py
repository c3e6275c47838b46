"""TreeShape refuses what is no tree, and its tables agree with walking the paths by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquiline.core.errors import AquilineError
from aquiline.speculation.drafting import grow
from aquiline.speculation.tree import POOL, TreeShape

CPU = torch.device("cpu")


@st.composite
def trees(draw) -> TreeShape:
    """A random tree, grown node by node, from paths in random order; at times a root alone."""
    paths: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(0, 14))):
        parent = draw(st.sampled_from([(), *paths]))
        rank = sum(path[:-1] == parent and len(path) == len(parent) + 1 for path in paths)
        if len(parent) < 6:
            paths.append((*parent, rank))
    shape = TreeShape.of(draw(st.permutations(paths))) if paths else TreeShape.chain(0)
    assert set(shape.paths) == set(paths)
    return shape


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[0], [0]], "listed twice"),
        ([], "0 nodes"),
        ([[]], "root"),
        ([[0], [-1]], "root"),
        ([[0, 0]], r"needs \[0\]"),
        ([[1]], r"needs \[0\]"),
        ([[0], [0, 1]], r"needs \[0, 0\]"),
        ([[0], [2]], r"needs \[1\]"),
        ([[0], [1], [0, 0], [1, 0, 0]], r"needs \[1, 0\]"),
    ],
)
def test_what_is_no_tree_is_refused(paths, message):
    with pytest.raises(AquilineError, match=message):
        TreeShape.of(paths)


@pytest.mark.parametrize("name", ["eagle-26", "chain-", "chain-x", "chain--1", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(AquilineError, match="known are"):
        TreeShape.named(name)


def test_the_pool():
    assert TreeShape.named("chain-4") == TreeShape.chain(4)
    for name, paths in POOL.items():
        shape = TreeShape.named(name)
        assert set(shape.paths) == set(paths)
    eagle = TreeShape.named("eagle-25")
    assert (eagle.size, eagle.depth, len(eagle.children[0])) == (26, 5, 4)


@settings(max_examples=150, deadline=None)
@given(shape=trees())
def test_tables_against_brute_force(shape):
    nodes = [(), *shape.paths]
    assert [len(path) for path in nodes] == sorted(len(path) for path in nodes), "level by level"
    tables = shape.tables(CPU)
    assert shape.size == len(nodes)
    assert shape.depth == max(map(len, nodes))
    for i, path in enumerate(nodes):
        assert nodes[shape.parents[i]] == path[:-1]
        assert int(tables.parents[i]) == shape.parents[i]
        assert int(tables.depths[i]) == shape.depths[i] == len(path)
        children = [j for j, other in enumerate(nodes) if other and other[:-1] == path]
        assert list(shape.children[i]) == sorted(children, key=lambda j: nodes[j][-1])
        for j, other in enumerate(nodes):
            assert bool(tables.ancestors[i, j]) == (path[: len(other)] == other)
        route = [nodes[int(node)] for node in tables.routes[i]]
        assert route == [path[:depth] for depth in range(shape.depth + 1)]
    assert len(tables.levels) == len(tables.expanded_nodes) == shape.depth
    for depth, level in enumerate(tables.levels, start=1):
        above = tables.expanded_nodes[depth - 1].tolist()
        assert above == [
            i for i, p in enumerate(nodes) if len(p) == depth - 1 and shape.children[i]
        ]
        assert level.nodes.tolist() == [i for i, p in enumerate(nodes) if len(p) == depth]
        here = level.nodes.tolist()
        for column, node in enumerate(here):
            assert above[int(level.parents[column])] == shape.parents[node]
            assert int(level.ranks[column]) == nodes[node][-1]
        assert level.fan_out == max(nodes[node][-1] for node in here) + 1
        expanded = [here[i] for i in level.expanded.tolist()]
        assert expanded == [node for node in here if shape.children[node]]


@settings(max_examples=80, deadline=None)
@given(shape=trees(), seed=st.integers(0, 2**32))
def test_grow_gives_every_node_its_rank_of_its_parents_children(shape, seed):
    """The score of a child is a function of its parent's token, so every node can be checked."""
    vocab, batch = 31, 3
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(100 + vocab, vocab, generator=generator)
    roots = torch.randint(vocab, (batch,), generator=generator)
    depths = []

    def propose(above, count):
        depths.append(1 if above is None else above.depth + 1)
        scores = table[roots[:, None] if above is None else above.expanded_tokens]
        return scores.topk(count).indices

    tokens = grow(shape.tables(CPU), roots, propose, lambda ids: ids + 100)  # target ids from 100
    assert depths == list(range(1, shape.depth + 1))
    for row in range(batch):
        said = {(): int(roots[row])}
        for path in shape.paths:
            ranked = table[said[path[:-1]]].argsort(descending=True)
            said[path] = int(ranked[path[-1]]) + 100
        assert tokens[row].tolist() == [said[path] for path in ((), *shape.paths)]


@settings(max_examples=60, deadline=None)
@given(shape=trees(), nodes=st.integers(1, 6))
def test_a_retrieved_chain_leaves_drafting_as_it_is(shape, nodes):
    """Its nodes come last, one under the other and the first under the root."""
    both, drafted = shape.retrieving(nodes), shape.tables(CPU)
    tables, first = both.tables(CPU), shape.size
    assert (both.size, both.depth) == (first + nodes, max(shape.depth, nodes))
    assert (both.drafted_size, both.drafted_depth) == (shape.size, shape.depth)
    assert both.parents == (*shape.parents, *[0, *range(first, first + nodes - 1)])
    assert both.children[0] == (*shape.children[0], first)
    assert both.is_chain == (shape.size == 1)
    assert both.drafts_chain == shape.is_chain
    for ours, theirs in zip(tables.levels, drafted.levels, strict=True):
        for name, tensor in vars(ours).items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(tensor, getattr(theirs, name))
        assert (ours.fan_out, ours.whole) == (theirs.fan_out, theirs.whole)
    assert torch.equal(tables.ancestors[:first, :first], drafted.ancestors)
    chain = torch.ones(nodes, nodes, dtype=torch.bool).tril()
    assert torch.equal(tables.ancestors[first:, first:], chain)
    assert tables.ancestors[first:, :first].sum(dim=1).tolist() == [1] * nodes  # the root
    assert tables.depths[first:].tolist() == list(range(1, nodes + 1))
    assert tables.routes[-1].tolist()[: nodes + 1] == [0, *range(first, first + nodes)]


@settings(max_examples=80, deadline=None)
@given(shape=trees(), data=st.data())
def test_what_is_foreseen_goes_down_the_first_children(shape, data):
    """Siblings differ all the same, and other nodes are the draft's."""
    foreseen = [data.draw(st.integers(0, 5)) for _ in range(shape.depth)]
    known = data.draw(st.integers(0, shape.depth))

    def propose(above, count):
        return torch.arange(count).expand(2, 1 if above is None else above.expanded_tokens.shape[1],
                                          count)  # fmt: skip

    row = torch.tensor([foreseen[:known] + [-1] * (shape.depth - known), [-1] * shape.depth])
    tokens, free = grow(
        shape.tables(CPU), torch.tensor([7, 7]), propose, lambda ids: ids, row
    ).tolist()
    assert free == [7, *(path[-1] for path in shape.paths)]
    for node, path in enumerate(shape.paths, start=1):
        children = [tokens[child] for child in shape.children[node - 1]]
        assert len(set(children)) == len(children)
        if not any(path) and len(path) <= known:
            assert tokens[node] == foreseen[len(path) - 1]
        elif any(path[:-1]):
            assert tokens[node] == free[node]
