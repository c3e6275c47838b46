"""Detokenizer: what is streamed adds up to the decoded whole, and nothing is shown too early."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquiline.models.registry import resolve
from aquiline.text.detokenizer import Detokenizer
from aquiline.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["Hello, 世界! नमस्ते दुनिया 👨‍👩‍👧 done", "🇫🇷🤷🏽‍♀️ ok", "क्षत्रिय", "a\ufffdb \ufffd\ufffd", ""]
SMOLLM = load_tokenizer(resolve("smollm2-135m-instruct"))
# Tokens that hold a piece of a character are what breaks naive streaming.
BROKEN = [i for i in range(17, 49152) if "\ufffd" in SMOLLM.decode([i])]
token_ids = st.lists(
    st.one_of(st.sampled_from(BROKEN), st.integers(0, 20), st.integers(0, 49151)), max_size=60
)
unicode_text = st.text(
    st.one_of(
        st.characters(exclude_categories=("Cs",)),
        st.sampled_from("👨‍👩‍👧🇫🇷🤷🏽‍♀️🎉世界你好नमस्तेक्ष ab.\n\ufffd"),
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    return SMOLLM


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in pairwise(edges)]


def reference(text: str, stop: tuple[str, ...]) -> str:
    """Cut at the first character at which any stop string is complete (the longest of those)."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@settings(max_examples=300, deadline=None)
@given(ids=token_ids, cuts=st.lists(st.integers(0, 60), max_size=20), skip=st.booleans())
def test_any_ids_in_any_portions(ids: list[int], cuts: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(SMOLLM, skip)
    shown = "".join(detokenizer.append(part) for part in split(ids, cuts))
    assert SMOLLM.decode(ids, skip).startswith(shown)
    assert shown + detokenizer.finish() == SMOLLM.decode(ids, skip)
    assert detokenizer.text == SMOLLM.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(text=unicode_text)
def test_any_text_token_by_token(text: str) -> None:
    ids = SMOLLM.encode(text)
    detokenizer = Detokenizer(SMOLLM, skip_special_tokens=False)
    shown = "".join(detokenizer.append([token]) for token in ids) + detokenizer.finish()
    assert shown == SMOLLM.decode(ids, skip_special_tokens=False)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc 世👍\ufffd", max_size=30),
    stop=st.lists(st.text("abc 世👍", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 60), max_size=20),
)
def test_stop_strings_do_not_depend_on_portions(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    ids = SMOLLM.encode(text)
    detokenizer = Detokenizer(SMOLLM, stop=tuple(stop))
    shown = "".join(detokenizer.append(part) for part in split(ids, cuts))
    expected = reference(SMOLLM.decode(ids), tuple(stop))
    assert expected.startswith(shown)
    shown += detokenizer.finish()
    assert shown == detokenizer.text == expected
    assert (detokenizer.stopped_at is not None) == any(s in SMOLLM.decode(ids) for s in stop)
    if detokenizer.stopped_at is not None:
        before = SMOLLM.decode(ids[: detokenizer.stopped_at - 1]).rstrip("\ufffd")
        assert not any(s in before for s in stop)


@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_shown_broken(smollm: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(smollm)
    shown = ""
    for token in smollm.encode(text):
        shown += detokenizer.append([token])
        assert text.startswith(shown)
    assert shown + detokenizer.finish() == text


def test_a_broken_last_character_is_flushed(smollm: Tokenizer) -> None:
    ids = smollm.encode("ok 🎉")[:-1]
    detokenizer = Detokenizer(smollm)
    assert detokenizer.append(ids) == "ok "
    assert detokenizer.finish() == "\ufffd"


def test_a_possible_stop_string_is_held_back(smollm: Tokenizer) -> None:
    detokenizer = Detokenizer(smollm, stop=("\nUser:",))
    assert detokenizer.append(smollm.encode("Hi\n")) == "Hi"
    assert detokenizer.append(smollm.encode("User")) == ""
    assert detokenizer.append(smollm.encode("s")) == "\nUsers"
    assert detokenizer.append(smollm.encode("!\nUse")) == "!"
    assert detokenizer.finish() == "\nUse"
    assert detokenizer.text == "Hi\nUsers!\nUse"
    assert detokenizer.stopped_at is None


def test_a_stop_string_completed_too_early_is_text(smollm: Tokenizer) -> None:
    ids = smollm.encode("a STOP b STOP c")
    ends = [k for k in range(1, len(ids) + 1) if smollm.decode(ids[:k]).endswith("STOP")]
    for least, text, stopped in (
        (ends[0] - 1, "a ", ends[0]), (ends[0], "a STOP b ", ends[1]),
        (ends[1] - 1, "a STOP b ", ends[1]), (ends[1], "a STOP b STOP c", None),
    ):  # fmt: skip
        for portions in ([ids], [[token] for token in ids]):
            detokenizer = Detokenizer(smollm, stop=("STOP", "STOP be"), min_tokens=least)
            shown = "".join(detokenizer.append(part) for part in portions) + detokenizer.finish()
            assert (shown, detokenizer.stopped_at) == (text, stopped)


def test_a_stop_string_begun_early_still_counts(smollm: Tokenizer) -> None:
    detokenizer = Detokenizer(smollm, stop=("b c",), min_tokens=2)
    assert "".join(detokenizer.append([token]) for token in smollm.encode("a b c d")) == "a "
    assert detokenizer.stopped_at == 3


def test_stopped_at_counts_all_appended_tokens(smollm: Tokenizer) -> None:
    first, second = smollm.encode("One two"), smollm.encode(" three STOP four five")
    stop_end = next(k for k in range(len(second)) if "STOP" in smollm.decode(second[:k]))
    detokenizer = Detokenizer(smollm, stop=("STOP",))
    assert detokenizer.append(first) == "One two"
    assert detokenizer.append(second) == " three "
    assert detokenizer.stopped_at == len(first) + stop_end
    assert detokenizer.append(first) == detokenizer.finish() == ""
    assert detokenizer.text == "One two three "


def test_skipped_tokens_count_but_do_not_show(smollm: Tokenizer) -> None:
    detokenizer = Detokenizer(smollm, stop=("b",))
    assert detokenizer.append([1, *smollm.encode("a"), 2, *smollm.encode("b")]) == "a"
    assert detokenizer.stopped_at == 4


@pytest.mark.parametrize("pattern", [SMOLLM.encode("word 世👍"), BROKEN[:1], [0]])
def test_work_per_token_is_constant(
    smollm: Tokenizer, pattern: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    decode = smollm.decode

    def counting(ids: list[int], skip_special_tokens: bool = True) -> str:
        lengths.append(len(ids))
        return decode(ids, skip_special_tokens)

    monkeypatch.setattr(smollm, "decode", counting)
    detokenizer = Detokenizer(smollm, skip_special_tokens=False)
    for i in range(2000):
        detokenizer.append([pattern[i % len(pattern)]])
    assert max(lengths) <= 32
    assert len(lengths) <= 2000 * 2
