"""Conversations: the unit of training data, on disk one JSON object a line.

A conversation is a list of ``{"role", "content"}`` messages. Three layouts are read: OpenAI's
(``{"messages": [{"role", "content"}]}``), ShareGPT's (``{"conversations": [{"from", "value"}]}``)
and prompts (``{"prompt": text or list of user turns}``, or such a list alone); only the first is
written. A line is a conversation, or it is rejected: malformed (not JSON, not UTF-8, no known
layout), or well-formed but of no use (calls of tools, pictures, nothing to learn from). Whether a
rejected line stops the reading or is counted is the reader's caller's choice; no line is lost
silently.

Contents that are lists of text parts are joined by line breaks. Results of tools (``tool``,
``function``, ``observation``) are context like a user's turn; an assistant's turn that calls a tool
is not text, and its conversation is of no use.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aquiline.core.errors import DataError

Message = dict[str, str]  # "role", "content"; "finish_reason": "length" on a turn that was cut
Conversation = list[Message]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
CUT = {"finish_reason": "length"}
_LAYOUTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_CALLS = ("tool_calls", "function_call")


class Entry(NamedTuple):
    """A conversation and its line (or element) in the source, from 1."""

    number: int
    conversation: Conversation


class Rejected(NamedTuple):
    """A line that is no usable conversation, and why."""

    number: int
    reason: str
    malformed: bool

    def error(self, path: str | Path) -> DataError:
        """The line as an error with its remedy."""
        remedy = "fix or delete the line"
        if not self.malformed:
            remedy = "delete the line, or have aquiline data leave it out"
        return DataError(f"{path}:{self.number}: {self.reason}; {remedy}")


class _UselessError(Exception):
    """Well-formed, but nothing that a draft can be trained on."""


def read_entries(path: str | Path) -> Iterator[Entry | Rejected]:
    """Yield what each line of a JSONL file holds, in order; blank lines are passed over.

    Fields beside the layout's own are ignored. An entry may lack an assistant's turn: see ``flaw``.

    Raises:
        DataError: the file cannot be read.
    """
    path = Path(path)
    try:
        lines = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a readable JSONL file") from None
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield Entry(number, _conversation(line))
            except ValueError as error:
                yield Rejected(number, str(error), malformed=True)
            except _UselessError as error:
                yield Rejected(number, str(error), malformed=False)


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """Yield the conversations of a JSONL file in order, strictly.

    Raises:
        DataError: at the first line that is not a conversation to learn from.
    """
    for item in read_entries(path):
        if isinstance(item, Entry) and (reason := flaw(item.conversation)):
            item = Rejected(item.number, reason, malformed=False)
        if isinstance(item, Rejected):
            raise item.error(path)
        yield item.conversation


def flaw(conversation: Conversation) -> str | None:
    """Why nothing can be learnt from a conversation, or None."""
    if not any(message["role"] == "assistant" for message in conversation):
        return "no assistant turn to learn from"
    if conversation[0]["role"] == "assistant":
        return "the first turn is the assistant's, which answers nothing"
    return None


def write_conversations(path: str | Path, conversations: Iterable[Conversation]) -> int:
    """Write conversations as JSONL in OpenAI's layout and return their number.

    The file appears whole or not at all: an error while writing leaves what was there before. Its
    folder is made if it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for conversation in conversations:
                file.write(json.dumps({"messages": conversation}, ensure_ascii=False) + "\n")
                count += 1
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _conversation(line: bytes) -> Conversation:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start} of the line") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"invalid JSON ({error})") from None
    if isinstance(record, list):
        return _prompt(record)
    layouts = [key for key in (*_LAYOUTS, "prompt") if isinstance(record, dict) and key in record]
    if len(layouts) != 1:
        raise ValueError("expected an object with one of 'messages', 'conversations' or 'prompt'")
    turns = record[layouts[0]]
    if layouts[0] == "prompt":
        return _prompt([turns] if isinstance(turns, str) else turns)
    if not isinstance(turns, list):
        raise ValueError(f"'{layouts[0]}' must be a list")
    return [_message(turn, *_LAYOUTS[layouts[0]]) for turn in turns]


def _prompt(turns: Any) -> Conversation:
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise ValueError("a prompt must be a text or a list of the user's turns")
    return [{"role": "user", "content": _clean(turn, "prompt")} for turn in turns]


def _message(turn: object, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"a message must be an object, not {type(turn).__name__}")
    role, content = turn.get(role_key), turn.get(content_key)
    if role in _CALLS or any(turn.get(key) for key in _CALLS):
        raise _UselessError("an assistant turn calls a tool")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{role_key}={role!r} is none of {sorted(ROLES)}")
    message = {"role": ROLES[role], "content": _clean(_text(content, content_key), content_key)}
    if role == "assistant" and turn.get("finish_reason") == "length":
        message |= CUT
    return message


def _text(content: object, key: str) -> str:
    """A string as it is; a list of text parts joined by line breaks."""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and part.get("type") != "text":
            raise _UselessError("a message holds more than text")
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise ValueError(f"'{key}' must be a string, not {type(text).__name__}")
        texts.append(text)
    return "\n".join(texts)


def _clean(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"'{key}' holds half of a UTF-16 surrogate pair") from None
    return text
