"""Words and runs of words as 64-bit numbers, computed array-wise.

A word is a run of letters and digits in lower case. Its number is a polynomial of its bytes, a
run's number a polynomial of its words' numbers, both modulo 2^64 and stirred, so that two different
ones agree with a probability of about 2^-64. Time is linear in the text.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint64]
WORD = re.compile(r"[^\W_]+")
_NOT_WORD = re.compile(r"[\W_]+")
_IN_WORD = np.array([chr(byte).isalnum() or byte >= 128 for byte in range(256)])
_BASE = np.uint64(0x9E3779B97F4A7C15)
_STIR = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)


def word_numbers(text: str) -> Numbers:
    """The number of every word of a text, [words], in the order ``WORD`` finds them in it."""
    text = text.lower()
    if not text.isascii():
        text = _NOT_WORD.sub(" ", text)
    characters = np.frombuffer(text.encode(), dtype=np.uint8)
    inside = _IN_WORD[characters]
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    lengths = edges[1::2] - edges[::2]
    if not len(lengths):
        return np.zeros(0, np.uint64)
    starts = np.cumsum(lengths) - lengths  # among the characters inside words
    place = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    powers = np.multiply.accumulate(np.full(int(lengths.max()), _BASE))
    values = (characters[inside].astype(np.uint64) + np.uint64(1)) * powers[place]
    return _stir(np.add.reduceat(values, starts))


def run_numbers(words: Numbers, n: int) -> Numbers:
    """The number of every run of ``n`` words, [max(0, words - n + 1)]."""
    count = max(0, len(words) - n + 1)
    runs = np.zeros(count, np.uint64)
    for start in range(n):
        runs = _stir(runs * _BASE + words[start : start + count])
    return runs


def _stir(numbers: Numbers) -> Numbers:
    numbers = (numbers ^ (numbers >> _HALF)) * _STIR
    return numbers ^ (numbers >> _HALF)
