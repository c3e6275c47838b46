"""Exact copies and near-duplicates are dropped; the first of its kind stays.

Exact: equal roles and texts, case and white space aside. Near: two conversations are as alike as
the share of word 5-shingles they have in common (Jaccard). Min-hashing estimates it: under a random
order of all shingles, two sets have the same least one with just that probability,

    P[min h(A) = min h(B)] = |A and B| / |A or B|,

so the share of ``ORDERS`` orders that agree is the estimate, with a standard error of 0.035 at 0.8.
Only pairs with all minima of one band in common are compared (a pair at 0.8 escapes in 5 % of the
cases, at 0.9 in 0.01 %), each conversation with the first of its bucket only. Time and memory grow
linearly: 512 bytes a conversation. Order h_k is multiplication of the shingle's 32-bit number by an
odd constant, so results are the same everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from aquiline.training.conversations import Conversation, Entry
from aquiline.training.words import run_numbers, word_numbers

SHINGLE = 5  # words
ORDERS, BANDS = 128, 16
THRESHOLD = 0.8
_MULTIPLIERS = np.random.default_rng(0).integers(0, 2**31, ORDERS, dtype=np.uint32) * 2 + 1
_BATCH = 1 << 17  # shingles hashed together: half a megabyte stays in the cache
_EXAMPLES = 5
_EXCERPT = 80  # characters

Signatures = NDArray[np.uint32]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Copy:
    """One dropped conversation, ``number`` in the source, and the earlier one it is like."""

    number: int
    of: int
    likeness: float
    text: str


@dataclass(frozen=True)
class DuplicateReport:
    """What ``deduplicate`` dropped; ``examples`` are the first few near-duplicates."""

    exact: int
    near: int
    threshold: float
    examples: Sequence[Copy] = field(default_factory=list)


def deduplicate(
    entries: Sequence[Entry],
    threshold: float | None = THRESHOLD,
    progress: Progress = lambda done: None,
) -> tuple[list[Entry], DuplicateReport]:
    """The entries without copies, in order. ``threshold`` None looks for exact copies only.

    ``progress`` is called with the number of entries looked at.
    """
    seen: set[bytes] = set()
    unique = []
    for entry in entries:
        if (digest := _digest(entry.conversation)) not in seen:
            seen.add(digest)
            unique.append(entry)
    exact = len(entries) - len(unique)
    if threshold is None:
        return unique, DuplicateReport(exact, 0, 1.0)
    made = signatures((entry.conversation for entry in unique), len(unique), progress)
    first, likeness = near_duplicates(made, threshold)
    kept: list[Entry] = []
    examples: list[Copy] = []
    for index, entry in enumerate(unique):
        if first[index] == index:
            kept.append(entry)
        elif len(examples) < _EXAMPLES:
            text = entry.conversation[0]["content"][:_EXCERPT]
            of = unique[int(first[index])].number
            examples.append(Copy(entry.number, of, round(float(likeness[index]), 3), text))
    near = len(unique) - len(kept)
    return kept, DuplicateReport(exact, near, threshold, examples)


def signatures(
    conversations: Iterator[Conversation], count: int, progress: Progress = lambda done: None
) -> Signatures:
    """The least shingle of each conversation under each order, [count, ORDERS].

    A conversation of fewer than 5 words is one shingle; one without words is like nothing else.
    """
    out = np.zeros((count, ORDERS), np.uint32)
    batch: list[NDArray[np.uint32]] = []
    held = done = 0

    def flush() -> None:
        starts = np.cumsum([0, *(len(one) for one in batch[:-1])])
        shingles = np.concatenate(batch)
        rows = out[done - len(batch) : done]
        for order, multiplier in enumerate(_MULTIPLIERS):
            rows[:, order] = np.minimum.reduceat(shingles * multiplier, starts)
        batch.clear()
        progress(done)

    for done, conversation in enumerate(conversations, 1):
        batch.append(_shingles(conversation, done))
        held += len(batch[-1])
        if held > _BATCH:
            flush()
            held = 0
    if batch:
        flush()
    return out


def near_duplicates(
    made: Signatures, threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each row the first earlier row that is alike (itself if none is), and how alike it is.

    Likeness is the estimate above; the earlier row may in turn be like one before it.
    """
    count = len(made)
    rows = np.arange(count)
    first, likeness = rows.copy(), np.zeros(count)
    width = ORDERS // BANDS
    for band in range(BANDS):
        minima = np.ascontiguousarray(made[:, band * width : (band + 1) * width])
        keys = minima.view(f"V{minima.itemsize * width}").ravel()
        _, members, bucket = np.unique(keys, return_index=True, return_inverse=True)
        leaders = members[bucket]
        pairs = np.flatnonzero((leaders < rows) & (leaders < first))
        alike = (made[pairs] == made[leaders[pairs]]).mean(axis=1)
        found = alike >= threshold
        first[pairs[found]] = leaders[pairs[found]]
        likeness[pairs[found]] = alike[found]
    return first, likeness


def _shingles(conversation: Conversation, number: int) -> NDArray[np.uint32]:
    words = word_numbers("\n".join(message["content"] for message in conversation))
    if not len(words):
        words = np.array([number], np.uint64)  # its own alone
    if len(words) < SHINGLE:
        words = np.pad(words, (0, SHINGLE - len(words)))
    return (run_numbers(words, SHINGLE) >> np.uint64(32)).astype(np.uint32)


def _digest(conversation: Conversation) -> bytes:
    parts = [text for turn in conversation for text in (turn["role"], turn["content"])]
    normalised = "\0".join(" ".join(part.lower().split()) for part in parts)
    return hashlib.sha256(normalised.encode()).digest()
