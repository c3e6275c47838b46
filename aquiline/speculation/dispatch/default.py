"""What serves without a table: path probabilities from stored figures, and a rule by batch size.

`aquiline tune` replaces both by measurements of the models and the machine at hand.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence

from aquiline.core.params import TreePath, VerificationRule
from aquiline.speculation.dispatch.dispatcher import PLAIN
from aquiline.speculation.dispatch.paths import Band, PathShares, PathTable, best_tree
from aquiline.speculation.tree import TreeShape

DEFAULT_NODES, DEFAULT_DEPTH = 64, 8

# Shares of rounds whose target token is the draft's child of rank 0, 1, 2, 3, given its parent was
# accepted. Rank 0 at T=0: the shipped draft of SmolLM2 on MT-Bench, chain of 3, reaches depths 1,
# 2, 3 in 0.711, 0.503, 0.359 of the rounds (benchmarks/results/acceptance.json): 0.71 at each
# depth. Sums of the first 1, 2 and 4 ranks at T=0.6 and T=1: the same draft's first position.
# Ranks 1 to 3 at T=0: 523 rounds of a 64-node tree on 16 MT-Bench prompts, 96 tokens each (0.12,
# 0.03, 0.02 at the first position, 0.10, 0.07, 0.05 at the second). How a sum divides among its
# ranks, and that all depths and parents are alike, are guesses.
RANKS: dict[tuple[VerificationRule, Band], tuple[float, ...]] = {
    ("coupled", "greedy"): (0.71, 0.11, 0.05, 0.04),
    ("coupled", "low"): (0.49, 0.14, 0.07, 0.05),
    ("coupled", "high"): (0.47, 0.15, 0.07, 0.05),
    ("multi-round", "greedy"): (0.71, 0.11, 0.05, 0.04),
    ("multi-round", "low"): (0.51, 0.13, 0.06, 0.04),
    ("multi-round", "high"): (0.51, 0.11, 0.06, 0.04),
    ("target-only", "greedy"): (0.71, 0.11, 0.05, 0.04),
    ("target-only", "low"): (0.45, 0.15, 0.06, 0.05),
    ("target-only", "high"): (0.38, 0.12, 0.06, 0.05),
}


def likeliest_paths(ranks: Sequence[float], nodes: int, depth: int) -> dict[TreePath, float]:
    """The ``nodes`` likeliest paths where a child of rank r has ``ranks[r]`` times its parent's.

    Args:
        ranks: descending; their number bounds the fan-out.
    """
    found: dict[TreePath, float] = {}
    # (-probability, depth, path): ties go to the shorter path.
    heap: list[tuple[float, int, TreePath]] = [(-ranks[0], 1, (0,))]
    while heap and len(found) < nodes:
        negative, length, path = heapq.heappop(heap)
        found[path] = -negative
        rank = path[-1] + 1
        if rank < len(ranks):
            sibling = negative / ranks[rank - 1] * ranks[rank]
            heapq.heappush(heap, (sibling, length, (*path[:-1], rank)))
        if length < depth:
            heapq.heappush(heap, (negative * ranks[0], length + 1, (*path, 0)))
    return found


def default_tree(rule: VerificationRule, band: Band, nodes: int, depth: int) -> TreeShape:
    """The tree of the likeliest paths by the default figures; the coupled rule's for the others."""
    ranks = RANKS.get((rule, band), RANKS["coupled", band])
    return TreeShape.of(list(likeliest_paths(ranks, nodes, depth)))


def default_table() -> PathTable:
    """The default figures as a table, for every rule and band; measured in no round."""
    return PathTable(
        tuple(
            PathShares(rule, band, 0, likeliest_paths(ranks, DEFAULT_NODES, DEFAULT_DEPTH))
            for (rule, band), ranks in RANKS.items()
        )
    )


class BatchRule:
    """Tree by batch size alone, a TreeChooser for machines where nothing was measured.

    Up to 4 requests the 23 likeliest draft nodes within depth 5, up to 16 the 7 likeliest within
    depth 3 (a chain of 3 with siblings), up to 64 a chain of 3, up to 128 a chain of 2, above it
    plain decoding. The figures behind: verifying up to 64 rows costs what one does on an H100 (8B,
    bf16), 128 rows 8 % more, 256 a quarter more; at an equal budget of nodes a chain beats a tree.
    """

    LIMITS = (4, 16, 64, 128)

    def __init__(self, rule: VerificationRule = "coupled") -> None:
        paths = default_table().of(rule, "greedy")
        rich, small = best_tree(paths, 23, 5), best_tree(paths, 7, 3)
        self._candidates = (rich, small, TreeShape.chain(3), TreeShape.chain(2), PLAIN)

    @property
    def candidates(self) -> tuple[TreeShape, ...]:
        return self._candidates

    def choose(self, batch: int, kv_tokens: int, band: Band) -> int:
        """See TreeChooser; KV tokens and band do not matter here."""
        return bisect_left(self.LIMITS, batch)
