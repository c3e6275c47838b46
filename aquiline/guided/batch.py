"""GuidedBatch: the masks of a whole batch; requests with and without grammars side by side.

A batch with grammars runs its round as three graphs, as the host must see the drafted tokens:

    device   draft graph --+-- verify graph (the target's forward) --+-- accept graph
                           | copy tokens [B, N] to pinned memory     | wait for masks [B, N, words]
    host                   +-- masks(tree, tokens) ------------------+

1. ``advance`` with the tokens the round before emitted, as soon as they are on the host. They were
   copied behind that round's accept graph, so they arrive no later than the drafted ones.
2. Draft graph, and behind it the one copy of the tokens; an event tells when it is there. To filter
   the root's children before drafting, first send ``masks`` of the tree without draft nodes.
3. Launch the verify graph, which needs no mask, before waiting for that event.
4. ``masks`` while the target runs: pinned, then copied without blocking to the address that the
   accept graph reads, on a stream of its own that the accept graph waits for.
5. The accept graph applies them to the logits of every node and draws. A node that the grammar
   excludes has an empty mask: whatever is drawn there is never followed, since its parent's mask
   forbids its token.

A batch in which no row has a grammar has no GuidedBatch and keeps the single graph. A row in flight
after its text has ended gets end tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aquiline.guided.grammar import mask_words
from aquiline.guided.matcher import Matcher
from aquiline.speculation.tree import TreeShape


class GuidedBatch:
    """One matcher a row; None for rows without a grammar and for padding."""

    def __init__(self, matchers: Sequence[Matcher | None], vocab_size: int) -> None:
        self._matchers = tuple(matchers)
        self._words = mask_words(vocab_size)

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

    def advance(self, emitted: Sequence[Sequence[int]]) -> None:
        """Move every row on over the tokens that a round emitted for it."""
        for matcher, tokens in zip(self._matchers, emitted, strict=True):
            if matcher is not None:
                matcher.advance(tokens)
