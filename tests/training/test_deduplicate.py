"""Copies and planted near-duplicates go, the first stays; numbers of words are those of words."""

import random
import re
import time

import numpy as np
import pytest

from aquiline.training.conversations import Entry
from aquiline.training.deduplicate import ORDERS, deduplicate, near_duplicates, signatures
from aquiline.training.words import run_numbers, word_numbers

VOCABULARY = [f"word{i}" for i in range(5000)]


def dialogue(text: str, answer: str = "Sure.") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def entries(*texts: str) -> list[Entry]:
    return [Entry(number, dialogue(text)) for number, text in enumerate(texts, 1)]


def words(random_: random.Random, count: int) -> list[str]:
    return random_.choices(VOCABULARY, k=count)


def test_exact_copies_go_whatever_case_and_white_space():
    question, answer = dialogue("what is it")
    swapped = Entry(4, [{**question, "role": "assistant"}, {**answer, "role": "user"}])
    given = [*entries("What is it", "what\n\nis  IT", "who is it"), swapped]
    kept, report = deduplicate(given, threshold=None)
    assert [entry.number for entry in kept] == [1, 3, 4]
    assert (report.exact, report.near, report.examples) == (1, 0, [])


def test_planted_near_duplicates_are_found_and_the_first_stays():
    random_ = random.Random(0)
    originals = [words(random_, random_.randrange(40, 400)) for _ in range(150)]
    given = [" ".join(one) for one in originals]
    for one in originals[:100]:  # a few words changed: likeness above 0.9
        changed = list(one)
        for at in random_.sample(range(len(one)), max(1, len(one) // 150)):
            changed[at] = "changed"
        given.append(", ".join(changed).upper())
    calls = []
    kept, report = deduplicate(entries(*given), progress=calls.append)
    dropped = {*range(1, 251)} - {entry.number for entry in kept}
    assert report.near == len(dropped)
    assert dropped <= set(range(151, 251))
    assert len(dropped) >= 90  # short texts with a changed word in the middle are less alike
    assert all(copy.of == copy.number - 150 for copy in report.examples)
    assert len(report.examples) == 5
    assert calls[-1] == 250
    again, _ = deduplicate(entries(*given))
    assert again == kept


def test_threshold_decides_what_is_near():
    """Pairs with 0.65 of their shingles in common."""
    random_ = random.Random(5)
    pairs = []
    for _ in range(40):
        common = words(random_, 237)
        pairs += [" ".join(common + words(random_, 63)) for _ in range(2)]
    near = {at: deduplicate(entries(*pairs), at)[1].near for at in (0.5, 0.8)}
    assert near[0.8] == 0
    assert near[0.5] > 10


def test_texts_without_words_are_like_nothing_else():
    texts = ("", "?", "a", "!", "a!", "b c")
    conversations = [[{"role": "user", "content": text}] for text in texts]
    first, _ = near_duplicates(signatures(iter(conversations), 6), 0.5)
    assert first.tolist() == [0, 1, 2, 3, 2, 5]  # "a" and "a!" are the same word


@pytest.mark.parametrize("shared", [20, 50, 80])
def test_likeness_estimates_the_share_of_common_shingles(shared):
    """60 pairs of texts with a known share of common shingles; standard error 0.035 / sqrt(60)."""
    random_ = random.Random(shared)
    texts, exact = [], []
    for _ in range(60):
        common, a, b = (words(random_, n) for n in (shared * 3, 300 - shared * 3, 300 - shared * 3))
        pair = [" ".join(common + rest) for rest in (a, b)]
        sets = [{*zip(*(t.split()[i:] for i in range(5)), strict=False)} for t in pair]
        exact.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
        texts += [[{"role": "user", "content": one}] for one in pair]
    made = signatures(iter(texts), len(texts))
    estimate = (made[::2] == made[1::2]).mean()
    deviation = np.sqrt(np.mean(exact) * (1 - np.mean(exact)) / ORDERS / 60)
    assert abs(estimate - np.mean(exact)) < 4 * deviation


def test_time_is_linear_in_one_long_text_and_in_many_alike():
    start = time.perf_counter()
    deduplicate(entries("lorem ipsum dolor " * 300_000, "x" * 5_000_000))
    alike = entries(*(f"the same old text of ten words, number {i % 7}" for i in range(5000)))
    kept, _ = deduplicate(alike)
    assert len(kept) == 7
    assert time.perf_counter() - start < 15


def test_numbers_agree_just_where_words_do():
    alphabet = "aB1_ é’日\n-\u0307İß"
    random_ = random.Random(1)
    numbers: dict[str, int] = {}
    for _ in range(400):
        text = "".join(random_.choices(alphabet, k=random_.randrange(30)))
        found = re.findall(r"[^\W_]+", text.lower())
        made = word_numbers(text).tolist()
        assert len(made) == len(found)
        for word, number in zip(found, made, strict=True):
            assert numbers.setdefault(word, number) == number
    assert len(set(numbers.values())) == len(numbers) > 300


def test_runs_depend_on_order_and_length():
    one = word_numbers("a b c d a b c")
    runs = run_numbers(one, 3)
    assert len(runs) == 5
    assert runs[0] == runs[4]
    assert len(set(runs.tolist())) == 4
    assert len(run_numbers(one, 8)) == 0
    assert run_numbers(word_numbers("a b"), 2) != run_numbers(word_numbers("b a"), 2)
