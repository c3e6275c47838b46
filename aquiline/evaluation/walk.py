"""From ranks (paired.py) to rounds: what a decoder with a given tree would have accepted.

A root accepts the longest path whose child ranks the tree has; the next round starts behind it and
the bonus token. So one table of ranks prices every static tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.core.errors import AquilineError
from aquiline.speculation.tree import TreeShape


@dataclass(frozen=True)
class PairedAcceptance:
    """Rounds over fixed texts, tokens past a text's end counted as the decoder counts them.

    Attributes:
        accepted_by_depth: rounds that accepted a draft token at depth 1, 2, ...
    """

    rounds: int
    accepted_by_depth: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Emitted by the rounds, bonus tokens included."""
        return self.rounds + sum(self.accepted_by_depth)

    @property
    def tokens_per_call(self) -> float:
        """TPC."""
        return self.tokens / max(self.rounds, 1)


def accepted_depths(ranks: Tensor, shape: TreeShape) -> Tensor:
    """How deep the tree ``shape`` is accepted below every root: ranks [roots, depth] -> [roots].

    Raises:
        AquilineError: the tree is deeper than the ranks. Ranks that were not looked for count as
            rejected: rank at least as many children as the tree has.
    """
    if shape.depth > ranks.shape[1]:
        raise AquilineError(
            f"tree of depth {shape.depth}: ranks reach depth {ranks.shape[1]}; rank deeper"
        )
    width = max(map(len, shape.children))
    table = torch.tensor([(*nodes, *[-1] * (width + 1 - len(nodes))) for nodes in shape.children])
    node = torch.zeros(len(ranks), dtype=torch.int64)
    for level in range(shape.depth):
        child = table[node, ranks[:, level].clamp(max=width)]
        going = child.ge(0) & torch.tensor(shape.depths)[node].eq(level)
        node = torch.where(going, child, node)
    return torch.tensor(shape.depths)[node]


def rounds_of(depths: Sequence[int]) -> list[int]:
    """Roots that a decoder starts a round from, given what each would accept."""
    roots, root = [], 0
    while root < len(depths):
        roots.append(root)
        root += depths[root] + 1
    return roots


def paired_acceptance(
    ranks: Sequence[Tensor], shape: TreeShape, counted: Sequence[Tensor] | None = None
) -> PairedAcceptance:
    """Acceptance of ``shape`` over all texts; ``counted``, for each text bool [tokens], says which
    roots' rounds count (all without it)."""
    rounds_to = [0] * (shape.depth + 1)  # rounds by accepted depth
    for index, one in enumerate(ranks):
        depths = accepted_depths(one, shape).tolist()
        wanted = None if counted is None else counted[index].tolist()
        for root in rounds_of(depths):
            if wanted is None or wanted[root]:
                rounds_to[depths[root]] += 1
    by_depth = tuple(sum(rounds_to[depth:]) for depth in range(1, shape.depth + 1))
    return PairedAcceptance(sum(rounds_to), by_depth)
