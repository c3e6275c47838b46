"""Dispatcher: the tree of the next round, chosen by expected tokens per millisecond.

    rate(tree) = (1 + sum of its path probabilities) / cost(batch, nodes, depth, KV tokens)

Weights are read once however many nodes are verified, so a small batch takes a rich tree and a
large one a short chain or none. The choice looks at load alone, never at proposed tokens, so both
verification rules stay exact.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from aquiline.core.params import VerificationRule
from aquiline.speculation.dispatch.costs import CostTable
from aquiline.speculation.dispatch.paths import BANDS, Band, PathTable, best_tree, expected_tokens
from aquiline.speculation.tree import TreeShape

PLAIN = TreeShape.chain(0)
FAMILIAR = (PLAIN, TreeShape.chain(3))  # what others run: better by GAIN or not at all
BATCH_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
KV_STEPS = 4  # KV buckets per doubling
GAIN = 0.02  # a switch must promise more than this; a table is no more exact
# (draft nodes, depth) of a tuned pool: chains for full batches, rich trees for few requests.
POOL_SIZES = ((1, 1), (2, 2), (3, 3), (5, 5), (7, 4), (15, 5), (23, 5), (31, 5), (63, 7))


class TreeChooser(Protocol):
    """Picks one of its candidates for every round."""

    @property
    def candidates(self) -> tuple[TreeShape, ...]:
        """Plain decoding is among them, for rounds of requests that decline speculation."""
        ...

    def choose(self, batch: int, kv_tokens: int, band: Band) -> int:
        """Index of the candidate to run.

        Args:
            batch: requests of the round.
            kv_tokens: cached tokens of all of them together.
            band: temperature band of the batch.
        """
        ...


@dataclass(frozen=True)
class OneTree:
    """The chooser without a choice."""

    tree: TreeShape

    @property
    def candidates(self) -> tuple[TreeShape, ...]:
        return tuple(dict.fromkeys((self.tree, PLAIN)))

    def choose(self, batch: int, kv_tokens: int, band: Band) -> int:
        return 0


@dataclass(frozen=True)
class Retrieving:
    """Another chooser's trees, each that drafts with ``nodes`` retrieved ones beside; they are
    priced without them."""

    chooser: TreeChooser
    nodes: int

    @property
    def candidates(self) -> tuple[TreeShape, ...]:
        trees = self.chooser.candidates
        return tuple(tree.retrieving(self.nodes) if tree.paths else tree for tree in trees)

    def choose(self, batch: int, kv_tokens: int, band: Band) -> int:
        return self.chooser.choose(batch, kv_tokens, band)


def tree_pool(paths: PathTable, rule: VerificationRule) -> tuple[TreeShape, ...]:
    """Plain decoding, the chain of 3, and the best trees of ``POOL_SIZES``, each once.

    The chain of 3 is what others run: with it among the candidates the choice is never behind it.
    """
    mean = paths.mean(rule)
    trees = (best_tree(mean, nodes, depth) for nodes, depth in POOL_SIZES)
    return tuple(dict.fromkeys((PLAIN, TreeShape.chain(3), *trees)))


class Dispatcher:
    """The best of some candidates by measured paths and costs.

    Args:
        candidates: trees to choose from; plain decoding is put at the end if it is missing.
        batch_buckets: batch sizes that rounds are padded to, ascending; past the last one the next
            power of two.
    """

    def __init__(
        self,
        candidates: Sequence[TreeShape],
        paths: PathTable,
        costs: CostTable,
        rule: VerificationRule = "coupled",
        batch_buckets: Sequence[int] = BATCH_BUCKETS,
    ) -> None:
        plain = () if PLAIN in candidates else (PLAIN,)
        self._candidates = (*candidates, *plain)
        self._costs, self._buckets = costs, tuple(batch_buckets)
        self._tokens = {
            band: [expected_tokens(paths.of(rule, band), tree) for tree in self._candidates]
            for band in BANDS
        }
        self._current = self._candidates.index(PLAIN)
        self._familiar = [self._candidates.index(t) for t in FAMILIAR if t in self._candidates]
        self._rates: dict[tuple[int, int, Band], tuple[int, list[float]]] = {}

    @property
    def candidates(self) -> tuple[TreeShape, ...]:
        return self._candidates

    def choose(self, batch: int, kv_tokens: int, band: Band) -> int:
        """See TreeChooser. The last pick stays unless the best one is faster by more than 2 %; the
        same goes for plain decoding and the chain of 3, in this order.

        Rates are computed once per (batch bucket, KV bucket, band), so a call is one look-up. A
        bucket spans a factor of 2^(1/4) in KV tokens and is priced at its middle.
        """
        key = self._bucket(batch), int(KV_STEPS * math.log2(max(kv_tokens, 1))), band
        found = self._rates.get(key)
        if found is None:
            middle = 2 ** ((key[1] + 0.5) / KV_STEPS)
            rates = [self.rate(i, key[0], middle, band) for i in range(len(self._candidates))]
            found = self._rates[key] = max(range(len(rates)), key=rates.__getitem__), rates
        best, rates = found
        if rates[best] > rates[self._current] * (1 + GAIN):
            near = (i for i in self._familiar if rates[best] <= rates[i] * (1 + GAIN))
            self._current = next(near, best)
        return self._current

    def rate(self, index: int, batch: int, kv_tokens: float, band: Band) -> float:
        """Expected tokens of one request per millisecond under a candidate."""
        tree = self._candidates[index]
        cost = self._costs.round_ms(batch, tree.size, tree.depth, kv_tokens)
        return self._tokens[band][index] / cost

    def _bucket(self, batch: int) -> int:
        if batch > self._buckets[-1]:
            return 1 << (batch - 1).bit_length()
        return self._buckets[bisect_left(self._buckets, batch)]
