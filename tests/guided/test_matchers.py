"""The masks of a tree are those of its paths, one at a time; the state is left as it was."""

from __future__ import annotations

import random

import pytest
import torch

from aquiline.core.guided_params import StructuredOutput
from aquiline.guided.grammar import Grammars, mask_words
from aquiline.guided.matcher import Matcher
from aquiline.speculation.tree import POOL, TreeShape
from tests.guided.forms import (
    END,
    SPECIAL,
    TOKENS,
    VOCAB,
    allowed,
    compiled,
    next_tokens,
    tokens_of,
)

WORDS = mask_words(VOCAB)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"enum": ["a",
    "na"]}}},
    "required": ["tags"],
}  # fmt: skip
EAGLE = TreeShape.of(POOL["eagle-25"])


def filled(matcher: Matcher, tree: TreeShape, tokens: list[int], words: int = WORDS
           ) -> list[set[int]]:  # fmt: skip
    rows = torch.full((tree.size, words), 0x5A5A5A5A, dtype=torch.int32)
    matcher.fill(tree, torch.tensor(tokens), rows)
    return [allowed(row) for row in rows]


def expected(grammar, said: list[int], tree: TreeShape, tokens: list[int]) -> list[set[int]]:
    """Every node on a matcher of its own, by its definition."""
    masks: list[set[int]] = []
    for node in range(tree.size):
        path, at = [], node
        while at:
            path.append(at)
            at = tree.parents[at]
        matcher = Matcher(grammar)
        matcher.advance(said)
        for step in reversed(path):
            if tokens[step] not in next_tokens(matcher):
                masks.append(set())
                break
            matcher.advance([tokens[step]])
        else:
            masks.append(next_tokens(matcher))
    return masks


@pytest.mark.parametrize("tree", [EAGLE, TreeShape.chain(5), TreeShape.chain(0)])
def test_every_node_has_the_mask_of_its_path(tree):
    grammar, chance = compiled(json=SCHEMA), random.Random(1)
    matcher, said = Matcher(grammar), list[int]()
    for _ in range(40):
        tokens = [0]
        for node in range(1, tree.size):
            walk = Matcher(grammar)
            walk.advance(said)
            path = tree_path(tree, node)[:-1]
            likely: set[int] = set()
            if all(
                tokens[step] in next_tokens(walk) and not walk.advance([tokens[step]])
                for step in path
            ):
                likely = next_tokens(walk)
            good = likely and chance.random() < 0.7
            tokens.append(chance.choice(sorted(likely)) if good else chance.randrange(VOCAB))
        before = next_tokens(matcher)
        assert filled(matcher, tree, tokens) == expected(grammar, said, tree, tokens)
        assert next_tokens(matcher) == before
        emitted = chance.choice(sorted(before))
        matcher.advance([emitted])
        said.append(emitted)
        if matcher.finished:
            matcher, said = Matcher(grammar), []


def tree_path(tree: TreeShape, node: int) -> list[int]:
    """Nodes from below the root to ``node``."""
    return [] if node == 0 else [*tree_path(tree, tree.parents[node]), node]


def test_a_violating_node_and_all_below_it_have_empty_masks():
    tree = TreeShape.of([[0], [1], [0, 0], [1, 0]])
    masks = filled(Matcher(compiled(regex="ab")), tree, [0, ord("x"), ord("a"), ord("b"), ord("b")])
    assert masks == [{ord("a")}, set(), {ord("b")}, set(), {END}]


@pytest.mark.parametrize("stranger", [SPECIAL, VOCAB - 1, VOCAB + 5, -1])
def test_tokens_outside_the_text_violate(stranger, capfd):
    masks = filled(Matcher(compiled(regex="a*")), TreeShape.chain(2), [0, stranger, ord("a")])
    assert masks[1:] == [set(), set()]
    assert capfd.readouterr() == ("", "")  # nothing is said about it in every round


def test_after_the_end_only_end_tokens_are_allowed():
    matcher = Matcher(compiled(regex="ab?"))
    tokens = [0, ord("a"), END, END, ord("a")]
    assert filled(matcher, TreeShape.chain(4), tokens) == [
        {ord("a")}, {ord("b"), END}, {END}, {END}, set(),
    ]  # fmt: skip
    matcher.advance([ord("a"), END, ord("z"), 3])  # what follows the end is nobody's
    assert matcher.finished
    assert filled(matcher, TreeShape.chain(2), [0, ord("a"), END]) == [{END}] * 3
    assert matcher.foreseen(4) == []


def test_an_emitted_token_that_its_mask_forbids_is_our_fault():
    with pytest.raises(AssertionError, match="120"):
        Matcher(compiled(regex="ab")).advance([ord("a"), ord("x")])


@pytest.mark.parametrize("dead", ['"z"', 'x\nx ::= x "b"'])
def test_where_nothing_can_follow_the_text_is_given_up(dead):
    """A character that no token spells, a rule that never ends: only an end token is left."""
    store = Grammars([b"a", b"b", b""], 3, [2], list)
    matcher = Matcher(store.compile(StructuredOutput(grammar=f'root ::= "a" | "b" {dead}')))
    assert filled(matcher, TreeShape.chain(2), [0, 1, 1], 1) == [{0, 1}, {2}, set()]
    matcher.advance([1])
    assert not matcher.finished
    assert filled(matcher, TreeShape.chain(1), [0, 2], 1) == [{2}, {2}]
    matcher.advance([2])
    assert (matcher.finished, matcher.stuck) == (True, True)


def test_what_is_foreseen_is_the_usual_spelling_without_its_last_token():
    matcher = Matcher(compiled(regex="xyz[ab]cd\u20acf"))
    assert matcher.foreseen(8) == tokens_of("xy")
    assert matcher.foreseen(1) == tokens_of("x")
    assert matcher.foreseen(0) == []
    matcher.advance(tokens_of("xyz"))
    assert matcher.foreseen(8) == []
    matcher.advance(tokens_of("acd"))
    assert matcher.foreseen(8) == tokens_of("\u20ac")
    matcher.advance(tokens_of("\u20ac")[:1])  # inside a character
    assert matcher.foreseen(8) == []
    matcher.advance([*tokens_of("\u20ac")[1:], *tokens_of("f"), END])
    assert matcher.foreseen(8) == []


def test_a_token_that_the_model_does_not_know_is_not_foreseen():
    store = Grammars(TOKENS, VOCAB, [END], lambda text: [text[0].encode()[0], VOCAB, 5, 6])
    assert Matcher(store.compile(StructuredOutput(regex="abc"))).foreseen(3) == [ord("a")]
