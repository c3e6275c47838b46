"""A benchmark text in a conversation is found; generic phrases are not; the report says which."""

import json
import random

import pytest

from aquiline.core.errors import DataError
from aquiline.training.conversations import Entry
from aquiline.training.decontaminate import (
    Decontaminator,
    Dropped,
    benchmark_file,
    decontaminate,
)

PROMPT = "Melanie sold a third of her vacuum cleaners at the green house, 2 more to the red house."
SHORT = "Prove the Pythagorean theorem."
NUMBERS = "Sort it: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and x y z a b c d e f g h"


def dialogue(question: str, answer: str = "Sure.") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def checker() -> Decontaminator:
    return Decontaminator({"gsm8k": [PROMPT], "mt-bench": [SHORT, NUMBERS]})


def test_run_of_words_is_found_anywhere_whatever_case_and_punctuation(checker):
    part = "so: HER -- vacuum\ncleaners, at 'the green house' 2..."
    for conversation in (dialogue(part), dialogue("Hi", part)):
        assert checker.hit(conversation) == (
            "gsm8k",
            "her vacuum cleaners at the green house 2",
        )


def test_one_word_less_is_not_found(checker):
    assert checker.hit(dialogue("her vacuum cleaners at the green house")) is None


def test_runs_do_not_cross_messages(checker):
    words = PROMPT.split()
    assert checker.hit(dialogue(" ".join(words[:7]), " ".join(words[7:14]))) is None
    assert checker.hit(dialogue(" ".join(words[:14]))) is not None


def test_shorter_n_finds_shorter_runs():
    checker = Decontaminator({"gsm8k": [PROMPT]}, n=3)
    assert checker.hit(dialogue("the green house")) == ("gsm8k", "the green house")


def test_short_prompt_counts_only_as_a_whole_message(checker):
    assert checker.hit(dialogue("prove the Pythagorean theorem")) == (
        "mt-bench",
        "prove the pythagorean theorem",
    )
    assert checker.hit(dialogue("How do I prove the Pythagorean theorem?")) is None


def test_numbers_and_letters_are_generic(checker):
    assert checker.hit(dialogue("1 2 3 4 5 6 7 8 9 10")) is None
    assert checker.hit(dialogue("x y z a b c d e f g h")) is None


def test_report_names_what_is_dropped(checker):
    clean = dialogue("What is an eagle?")
    conversations = [clean, dialogue(PROMPT), dialogue(SHORT), clean, dialogue("Hi", PROMPT)]
    entries = [Entry(number, one) for number, one in enumerate(conversations, 11)]
    calls = []
    kept, report = decontaminate(entries, checker, calls.append)
    assert kept == [Entry(11, clean), Entry(14, clean)]
    assert calls == [1, 2, 3, 4, 5]
    assert (report.n, report.benchmarks) == (8, {"gsm8k": 2, "mt-bench": 1})
    first = "melanie sold a third of her vacuum cleaners"
    assert report.dropped == [
        Dropped(12, "gsm8k", first),
        Dropped(13, "mt-bench", "prove the pythagorean theorem"),
        Dropped(15, "gsm8k", first),
    ]


def test_search_by_number_finds_what_a_search_by_words_finds():
    words = ["red", "Größe", "it's", "日本", "x_y", "42", "“so”", "naïve", "A"]
    random_ = random.Random(0)

    def text(length):
        return " ".join(random_.choices(words, k=length))

    checker = Decontaminator({"a": [text(12) for _ in range(40)]}, n=4)
    found = 0
    for _ in range(300):
        conversation = dialogue(text(random_.randrange(9)), text(random_.randrange(9)))
        by_words = any(checker.hit(dialogue("", turn["content"])) for turn in conversation)
        plain = " ".join(turn["content"] for turn in conversation).lower()
        hit = checker.hit(conversation)
        assert (hit is not None) == by_words
        assert hit is None or all(word in plain for word in hit.ngram.split())
        found += hit is not None
    assert 50 < found < 250


def test_benchmark_file_gives_its_texts(tmp_path):
    rows = [{"id": "task one", "turns": ["What is an eagle?", "And why, pray?"], "n": 3}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    (tmp_path / "a.txt").write_text("What is an eagle?\n\nshort\nAnd why, pray?\n")
    for name in ("a.json", "a.jsonl", "a.txt"):
        assert benchmark_file(tmp_path / name) == ["What is an eagle?", "And why, pray?"]


@pytest.mark.parametrize("content", [b"{", b"\xff", b'["a"]', None])
def test_bad_benchmark_file_is_named(tmp_path, content):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.jsonl: "):
        benchmark_file(path)
