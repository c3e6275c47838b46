"""Answers said anew by the target, so that a draft learns from what it will have to foresee.

Only the system's and the user's turns of a conversation are kept; after each turn of the user the
target answers, in the context of what it has answered before. Questions of many conversations are
open at once, and a conversation's next question goes to the head of the queue: the generator always
has a full batch, and conversations finish early. Temperature and seeds are functions of the
conversation's text, so the answers do not depend on order or on interruptions.

Finished conversations are appended to a partial file, one JSON object a line behind a header with
the settings. A run that was stopped goes on from there.

An answer that reached its length limit ends its conversation, marked ``finish_reason`` "length".
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from aquiline.core.errors import DataError
from aquiline.core.params import MAX_SEED
from aquiline.training.conversations import CUT, Conversation, Entry, Message

Finish = Literal["stop", "length", "refused"]


@dataclass(frozen=True)
class RegenerationSettings:
    """What the answers depend on; a partial file made with others is refused.

    Attributes:
        temperatures: each conversation has one of them throughout.
        max_tokens: of one answer.
        max_length: tokens of a conversation, which ends there.
    """

    target: str
    temperatures: tuple[float, ...]
    top_p: float
    max_tokens: int
    max_length: int
    seed: int


@dataclass(frozen=True)
class Ask:
    """A question in its context: ``messages`` end in a turn of the user's."""

    key: str
    messages: Conversation
    temperature: float
    seed: int


@dataclass(frozen=True)
class Answer:
    """What the target said. ``refused``: the context is full, or the template forbids it."""

    text: str
    tokens: int
    finish: Finish


class Answerer(Protocol):
    """Answers all of the queue, in any order; more may be put there after each answer."""

    def __call__(self, asks: deque[Ask], /) -> Iterator[tuple[Ask, Answer]]: ...


@dataclass(frozen=True)
class RegenerationReport:
    """What ``regenerate`` did.

    Attributes:
        resumed: conversations that an earlier run had finished.
        tokens: of the answers, end tokens included.
        cut: answers that reached ``max_tokens``; each ends its conversation.
        refused: conversations that ended because a question could not be asked.
        empty: conversations dropped because nothing was answered.
        temperatures: conversations by temperature.
    """

    conversations: int
    resumed: int
    answers: int
    tokens: int
    cut: int
    refused: int
    empty: int
    temperatures: Mapping[str, int]


def questions(conversation: Conversation) -> Conversation:
    """What is kept of a conversation: the turns of the system and of the user."""
    return [turn for turn in conversation if turn["role"] in ("system", "user")]


def regenerate(
    entries: Sequence[Entry],
    answer: Answerer,
    settings: RegenerationSettings,
    partial: Path,
    progress: Callable[[int, int], None] = lambda conversations, tokens: None,
) -> tuple[list[Entry], RegenerationReport]:
    """The entries with the target's answers, in order.

    Args:
        partial: kept after the end; delete it when the result is safe.
        progress: called with the conversations finished and the tokens answered in this run.

    Raises:
        DataError: ``partial`` is of other settings, or damaged.
    """
    keys = [_key(entry.conversation) for entry in entries]
    done = _resume(partial, settings)
    resumed = len(done.keys() & set(keys))
    waiting = {
        key: _Dialogue(key, questions(entry.conversation), settings)
        for key, entry in zip(keys, entries, strict=True)
        if key not in done
    }
    asks = deque(ask for one in waiting.values() if (ask := one.ask()) is not None)
    finished, tokens = resumed, 0
    progress(finished, tokens)
    with partial.open("a", encoding="utf-8") as file:
        for ask, reply in answer(asks):
            dialogue = waiting[ask.key]
            dialogue.take(reply)
            tokens += reply.tokens
            if (following := dialogue.ask()) is not None:
                asks.appendleft(following)
                continue
            done[ask.key] = record = waiting.pop(ask.key).record()
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            finished += 1
            progress(finished, tokens)
    records = {key: done[key] for key in keys if key in done}
    kept = [
        Entry(entry.number, records[key]["messages"])
        for key, entry in zip(keys, entries, strict=True)
        if key in records and records[key]["messages"]
    ]
    return kept, _report(list(records.values()), resumed)


class _Dialogue:
    """A conversation under way: what was said, and the turns that are still to be asked."""

    def __init__(self, key: str, turns: Conversation, settings: RegenerationSettings) -> None:
        self.key, self.seed = key, settings.seed
        self.temperature = settings.temperatures[int(key, 16) % len(settings.temperatures)]
        self.turns = deque(turns)
        self.history: Conversation = []
        self.answers = self.tokens = 0
        self.refused = False

    def ask(self) -> Ask | None:
        """The next question; None if there is none left."""
        if not any(turn["role"] == "user" for turn in self.turns):
            return None
        while True:
            turn = self.turns.popleft()
            self.history.append(turn)
            if turn["role"] == "user":
                break
        digest = hashlib.sha256(f"{self.key} {self.answers} {self.seed}".encode()).digest()
        seed = int.from_bytes(digest[:8], "big") & MAX_SEED
        return Ask(self.key, list(self.history), self.temperature, seed)

    def take(self, reply: Answer) -> None:
        """Add an answer; a cut or refused one ends the conversation."""
        message: Message = {"role": "assistant", "content": reply.text}
        if reply.finish == "length":  # may end inside a character
            message = {"role": "assistant", "content": reply.text.rstrip("\ufffd"), **CUT}
        self.tokens += reply.tokens
        self.refused = reply.finish == "refused"
        if self.refused or (reply.finish == "length" and not message["content"].strip()):
            while self.history and self.history[-1]["role"] != "assistant":
                self.history.pop()
        else:
            self.history.append(message)
            self.answers += 1
        if reply.finish != "stop":
            self.turns.clear()

    def record(self) -> dict[str, Any]:
        return {
            "id": self.key, "messages": self.history, "temperature": self.temperature,
            "tokens": self.tokens, "refused": self.refused,
        }  # fmt: skip


def _key(conversation: Conversation) -> str:
    """A digest of what the user and the system say; in hexadecimal."""
    turns = [[turn["role"], turn["content"]] for turn in questions(conversation)]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:32]


def _resume(partial: Path, settings: RegenerationSettings) -> dict[str, dict[str, Any]]:
    """Records of the partial file by id; a torn last line is cut off, a new file is begun."""
    header = json.dumps({"settings": asdict(settings)})
    content = partial.read_bytes() if partial.exists() else b""
    whole = content.rfind(b"\n") + 1
    if not whole:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(header + "\n", encoding="utf-8")
        return {}
    first, *lines = content[:whole].splitlines()
    if first != header.encode():
        raise DataError(
            f"{partial}: begun with other settings ({first[:400].decode(errors='replace')}); give "
            "the same ones, or delete it"
        )
    try:
        records = {record["id"]: record for record in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{partial}: damaged ({error}); delete it") from None
    if whole < len(content):
        with partial.open("r+b") as file:
            file.truncate(whole)
    return records


def _report(records: Sequence[Mapping[str, Any]], resumed: int) -> RegenerationReport:
    said = [turn for record in records for turn in record["messages"]]
    answers = [turn for turn in said if turn["role"] == "assistant"]
    return RegenerationReport(
        conversations=sum(bool(record["messages"]) for record in records),
        resumed=resumed,
        answers=len(answers),
        tokens=sum(record["tokens"] for record in records),
        cut=sum(CUT.items() <= turn.items() for turn in answers),
        refused=sum(record["refused"] for record in records),
        empty=sum(not record["messages"] for record in records),
        temperatures=dict(Counter(str(record["temperature"]) for record in records)),
    )
