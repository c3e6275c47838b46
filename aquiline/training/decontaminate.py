"""Keep benchmark prompts out of the training data.

A draft trained on the questions it is judged by accepts too much. A conversation is dropped if it
shares a run of ``n`` words with a benchmark. Words are lower-case and alphanumeric, runs never
cross from one message to the next. Two rules keep generic phrases from matching: a run counts only
if at least half of it are different words, numbers and single letters aside (so "1, 2, 3, ..." does
not), and a benchmark text shorter than ``n`` words counts only where it is a whole message.

Runs are looked up as numbers (``training.words``), all of a conversation at once; only one that is
found so is compared word by word.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aquiline.core.errors import DataError
from aquiline.training.conversations import Conversation, Entry
from aquiline.training.words import WORD, run_numbers, word_numbers

Gram = tuple[str, ...]
_FEWEST_WORDS = 3  # of a text of a benchmark file: ids and categories have fewer


class Hit(NamedTuple):
    """The benchmark a conversation touches, and the words they share."""

    benchmark: str
    ngram: str


@dataclass(frozen=True)
class Dropped:
    """One conversation that was dropped, ``number`` in its source."""

    number: int
    benchmark: str
    ngram: str


@dataclass(frozen=True)
class DecontaminationReport:
    """What ``decontaminate`` did.

    Attributes:
        benchmarks: by benchmark, conversations dropped for it; the first one hit is counted.
        dropped: every conversation dropped, in order.
    """

    n: int
    benchmarks: Mapping[str, int]
    dropped: Sequence[Dropped]


class Decontaminator:
    """Finds runs of ``n`` words that a conversation shares with a benchmark."""

    def __init__(self, texts_by_name: Mapping[str, Iterable[str]], n: int = 8) -> None:
        self.n = n
        self.names = tuple(texts_by_name)
        self._runs: dict[Gram, str] = {}
        self._short: dict[Gram, str] = {}
        for name, texts in texts_by_name.items():
            for text in texts:
                words = _words(text)
                if 0 < len(words) < n:
                    self._short.setdefault(tuple(words), name)
                for gram in filter(_specific, _grams(words, n)):
                    self._runs.setdefault(gram, name)
        # Every n-th run of the words of all grams, one gram after the other, is a gram.
        every = word_numbers(" ".join(word for gram in self._runs for word in gram))
        self._numbers = np.unique(
            np.append(run_numbers(every, n)[::n], np.uint64(0))
        )  # never empty

    def hit(self, conversation: Conversation) -> Hit | None:
        """The first benchmark text found in the conversation, or None."""
        suspect = self._suspect("\n".join(message["content"] for message in conversation))
        for message in conversation:
            text = message["content"].lower()
            start = tuple(match[0] for match in islice(WORD.finditer(text), self.n))
            if (name := self._short.get(start)) is not None:
                return Hit(name, " ".join(start))
            for gram in _grams(_words(text), self.n) if suspect else ():
                if gram in self._runs:
                    return Hit(self._runs[gram], " ".join(gram))
        return None

    def _suspect(self, text: str) -> bool:
        """Whether some run of the text has the number of a benchmark's."""
        runs = run_numbers(word_numbers(text), self.n)
        below = np.searchsorted(self._numbers, runs, side="right") - 1
        return bool((self._numbers[below] == runs).any())


def decontaminate(
    entries: Iterable[Entry],
    decontaminator: Decontaminator,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Entry], DecontaminationReport]:
    """The entries that touch no benchmark, in order, and what was dropped.

    ``progress`` is called with the number of entries looked at.
    """
    kept: list[Entry] = []
    dropped: list[Dropped] = []
    for done, entry in enumerate(entries, 1):
        if (hit := decontaminator.hit(entry.conversation)) is None:
            kept.append(entry)
        else:
            dropped.append(Dropped(entry.number, hit.benchmark, hit.ngram))
        progress(done)
    counts = Counter(dict.fromkeys(decontaminator.names, 0))
    counts.update(one.benchmark for one in dropped)
    return kept, DecontaminationReport(decontaminator.n, dict(counts), dropped)


def benchmark_file(path: Path) -> list[str]:
    """The texts of a benchmark: every string in a JSON or JSONL file, every line of another one.

    Strings of fewer than three words (ids, categories, answers) are left out.

    Raises:
        DataError: the file cannot be read, or holds no text.
    """
    try:
        content = path.read_text(encoding="utf-8")
        lines = [line for line in content.split("\n") if line.strip()]
        if path.suffix == ".jsonl":
            found = list(_strings([json.loads(line) for line in lines]))
        else:
            found = list(_strings(json.loads(content))) if path.suffix == ".json" else lines
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}; give a UTF-8 file: text, .json or .jsonl") from None
    texts = [text for text in found if len(_words(text)) >= _FEWEST_WORDS]
    if not texts:
        raise DataError(f"{path}: no text of {_FEWEST_WORDS} words or more; give a benchmark's")
    return texts


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _grams(words: list[str], n: int) -> Iterator[Gram]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def _specific(gram: Gram) -> bool:
    return 2 * len({word for word in gram if len(word) > 1 and not word.isdigit()}) >= len(gram)
