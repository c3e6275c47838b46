"""GuidedBatch: the masks of a whole batch; requests with and without grammars side by side.

A batch in which no row has a grammar has no GuidedBatch. A row whose text has ended, but is in
flight still, gets end tokens only. A node that the grammar excludes has an empty mask: whatever is
drawn there is never followed, since its parent's mask forbids its token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aquiline.guided.grammar import mask_words
from aquiline.guided.matcher import Matcher
from aquiline.speculation.tree import TreeShape

ROOT = TreeShape.chain(0)


class GuidedBatch:
    """One matcher a row; None for rows without a grammar and for padding."""

    def __init__(self, matchers: Sequence[Matcher | None], vocab_size: int) -> None:
        self._matchers = tuple(matchers)
        self._words = mask_words(vocab_size)

    def roots(self, pinned: bool = False) -> Tensor:
        """The tokens allowed next, before any is drafted, [B, 1, words]; see ``masks``."""
        nothing = torch.zeros(len(self._matchers), 1, dtype=torch.int64)
        return self.masks(ROOT, nothing, pinned)

    def foreseen(self, depth: int, pinned: bool = False) -> Tensor:
        """[B, depth] int64: tokens that are likely to come, then -1; see Matcher.foreseen."""
        foreseen = torch.full((len(self._matchers), depth), -1, pin_memory=pinned)
        for matcher, row in zip(self._matchers, foreseen, strict=True):
            tokens = [] if matcher is None else matcher.foreseen(depth)
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        return foreseen

    def masks(self, tree: TreeShape, tokens: Tensor, pinned: bool = False) -> Tensor:
        """The tokens allowed after every node, [B, N, words] int32 on the CPU.

        Bit i of word w allows token 32 w + i; rows without a grammar are all ones.

        Args:
            tokens: [B, N] int64 on the CPU, the root's included.
            pinned: in memory from which the device can copy without blocking. It comes from
                torch's cache, which keeps it until the copies of it have run.
        """
        shape = (len(self._matchers), tree.size, self._words)
        masks = torch.empty(shape, dtype=torch.int32, pin_memory=pinned)
        for matcher, nodes, rows in zip(self._matchers, tokens, masks, strict=True):
            if matcher is None:
                rows.fill_(-1)
            else:
                matcher.fill(tree, nodes, rows)
        return masks
