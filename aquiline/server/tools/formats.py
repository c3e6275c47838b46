"""ToolFormat: the two ways in which Llama models call functions.

    llama3_json   {"name": "f", "parameters": {...}}          after <|python_tag|> or not; ; between
    hermes        <tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>       ChatML models

The names are vLLM's. A chat template that takes tools shows them to the model itself. For one that
does not, ``instructions`` become the system message, or its end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aquiline.text.tokenizer import Tokenizer

INSTRUCTIONS = """\
You can call functions. These are their signatures, one JSON object a line:
<tools>
{tools}
</tools>
To call one, answer with a JSON object inside these tags, and nothing else:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>
What it returns comes back inside <tool_response> tags. Answer in words if no function is needed."""


@dataclass(frozen=True)
class ToolFormat:
    """
    Attributes:
        opening: what comes before the JSON object of a call.
        closing: what comes after it.
        arguments: the object's key for them.
    """

    opening: str
    closing: str
    arguments: str

    def call_schema(self, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The JSON schema of a call of one of ``tools`` (each {"name", "parameters"})."""
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool["name"]}, self.arguments: tool["parameters"]},
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        return calls[0] if len(calls) == 1 else {"anyOf": calls}


FORMATS = {
    "llama3_json": ToolFormat("", "", "parameters"),
    "hermes": ToolFormat("<tool_call>\n", "\n</tool_call>", "arguments"),
}


def format_of(tokenizer: Tokenizer, parser: str = "auto") -> ToolFormat:
    """The one of that name; "auto" goes by the chat template."""
    if parser != "auto":
        return FORMATS[parser]
    llama = tokenizer.template_takes_tools and "<|start_header_id|>" in tokenizer.chat_template
    return FORMATS["llama3_json" if llama else "hermes"]


def told_in_words(
    messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A conversation for a template that knows no tools: they are told in the system message, calls
    and results are text in hermes tags."""
    hermes = FORMATS["hermes"]
    told = [_in_words(message, hermes) for message in messages]
    if not tools:
        return told
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    instructions = INSTRUCTIONS.format(tools=lines)
    if told and told[0]["role"] == "system":
        first = {"role": "system", "content": f"{told[0]['content']}\n\n{instructions}"}
        return [first, *told[1:]]
    return [{"role": "system", "content": instructions}, *told]


def _in_words(message: dict[str, Any], hermes: ToolFormat) -> dict[str, Any]:
    if message["role"] == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content}
    calls = [
        hermes.opening + json.dumps(call["function"], ensure_ascii=False) + hermes.closing
        for call in message.get("tool_calls", ())
    ]
    return {
        "role": message["role"],
        "content": "\n".join(filter(None, [message["content"], *calls])),
    }
