"""Drafting: grow a tree level by level from a draft that arrives as a callable.

At each depth the draft scores the children of every node that has some, and the verification rule
proposes the best ``fan_out``, in order. How it ranks them (with which noise) is the rule's
business, so the same loop serves both rules and any draft.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.speculation.tree import Level, TreeShape, TreeTables

# Draft ids [B, E, count] of the children of the expanded nodes of a depth, best first, given the
# drafted level above (None for the root's children) and the count.
ProposeChildren = Callable[["DraftedLevel | None", int], Tensor]


@dataclass(frozen=True)
class DraftedLevel:
    """The nodes of one depth: tokens [B, W] and the level's static tables.

    ``drafted`` [B, n] are the tokens of all nodes so far, the root first.
    """

    depth: int
    level: Level
    tokens: Tensor
    drafted: Tensor

    @property
    def expanded_tokens(self) -> Tensor:
        """[B, E] tokens of the nodes that have children."""
        return self.tokens if self.level.all_expanded else self.tokens[:, self.level.expanded]


def grow(
    tree: TreeTables,
    root: Tensor,
    propose: ProposeChildren,
    to_target: Callable[[Tensor], Tensor],
    foreseen: Tensor | None = None,
) -> Tensor:
    """Tokens [B, N] of the whole tree.

    Args:
        root: [B] the root's token.
        propose: children for the level above; called once per depth, root first.
        to_target: draft vocabulary ids -> target token ids.
        foreseen: [B, D] tokens known to be likely after the root, then -1: they take the place of
            the first child, the first child's first child, and so on.
    """
    drafted = root[:, None]
    above: DraftedLevel | None = None
    for depth, level in enumerate(tree.levels, start=1):
        best = propose(above, level.fan_out)  # [B, E, fan_out]
        chosen = best.flatten(1) if level.whole else best[:, level.parents, level.ranks]
        tokens = to_target(chosen)
        if foreseen is not None:
            tokens = _put_first(tree.shape, depth, tokens, foreseen[:, depth - 1, None])
        drafted = torch.cat((drafted, tokens), dim=1)
        above = DraftedLevel(depth, level, tokens, drafted)
    return drafted


def _put_first(shape: TreeShape, depth: int, tokens: Tensor, wanted: Tensor) -> Tensor:
    """Tokens [B, W] of a level with ``wanted`` [B, 1] first, where it is not -1; a sibling that has
    it already gets the first one's, so siblings differ."""
    if (0,) * depth not in shape.paths:
        return tokens
    count = len(shape.children[shape.parents[shape.depths.index(depth)]])
    siblings, first = tokens[:, :count], tokens[:, :1]
    siblings = torch.where(siblings == wanted, first, siblings)
    first = torch.where(wanted >= 0, wanted, first)
    return torch.cat((first, siblings[:, 1:], tokens[:, count:]), dim=1)
