"""ToolUse: what a chat request's tools ask for, decided once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from aquiline.core.errors import AquilineError
from aquiline.core.guided_params import StructuredOutput
from aquiline.server.protocol.chat import ChatRequest, NamedTool
from aquiline.server.tools.formats import FORMATS, ToolFormat, format_of, told_in_words
from aquiline.server.tools.reading import Call, CallReader, call_of
from aquiline.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolUse:
    """
    Attributes:
        shown: the tools that the model is told of, in OpenAI's form.
        forced: the functions one of which must be called; none leaves the model free.
        named: a tool was named, so that the answer ends with "stop", not "tool_calls".
        most: calls to return at most; None is any number.
    """

    form: ToolFormat
    shown: tuple[dict[str, Any], ...]
    forced: tuple[dict[str, Any], ...] = ()
    named: bool = False
    most: int | None = None

    @classmethod
    def of(cls, body: ChatRequest, tokenizer: Tokenizer, parser: str) -> ToolUse:
        """Raises AquilineError if the fields do not fit together."""
        form = format_of(tokenizer, parser)
        tools = tuple(tool.for_template() for tool in body.tools)
        names = [tool.function.name for tool in body.tools]
        choice = body.tool_choice
        if not tools and choice not in (None, "none"):
            raise AquilineError("tool_choice: there are no tools; give some")
        if len(set(names)) < len(names):
            raise AquilineError("tools: two have the same name; rename one")
        most = None if body.parallel_tool_calls else 1
        if not tools or choice == "none":
            return cls(form, ())
        if choice in (None, "auto"):
            if any(tool.function.strict for tool in body.tools):
                raise AquilineError(
                    "tools.function.strict: only a tool that must be called is held to its schema; "
                    "set tool_choice, or strict=false"
                )
            return cls(form, tools, most=most)
        forced = tuple(tool["function"] for tool in tools)
        if isinstance(choice, NamedTool):
            forced = tuple(one for one in forced if one["name"] == choice.function.name)
            if not forced:
                raise AquilineError(
                    f"tool_choice: there is no tool {choice.function.name!r}; name one of them"
                )
        return cls(form, tools, forced, isinstance(choice, NamedTool))

    def encode(self, messages: list[dict[str, Any]], tokenizer: Tokenizer) -> list[int]:
        """The prompt: the conversation, the tools, and how a call that must be made begins."""
        if tokenizer.template_takes_tools:
            text = tokenizer.render_chat(messages, tools=self.shown or None)
        else:
            text = tokenizer.render_chat(told_in_words(messages, self.shown))
        return tokenizer.encode(text + self.form.opening if self.forced else text, False)

    def apply(self, given: dict[str, Any]) -> None:
        """Change the arguments of SamplingParams as the tools need it."""
        if self.forced:
            if "structured_outputs" in given:
                raise AquilineError("tool_choice: a response format leaves no room for a call")
            schema = self.form.call_schema(self.forced)
            given["structured_outputs"] = StructuredOutput(json=schema)
        elif self.shown and self.form is FORMATS["hermes"]:
            given["skip_special_tokens"] = False  # its tags may be special tokens

    def reader(self) -> Reader:
        """For one text."""
        names = [tool["function"]["name"] for tool in self.shown]
        if self.forced:
            return _ForcedReader(names)
        return CallReader(self.form, names, self.most) if self.shown else _PlainReader()


class _PlainReader:
    """No tools: all is text."""

    def feed(self, text: str) -> str:
        return text

    def finish(self) -> tuple[str, list[Call]]:
        return "", []


class _ForcedReader:
    """The grammar made the whole text a call; one that was cut off stays text."""

    def __init__(self, names: list[str]) -> None:
        self._names, self._text = names, ""

    def feed(self, text: str) -> str:
        self._text += text
        return ""

    def finish(self) -> tuple[str, list[Call]]:
        try:
            return "", [call_of(json.loads(self._text), self._names)]
        except ValueError:
            return self._text, []


Reader = CallReader | _PlainReader | _ForcedReader
