"""A benchmark text in a conversation is found; generic phrases are not; copies go once."""

import pytest

from aquiline.training.decontaminate import Decontaminator, decontaminate

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


def test_report_counts_what_is_dropped(checker):
    clean = dialogue("What is an eagle?")
    copy = dialogue("what  is an EAGLE?")
    swapped = [
        {**turn, "role": role} for turn, role in zip(clean, ("assistant", "user"), strict=True)
    ]
    kept, report = decontaminate(
        [clean, dialogue(PROMPT), copy, dialogue(SHORT), swapped, dialogue(PROMPT, "No.")], checker
    )
    assert kept == [clean, swapped]
    assert (report.kept, report.duplicates) == (2, 1)
    assert report.dropped == {"gsm8k": 2, "mt-bench": 1}
    assert report.examples["mt-bench"] == ("prove the pythagorean theorem",)
    assert len(report.examples["gsm8k"]) == 2
