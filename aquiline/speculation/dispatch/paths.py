"""Path probabilities, and the best tree of a size: what a tree is worth before its cost.

A node's path probability is the share of rounds in which it is accepted. The tokens of a round are
the accepted nodes and the bonus token, so by linearity of expectation

    expected tokens = 1 + sum of the path probabilities of the tree's nodes

and the best tree of m nodes within depth d is the m likeliest paths. Sort once: the trees of a
depth are nested prefixes. Under both rules a node's acceptance does not depend on which later
siblings or descendants the tree holds, so shares measured on one big tree price every subtree. (A
round starts where the last one failed, and a richer tree fails elsewhere: an effect of second
order that is left out.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from aquiline.core.params import TreePath, VerificationRule
from aquiline.speculation.tree import TreeShape

Band = Literal["greedy", "low", "high"]
BANDS: tuple[Band, ...] = get_args(Band)
LOW_BELOW = 0.8  # temperatures under this are "low"


def band_of(temperature: float) -> Band:
    """ "greedy" at T=0, "low" for 0 < T < 0.8, "high" from 0.8."""
    if temperature == 0:
        return "greedy"
    return "low" if temperature < LOW_BELOW else "high"


def best_tree(probabilities: Mapping[TreePath, float], nodes: int, depth: int) -> TreeShape:
    """The ``nodes`` likeliest paths no longer than ``depth`` (the root is not counted in either).

    Args:
        probabilities: of a closed set of paths, clean (see ``isotonic``): then every prefix of the
            order is a tree. Where fewer paths are known than asked for, all of them.
    """
    within = [path for path in probabilities if len(path) <= depth]
    likeliest = sorted(within, key=lambda path: (-probabilities[path], len(path), path))[:nodes]
    return TreeShape.of(likeliest) if likeliest else TreeShape.chain(0)


def expected_tokens(probabilities: Mapping[TreePath, float], tree: TreeShape) -> float:
    """Tokens a round of ``tree``, the bonus token included; a path never measured adds nothing."""
    return 1 + sum(probabilities.get(path, 0.0) for path in tree.paths)


def isotonic(shares: Mapping[TreePath, float]) -> dict[TreePath, float]:
    """The nearest table, in squares, in which no node beats its parent or its elder sibling.

    Counts of rare nodes are noise, and a younger sibling that came out ahead would tear a hole into
    the sorted order. The order "parent or elder sibling first" is a rooted tree; on one, pooling
    the largest violator with its predecessor until none is left is exact (Thompson 1962).

    Args:
        shares: of a closed set of paths, as ``TreeShape.paths`` is.
    """
    block = {path: path for path in shares}  # a path -> the topmost path of its pool
    members = {path: [path] for path in shares}
    mean = dict(shares)

    def ahead_of(top: TreePath) -> TreePath | None:
        before = top[:-1] if top[-1] == 0 else (*top[:-1], top[-1] - 1)
        return block[before] if before else None

    def violates(top: TreePath) -> bool:
        before = ahead_of(top)
        return before is not None and mean[top] > mean[before]

    while violators := [top for top in members if violates(top)]:
        top = max(violators, key=lambda path: mean[path])
        into = ahead_of(top)
        assert into is not None
        ours, theirs = members.pop(top), members[into]
        total = mean.pop(top) * len(ours) + mean[into] * len(theirs)
        theirs += ours
        mean[into] = total / len(theirs)
        block.update(dict.fromkeys(ours, into))
    return {path: mean[block[path]] for path in shares}


@dataclass(frozen=True)
class PathShares:
    """What one measurement saw.

    Attributes:
        rounds: how many it ran.
        shares: path of child ranks -> share of those rounds that accepted the node; as counted.
    """

    rule: VerificationRule
    band: Band
    rounds: int
    shares: Mapping[TreePath, float]


class PathTable:
    """Path probabilities per rule and temperature band, cleaned by ``isotonic``."""

    def __init__(self, measured: tuple[PathShares, ...]) -> None:
        assert measured, "at least one measurement"
        self.measured = measured
        self._clean = {(one.rule, one.band): isotonic(one.shares) for one in measured}

    def of(self, rule: VerificationRule, band: Band) -> Mapping[TreePath, float]:
        """The table of a rule and band; where it was not measured, the nearest one.

        The same rule comes first, then the nearer band.
        """

        def distance(key: tuple[VerificationRule, Band]) -> tuple[bool, int]:
            return key[0] != rule, abs(BANDS.index(key[1]) - BANDS.index(band))

        return self._clean[min(self._clean, key=distance)]

    def mean(self, rule: VerificationRule) -> dict[TreePath, float]:
        """Over the bands, with equal weight: what a pool that serves every band is chosen by.

        A path that some band lacks is left out, so the mean is clean too.
        """
        tables = [self.of(rule, band) for band in BANDS]
        common = [path for path in tables[0] if all(path in table for table in tables)]
        return {path: sum(table[path] for table in tables) / len(tables) for path in common}
