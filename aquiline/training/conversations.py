"""Conversations: the unit of training data, on disk one JSON object a line.

A conversation is a list of ``{"role", "content"}`` messages with at least one assistant turn. Two
layouts are read, OpenAI's (``{"messages": [{"role", "content"}]}``) and ShareGPT's
(``{"conversations": [{"from", "value"}]}``); only the first is written. Reading is strict: the
first line that cannot be used stops it, because a corpus that silently lost lines is a result that
cannot be repeated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from aquiline.core.errors import DataError

Message = dict[str, str]
Conversation = list[Message]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_LAYOUTS = {"messages": ("role", "content"), "conversations": ("from", "value")}


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """Yield the conversations of a JSONL file in order; blank lines are skipped.

    Fields beside the layout's own are ignored.

    Raises:
        DataError: at the first line that is not a usable conversation.
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
                yield _conversation(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}; fix or delete the line") from None


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
    layouts = [key for key in _LAYOUTS if isinstance(record, dict) and key in record]
    if len(layouts) != 1:
        raise ValueError("expected an object with either 'messages' or 'conversations'")
    turns = record[layouts[0]]
    if not isinstance(turns, list):
        raise ValueError(f"'{layouts[0]}' must be a list")
    conversation = [_message(turn, *_LAYOUTS[layouts[0]]) for turn in turns]
    if not any(message["role"] == "assistant" for message in conversation):
        raise ValueError("no assistant turn to learn from")
    if conversation[0]["role"] == "assistant":
        raise ValueError("the first turn is the assistant's, which answers nothing")
    return conversation


def _message(turn: object, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"a message must be an object, not {type(turn).__name__}")
    role, content = turn.get(role_key), turn.get(content_key)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{role_key}={role!r} is none of {sorted(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"'{content_key}' must be a string, not {type(content).__name__}")
    if not _encodable(content):
        raise ValueError(f"'{content_key}' holds half of a UTF-16 surrogate pair")
    return {"role": ROLES[role], "content": content}


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
