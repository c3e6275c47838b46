"""An accepted expression means what it means in Python; others are refused with their place."""

from __future__ import annotations

import random
import re

import pytest

from aquiline.core.errors import AquilineError
from aquiline.guided.pattern import whole_string
from tests.guided.forms import accepts, compiled, random_text

GOOD = [
    "abc", "^a|b" [1:], "^a+?$", "(?:ab|c){2,3}d*", "(?<n>a)b", r"\d{3}-\d{4}",
    r"[\w.-]+@[a-z]+\.org",
    r"[^ab\]]x", r"\x41\u0042\n\/\.", "[(?]", "é|[à-ü]", "", "a|", "[a^$|]", "x{0,200}",
]  # fmt: skip
BAD = [
    (r"a\b", r"\\b"), (r"\Aa", r"\\A"), (r"a\Z", r"\\Z"), (r"\p{L}", r"\\p"), (r"(a)\1", r"\\1"),
    (r"\k<n>", r"\\k"), (r"\cA", r"\\c"), ("a$b", "'$' at 1"), ("a^b", "'^' at 1"), ("(^a)",
     "'^' at 1"),
    ("(?=a)a", "(?="), ("(?!a)b", "(?!"), ("(?<=a)b", "(?<="), ("(?<!a)b", "(?<!"), ("(?i)a",
     "(?i"),
    ("(?P<n>a)", "(?P"), ("[[:alpha:]]", "'['"), ("[]", "'[]'"), ("[^]a]", "'[^]'"), ("^a|b",
     "anchor"),
    ("a|b$", "anchor"), ("a\\", r"\\"), ("(a", "position"), ("a{3,1}", "regex"), ("a++",
     "position"),
]  # fmt: skip


@pytest.mark.parametrize("pattern", GOOD)
def test_texts_of_an_expression_match_it(pattern):
    grammar, chance = compiled(regex=pattern or "()"), random.Random(0)
    wanted = re.compile(pattern.replace("(?<n>", "(?P<n>"), re.DOTALL | re.ASCII)
    for _ in range(10):
        text = random_text(grammar, chance)
        assert text is not None
        assert "\ufffd" in text or wanted.fullmatch(text)


@pytest.mark.parametrize(("pattern", "named"), BAD)
def test_what_would_be_misread_is_refused(pattern, named):
    with pytest.raises(AquilineError) as caught:
        compiled(regex=pattern)
    assert str(caught.value).startswith("regex: ")
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "pattern", ['a"', r"\\", r"\n", r"\x22", "a\tb", '["a]', r"[\x5c]", "[\n]"]
)
def test_in_a_json_string_no_character_may_need_an_escape(pattern):
    with pytest.raises(AquilineError, match="only escaped"):
        compiled(json={"type": "string", "pattern": f"^{pattern}$"})


def test_in_a_json_string_no_count_may_be_large():
    with pytest.raises(AquilineError, match="count of 129"):
        compiled(json={"type": "string", "pattern": "^.{2,129}$"})
    grammar = compiled(json={"type": "string", "pattern": "^(?:.{128}){2}$"})
    assert accepts(grammar, f'"{"a" * 256}"')
    for raw in ('"', "\n", "\\"):
        assert not accepts(grammar, f'"{raw}{"a" * 255}"')


def test_a_pattern_is_searched_for_unless_it_is_anchored():
    for pattern in ("a", "^a", "a$", "^a$", r"a\$", "a|b", "[a$]"):
        whole = re.compile(whole_string(pattern))
        for text in ("a", "ba", "ab", "bab", "a$", "b", "$", ""):
            assert bool(whole.fullmatch(text)) == bool(re.search(pattern, text)), (pattern, text)


def test_a_text_must_match_from_end_to_end():
    grammar = compiled(regex="a+b")
    assert accepts(grammar, "aab")
    assert not accepts(grammar, "aabb")
