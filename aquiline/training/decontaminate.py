"""Keep benchmark prompts, and copies, out of the training data.

A draft trained on the questions it is judged by accepts too much. A conversation is dropped if it
shares a run of ``n`` words with a benchmark. Words are lower-case and alphanumeric, runs never
cross from one message to the next. Two rules keep generic phrases from matching: a run counts only
if at least half of it are different words, numbers and single letters aside (so "1, 2, 3, ..." does
not), and a benchmark text shorter than ``n`` words counts only where it is a whole message.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from aquiline.training.conversations import Conversation

Gram = tuple[str, ...]
_WORD = re.compile(r"[^\W_]+")
_EXAMPLES = 5


class Hit(NamedTuple):
    """The benchmark a conversation touches, and the words they share."""

    benchmark: str
    ngram: str


@dataclass(frozen=True)
class DecontaminationReport:
    """What ``decontaminate`` did.

    Attributes:
        kept: conversations that remain.
        duplicates: exact copies (after normalisation) of an earlier conversation.
        dropped: by benchmark, conversations dropped for it; the first benchmark hit is counted.
        examples: by benchmark, the first few shared runs of words.
    """

    kept: int
    duplicates: int
    dropped: Mapping[str, int]
    examples: Mapping[str, tuple[str, ...]]


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

    def hit(self, conversation: Conversation) -> Hit | None:
        """The first benchmark text found in the conversation, or None."""
        for message in conversation:
            words = _words(message["content"])
            if (name := self._short.get(tuple(words))) is not None:
                return Hit(name, " ".join(words))
            for gram in _grams(words, self.n):
                if gram in self._runs:
                    return Hit(self._runs[gram], " ".join(gram))
        return None


def decontaminate(
    conversations: Iterable[Conversation], decontaminator: Decontaminator
) -> tuple[list[Conversation], DecontaminationReport]:
    """The conversations that touch no benchmark, each text once, in order; and what was dropped."""
    kept: list[Conversation] = []
    seen: set[bytes] = set()
    duplicates = 0
    dropped: Counter[str] = Counter(dict.fromkeys(decontaminator.names, 0))
    examples: dict[str, list[str]] = {name: [] for name in decontaminator.names}
    for conversation in conversations:
        digest = _digest(conversation)
        if digest in seen:
            duplicates += 1
            continue
        seen.add(digest)
        hit = decontaminator.hit(conversation)
        if hit is None:
            kept.append(conversation)
            continue
        dropped[hit.benchmark] += 1
        if len(examples[hit.benchmark]) < _EXAMPLES:
            examples[hit.benchmark].append(hit.ngram)
    frozen = {name: tuple(found) for name, found in examples.items()}
    return kept, DecontaminationReport(len(kept), duplicates, dict(dropped), frozen)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(words: list[str], n: int) -> Iterator[Gram]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def _specific(gram: Gram) -> bool:
    return 2 * len({word for word in gram if len(word) > 1 and not word.isdigit()}) >= len(gram)


def _digest(conversation: Conversation) -> bytes:
    parts = [text for turn in conversation for text in (turn["role"], turn["content"])]
    normalised = "\0".join(" ".join(part.lower().split()) for part in parts)
    return hashlib.sha256(normalised.encode()).digest()
