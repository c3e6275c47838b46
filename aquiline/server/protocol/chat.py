"""/v1/chat/completions: conversations, tools, response formats."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from aquiline.core.errors import AquilineError
from aquiline.core.guided_params import StructuredOutput
from aquiline.core.params import MAX_LOGPROBS
from aquiline.server.protocol.body import ANY, Body
from aquiline.server.protocol.sampling import COMMON_NO_OPS, SamplingFields, ranged


class TextPart(Body):
    """Of a message's content; other kinds of parts are refused."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """``arguments`` is a JSON object as text, as in OpenAI's protocol."""

    name: str
    arguments: str = "{}"


class ToolCall(Body):
    """A call that an assistant made."""

    no_ops = {"index": ANY}
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """``developer`` is a system message by its newer name."""

    no_ops = {"refusal": ANY, "annotations": ANY}
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: arguments as objects, text in one piece."""
        if self.content is None and not self.tool_calls:
            raise AquilineError("messages.content: it is missing; give a text")
        content = self.content or ""
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": _called(call.function)}
                for call in self.tool_calls
            ]
        for name in ("name", "tool_call_id"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        return message


def _called(function: CalledFunction) -> dict[str, Any]:
    try:
        arguments = json.loads(function.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise AquilineError("messages.tool_calls.function.arguments: give a JSON object as text")
    return {"name": function.name, "arguments": arguments}


class Function(Body):
    """``parameters`` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: bool = False


class Tool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """In OpenAI's form."""
        function = self.function
        shown = {"name": function.name, "description": function.description}
        return {"type": "function", "function": {**shown, "parameters": function.parameters}}


class FunctionName(Body):
    """Names one of the tools."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(Body):
    """A schema that the answer must fit; ``strict`` changes nothing, it always must."""

    no_ops = {"strict": (True, False)}
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    """``json_schema`` goes with the type of that name."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(SamplingFields):
    """A conversation to answer."""

    no_ops = COMMON_NO_OPS | {"modalities": (["text"],), "add_special_tokens": (False,)}
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = ranged(None, 0, MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True

    def sampling(self) -> dict[str, Any]:
        """As arguments of SamplingParams."""
        given = super().sampling()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise AquilineError("max_tokens: give it or max_completion_tokens, not both")
        limit = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        given["max_tokens"] = limit  # None: up to the context's end
        if self.top_logprobs is not None and not self.logprobs:
            raise AquilineError("top_logprobs: it goes with logprobs=true; add that")
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        form = self._response_form()
        if form is not None:
            if "structured_outputs" in given:
                raise AquilineError("response_format: give it, or structured_outputs, not both")
            given["structured_outputs"] = form
        return given

    def _response_form(self) -> StructuredOutput | None:
        wanted = self.response_format
        if wanted is None:
            return None
        if (wanted.type == "json_schema") != (wanted.json_schema is not None):
            raise AquilineError("response_format.json_schema: it goes with type='json_schema'")
        if wanted.json_schema is not None:
            return StructuredOutput(json=wanted.json_schema.schema_)
        return StructuredOutput(json_object=True) if wanted.type == "json_object" else None
