"""Matcher: where the text of one request stands in its grammar, and what may follow.

    tree     root - "{" - "\"name\""             mask of a node: the tokens allowed after it
                 \\ "x"                           "x" violates: its mask is empty, as it is never
                                                  reached, and so are those of all below it

The masks of a tree are filled by a depth-first walk that accepts a node's token, fills its row and
takes the token back, so the state is afterwards what it was before. Where the grammar is complete
end tokens are allowed; a node that holds one ends the text, and after it, end tokens are all that
is allowed: what is drawn there is nobody's. A grammar may lead where nothing can follow (a rule
that never ends, a character that no token spells); there an end token gives the text up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aquiline.guided.grammar import Grammar
from aquiline.speculation.tree import TreeShape


class Matcher:
    """The state of one request.

    Attributes:
        finished: an end token was accepted.
        stuck: it was because nothing else was left, and the text does not have the form.
    """

    def __init__(self, grammar: Grammar) -> None:
        import xgrammar

        self.finished = self.stuck = False
        self._grammar = grammar
        self._state: Any = xgrammar.GrammarMatcher(grammar.compiled)

    def fill(self, tree: TreeShape, tokens: Tensor, rows: Tensor) -> None:
        """Write the mask of every node.

        Args:
            tokens: [N] int64, on the CPU; the root's is not read: it was advanced over.
            rows: [N, words] int32, contiguous, on the CPU; bit i of word w allows token 32 w + i.
        """
        if self.finished:
            rows.copy_(self._grammar.end_mask.expand_as(rows))
            return
        rows.zero_()  # what the walk does not reach it does not write
        self._state.traverse_draft_tree(*_links(tree), tokens, rows)
        words = rows.numpy()  # quicker than torch to look at
        for node, token in enumerate(tokens.tolist()):
            reached = node == 0 or _allows(words[tree.parents[node]], token)
            if reached and (token in self._grammar.end_tokens or not words[node].any()):
                rows[node] = self._grammar.end_mask

    def advance(self, tokens: Sequence[int]) -> None:
        """Move on over emitted tokens; those after an end token belong to nobody."""
        for token in tokens:
            if self.finished:
                return
            if self._state.accept_token(token):
                self.finished = self._state.is_terminated()
            else:
                assert token in self._grammar.end_tokens, f"token {token} is against its mask"
                self.finished = self.stuck = True

    def foreseen(self, limit: int) -> list[int]:
        """Tokens that are likely to come, ``limit`` at most: the usual spelling of the characters
        that the grammar leaves no choice of. Its last token is left out, as it may be said in one
        with what follows."""
        if self.finished:
            return []
        try:
            text = self._state.find_jump_forward_string()
        except UnicodeDecodeError:  # inside a character
            return []
        tokens = self._grammar.spell(text)[:-1][:limit] if text else ()
        return [*takewhile(lambda token: token < self._grammar.vocab_size, tokens)]


@lru_cache(maxsize=64)
def _links(tree: TreeShape) -> tuple[Tensor, Tensor]:
    """[N] the first child of every node and [N] its next sibling; -1 where there is none."""
    child, sibling = torch.full((2, tree.size), -1)
    for node, nodes in enumerate(tree.children):
        if nodes:
            child[node] = nodes[0]
        for left, right in pairwise(nodes):
            sibling[left] = right
    return child, sibling


def _allows(words: NDArray[np.int32], token: int) -> bool:
    return bool(words[token // 32] >> (token % 32) & 1)
