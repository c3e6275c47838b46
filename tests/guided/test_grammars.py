"""Every kind of grammar, the cache, and the vocabulary that masks are made for."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from time import sleep

import pytest

from aquiline.core.errors import AquilineError
from aquiline.core.guided_params import StructuredOutput
from aquiline.guided.grammar import Grammars, mask_words
from aquiline.guided.matcher import Matcher
from tests.guided.forms import (
    END,
    SPECIAL,
    TOKENS,
    VOCAB,
    accepts,
    allowed,
    compiled,
    grammars,
    next_tokens,
)  # fmt: skip


@pytest.mark.parametrize(
    "text", ["yes", "", "é😀", 'a"b\\', "\n\t\b\f\x00\x7f", "\u2028", "root ::= [", " "]
)
def test_a_choice_is_taken_literally(text):
    grammar = compiled(choice=("other", text))
    assert accepts(grammar, text)
    assert accepts(grammar, "other")
    assert not accepts(grammar, text + "x")


def test_a_grammar_of_rules():
    grammar = compiled(grammar='root ::= "(" root ")" | [a-z]+')
    assert accepts(grammar, "((ab))")
    assert not accepts(grammar, "((ab)")


def test_any_json_object():
    grammar = compiled(json_object=True)
    assert accepts(grammar, '{"a": [1, "b", {"c": null}]}')
    assert not accepts(grammar, "[1]")


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ({"grammar": "root ::= b"}, 'grammar: .*line 1, column 10.*"b"'),
        ({"grammar": 'start ::= "a"'}, "grammar: .*root"),
        ({"choice": ("\ud800",)}, "choice: "),
        ({"grammar": 'root ::= "a" root'}, None),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_its_place(form, named):
    if named is None:  # admits only endless texts: begins, and never ends
        assert next_tokens(Matcher(compiled(**form))) == {ord("a")}
        return
    with pytest.raises(AquilineError, match=named):
        compiled(**form)


def test_one_grammar_is_compiled_once():
    store = grammars()
    form = {"type": "object", "properties": {"a": {"type": "integer"}}}
    first = store.compile(StructuredOutput(json=form))
    assert store.compile(StructuredOutput(json=dict(form))) is first
    assert store.compile(StructuredOutput(regex="a")) is not first


def test_threads_that_want_the_same_wait_for_one(monkeypatch):
    store, calls = grammars(), []
    compile_one = store._compile

    def slow(wanted):
        calls.append(wanted)
        sleep(0.05)
        return compile_one(wanted)

    monkeypatch.setattr(store, "_compile", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(store.compile, [StructuredOutput(regex="a+")] * 4))
    assert len(calls) == 1
    assert all(grammar is found[0] for grammar in found)


def test_the_least_recently_used_goes_first():
    size = compiled(regex="a0").compiled.memory_size_bytes
    store = grammars(cache_bytes=int(2.5 * size))
    kept, gone, _ = (store.compile(StructuredOutput(regex=r)) for r in ("a0", "a1", "a0"))
    newest = store.compile(StructuredOutput(regex="a2"))
    assert store.compile(StructuredOutput(regex="a0")) is kept
    assert store.compile(StructuredOutput(regex="a2")) is newest
    assert store.compile(StructuredOutput(regex="a1")) is not gone


def test_a_failure_is_not_kept():
    store = grammars()
    for _ in range(2):
        with pytest.raises(AquilineError, match="position"):
            store.compile(StructuredOutput(regex="(a"))
    assert not store._cache


def test_special_and_padded_tokens_are_never_allowed():
    free = next_tokens(Matcher(compiled(regex="[^\\x00]*")))
    assert {ord("a"), END} <= free
    assert max(free) < VOCAB
    assert SPECIAL not in free
    assert free <= set(range(len(TOKENS)))


def test_the_end_mask_allows_the_end_tokens():
    grammar = Grammars(TOKENS, VOCAB, [31, 63, END], list).compile(StructuredOutput(regex="a"))
    assert grammar.end_mask.shape == (mask_words(VOCAB),)
    assert allowed(grammar.end_mask) == {31, 63, END}


def test_a_checkpoint_without_end_token_is_refused():
    with pytest.raises(AquilineError, match="eos_token_id"):
        Grammars(TOKENS, VOCAB, [], list)


def test_without_xgrammar_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(AquilineError, match=r"pip install 'aquiline\[guided\]'"):
        grammars()
