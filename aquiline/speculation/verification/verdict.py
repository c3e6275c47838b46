"""Verdict: what a round decided."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aquiline.speculation.tree import TreeTables


@dataclass(frozen=True)
class Verdict:
    """The accepted path of each request and the tokens it emits.

    Attributes:
        accepted: [B] draft nodes accepted, 0..D.
        path: [B, D + 1] node at each depth, the root first; past ``accepted`` it repeats the leaf.
        tokens: [B, D + 1] emitted tokens, ``accepted + 1`` of them valid: the accepted draft
            tokens, then the bonus token.
    """

    accepted: Tensor
    path: Tensor
    tokens: Tensor


def verdict_of(tree: TreeTables, leaf: Tensor, emitted: Tensor) -> Verdict:
    """leaf [B], the deepest accepted node; emitted [B, N], the token drawn after each node."""
    path = tree.routes[leaf]
    return Verdict(tree.depths[leaf], path, emitted.gather(1, path))
