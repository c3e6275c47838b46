"""TreeShape: the static shape of a draft tree, and the index tables that make a round loop-free.

A tree is given by paths of child ranks: (0,) is the root's likeliest child, (0, 1) that child's
second one. Nodes are numbered level by level, the root (the last emitted token) is node 0:

    chain(3): 0 - 1 - 2 - 3        [[0], [1], [0, 0]]:  0 -+- 1 --- 3
                                                           +- 2
A tree may hold one chain more, of nodes that are not drafted but found in the request's own text.
It hangs from the root, behind the root's drafted children, and its nodes are numbered last, so the
drafted part is the tree that it would be alone:

    chain(2).retrieving(3):  0 -+- 1 --- 2
                                +- 3 --- 4 --- 5
Everything about the shape is known before a round starts, so masks and indices are built once and
a CUDA graph can replay. "No speculation" is the tree without draft nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from aquiline.core.errors import AquilineError
from aquiline.core.params import MAX_CHAIN, TreePath

MAX_NODES = 1024  # draft nodes of a tree; far beyond what pays

# The static tree of EAGLE (2401.15077): root fan-out 4, depth 5, 25 draft nodes.
EAGLE_25 = (
    "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
)
# Eight rows cost a CPU little more than four: a chain of 3 with its likeliest siblings.
TREE_8 = "0 1 2 00 01 10 000"
POOL: dict[str, tuple[TreePath, ...]] = {
    name: tuple(tuple(int(rank) for rank in path) for path in paths.split())
    for name, paths in (("eagle-25", EAGLE_25), ("tree-8", TREE_8))
}


@dataclass(frozen=True)
class Level:
    """One drafting step: the nodes of a depth and where they come from.

    Attributes:
        nodes: [W] node ids of this depth, in order.
        parents: [W] index of each node's parent among ``expanded`` of the level above.
        ranks: [W] which of the parent's children each node is.
        fan_out: children wanted from each parent at most (max rank + 1).
        expanded: [E] index within this level of the nodes that have children themselves.
        sources: [E] index of each one's parent among ``expanded`` of the level above.
        whole: every parent has all ``fan_out`` children, so drafting order is node order.
        all_expanded: every node has children.
        only_children: the expanded nodes and their parents are one to one, in order.
    """

    nodes: Tensor
    parents: Tensor
    ranks: Tensor
    fan_out: int
    expanded: Tensor
    sources: Tensor
    whole: bool
    all_expanded: bool
    only_children: bool


@dataclass(frozen=True)
class TreeShape:
    """A static tree.

    Attributes:
        paths: of the drafted nodes (the root's empty path left out), sorted level by level.
        retrieved: length of the chain of retrieved nodes under the root; 0 for none.
    """

    paths: tuple[TreePath, ...]
    retrieved: int = 0

    @classmethod
    def of(cls, paths: Sequence[Sequence[int]]) -> TreeShape:
        """From paths in any order. Parents must be listed, and ranks of siblings contiguous."""
        if not 1 <= len(paths) <= MAX_NODES:
            raise AquilineError(f"tree: {len(paths)} nodes; give 1 to {MAX_NODES}")
        known = {tuple(path) for path in paths}
        if len(known) != len(paths):
            raise AquilineError("tree: a path is listed twice; list each node once")
        for path in known:
            if not path or any(rank < 0 for rank in path):
                raise AquilineError(
                    f"tree: path {list(path)} is not a node; give child ranks from 0, the root "
                    "itself left out"
                )
            for needed in ([path[:-1]] if len(path) > 1 else []) + (
                [(*path[:-1], path[-1] - 1)] if path[-1] else []
            ):
                if needed not in known:
                    raise AquilineError(
                        f"tree: path {list(path)} needs {list(needed)}; add it or remove the path"
                    )
        return cls(tuple(sorted(known, key=lambda path: (len(path), path))))

    @classmethod
    def chain(cls, length: int) -> TreeShape:
        """One child per node; length 0 is no speculation."""
        return cls(tuple((0,) * depth for depth in range(1, length + 1)))

    @classmethod
    def named(cls, name: str) -> TreeShape:
        """A tree of the pool, or ``chain-N``."""
        kind, _, length = name.partition("-")
        if kind == "chain" and length in map(str, range(1, MAX_CHAIN + 1)):
            return cls.chain(int(length))
        if name not in POOL:
            known = f"'chain-1' to 'chain-{MAX_CHAIN}', {sorted(POOL)}"
            raise AquilineError(f"tree={name!r}: known are {known}")
        return cls.of(POOL[name])

    def retrieving(self, nodes: int) -> TreeShape:
        """The same drafted nodes beside a retrieved chain of this length."""
        return replace(self, retrieved=nodes)

    @property
    def size(self) -> int:
        """Nodes, the root included."""
        return self.drafted_size + self.retrieved

    @property
    def drafted_size(self) -> int:
        """Nodes without the retrieved ones, the root included."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        """Of the deepest node; 0 without speculation."""
        return max(self.drafted_depth, self.retrieved)

    @property
    def drafted_depth(self) -> int:
        """Of the deepest drafted node: the steps that drafting takes."""
        return len(self.paths[-1]) if self.paths else 0

    @property
    def is_chain(self) -> bool:
        """Whether no node has two children."""
        return self.depth == self.size - 1

    @property
    def drafts_chain(self) -> bool:
        """Whether no node has two drafted children."""
        return self.drafted_depth == self.drafted_size - 1

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Parent node of every node; the root is its own."""
        index = {path: node for node, path in enumerate(((), *self.paths))}
        chain = range(self.drafted_size, self.size)
        retrieved = (node - 1 if node > chain.start else 0 for node in chain)
        return (0, *(index[path[:-1]] for path in self.paths), *retrieved)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of every node."""
        return (0, *(len(path) for path in self.paths), *range(1, self.retrieved + 1))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of every node, by rank; a retrieved one comes last."""
        found: list[list[int]] = [[] for _ in range(self.size)]
        for node, parent in list(enumerate(self.parents))[1:]:
            found[parent].append(node)
        return tuple(tuple(nodes) for nodes in found)

    def tables(self, device: torch.device) -> TreeTables:
        """The index tensors on a device; build them once."""
        return TreeTables.of(self, device)


@dataclass(frozen=True)
class TreeTables:
    """Static tensors of a tree of N nodes and depth D.

    Attributes:
        parents, depths, nodes: [N] int64; ``nodes`` counts from 0.
        steps: [D + 1] how far past the root each depth's next token is, from 1.
        ancestors: [N, N] bool; row i is True at i and at every ancestor of i (the tree mask).
        routes: [N, D + 1] the node at each depth on the way to node i; past its depth, i itself.
        levels: drafting steps, one a depth of the drafted part.
        children: [N, K] nodes by rank, padded with -1; K is 1 at least.
        expanded_nodes: for each drafting step, the nodes that have drafted children.
        expanded_depths: for the same, the depth of each, over and over.
        expanded_index: [N] a node's place among all of these; 0 for the others.
        last_expanded: the last of each of ``expanded_nodes``.
    """

    shape: TreeShape
    parents: Tensor
    depths: Tensor
    nodes: Tensor
    steps: Tensor
    ancestors: Tensor
    routes: Tensor
    levels: tuple[Level, ...]
    children: Tensor
    expanded_nodes: tuple[Tensor, ...]
    expanded_depths: tuple[Tensor, ...]
    expanded_index: Tensor
    last_expanded: tuple[int, ...]

    @classmethod
    def of(cls, shape: TreeShape, device: torch.device) -> TreeTables:
        routes = [[0] * (shape.depth + 1)]
        for node in range(1, shape.size):
            route = list(routes[shape.parents[node]])
            route[shape.depths[node] :] = [node] * (shape.depth + 1 - shape.depths[node])
            routes.append(route)
        mask = torch.zeros(shape.size, shape.size, dtype=torch.bool)
        for node, route in enumerate(routes):
            mask[node, route] = True

        def tensor(values: Sequence[object]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        drafted = shape.retrieving(0)
        depths = range(1, drafted.depth + 1)
        levels = tuple(_level(drafted, depth, device) for depth in depths)
        expanded = [
            [n for n in range(drafted.size) if drafted.depths[n] == d and drafted.children[n]]
            for d in range(drafted.depth)
        ]
        all_expanded = [node for nodes in expanded for node in nodes]
        index = {node: place for place, node in enumerate(all_expanded)}
        width = max(1, *map(len, shape.children))
        children = [(*nodes, *[-1] * (width - len(nodes))) for nodes in shape.children]
        return cls(
            shape, tensor(shape.parents), tensor(shape.depths), tensor(range(shape.size)),
            tensor(range(1, shape.depth + 2)), mask.to(device), tensor(routes),
            levels, tensor(children), tuple(map(tensor, expanded)),
            tuple(tensor([depth] * len(nodes)) for depth, nodes in enumerate(expanded)),
            tensor([index.get(node, 0) for node in range(shape.size)]),
            tuple(nodes[-1] for nodes in expanded),
        )  # fmt: skip


def _level(shape: TreeShape, depth: int, device: torch.device) -> Level:
    nodes = [node for node in range(shape.size) if shape.depths[node] == depth]
    above = [node for node in range(shape.size) if shape.depths[node] == depth - 1]
    expanded_above = [node for node in above if shape.children[node]]
    ranks = [shape.children[shape.parents[node]].index(node) for node in nodes]
    parents = [expanded_above.index(shape.parents[node]) for node in nodes]
    expanded = [i for i, node in enumerate(nodes) if shape.children[node]]
    sources = [parents[i] for i in expanded]

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Level(
        nodes=tensor(nodes),
        parents=tensor(parents),
        ranks=tensor(ranks),
        fan_out=max(ranks) + 1,
        expanded=tensor(expanded),
        sources=tensor(sources),
        whole=len(nodes) == len(expanded_above) * (max(ranks) + 1),
        all_expanded=len(expanded) == len(nodes),
        only_children=sources == list(range(len(expanded_above))),
    )
