"""CallReader: calls in the text of a model that was free to make them, as it streams.

What may be (the beginning of) a call is held back until the text has ended; what turns out to be
none is text after all. So a call arrives in one piece.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from aquiline.server.tools.formats import FORMATS, ToolFormat

PYTHON_TAG = "<|python_tag|>"
_DECODER = json.JSONDecoder()
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.S)


@dataclass(frozen=True)
class Call:
    """``arguments``: a JSON object as text."""

    name: str
    arguments: str

    def as_json(self, index: int | None = None) -> dict[str, Any]:
        """In OpenAI's form, with an id of its own; ``index`` for chunks."""
        function = {"name": self.name, "arguments": self.arguments}
        call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        return call if index is None else {"index": index, **call}


def call_of(value: object, names: Collection[str]) -> Call:
    """A call from its parsed JSON; raises ValueError if it is none of a function in ``names``."""
    if isinstance(value, dict) and value.get("name") in names:
        arguments = value.get("arguments", value.get("parameters"))
        if isinstance(arguments, dict):
            return Call(value["name"], json.dumps(arguments, ensure_ascii=False))
    raise ValueError("not a call")


class CallReader:
    """Reads one text.

    Args:
        names: the functions that exist.
        most: calls to return at most.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], most: int | None = None) -> None:
        self._tagged = form is FORMATS["hermes"]
        self._names, self._most = names, most
        self._held, self._passing = "", False

    def feed(self, text: str) -> str:
        """Take in new text; return what is certainly not part of a call."""
        self._held += text
        keep = self._start_of_call() if self._tagged else self._start_of_json()
        shown, self._held = self._held[:keep], self._held[keep:]
        return shown

    def finish(self) -> tuple[str, list[Call]]:
        """The text has ended: the rest of it, and the calls."""
        try:
            rest, calls = self._tags() if self._tagged else ("", list(self._objects()))
        except (ValueError, RecursionError):
            return self._held, []
        return rest, calls[: self._most]

    def _start_of_call(self) -> int:
        tag = "<tool_call>"
        at = self._held.find(tag)
        if at >= 0:
            return at
        sizes = range(min(len(tag) - 1, len(self._held)), 0, -1)
        return len(self._held) - next((n for n in sizes if tag.startswith(self._held[-n:])), 0)

    def _start_of_json(self) -> int:
        start = self._held.lstrip()
        may_be = start.startswith("{") or PYTHON_TAG.startswith(start[: len(PYTHON_TAG)])
        self._passing = self._passing or not may_be
        return len(self._held) if self._passing else 0

    def _tags(self) -> tuple[str, list[Call]]:
        bodies = _TAGGED.findall(self._held)
        calls = [call_of(json.loads(body), self._names) for body in bodies]
        return _TAGGED.sub("", self._held).strip() if calls else self._held, calls

    def _objects(self) -> Iterator[Call]:
        text, at = self._held.strip().removeprefix(PYTHON_TAG), 0
        if not text:
            raise ValueError("no text, no call")
        while at < len(text):
            at += len(text[at:]) - len(text[at:].lstrip(" \n;"))
            value, at = _DECODER.raw_decode(text, at)
            yield call_of(value, self._names)
            at += len(text[at:]) - len(text[at:].lstrip(" \n;"))
