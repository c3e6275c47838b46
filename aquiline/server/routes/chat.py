"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from aquiline.core.outputs import CompletionOutput, Delta
from aquiline.server import answers
from aquiline.server.protocol.chat import ChatRequest
from aquiline.server.routes.json_route import JsonRoute, Shared
from aquiline.server.serving import Job, Serving
from aquiline.server.streaming import EventStream, answered
from aquiline.server.tools.reading import Call
from aquiline.server.tools.request import ToolUse

NO_CALLS: list[Call] = []
router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def chat(body: ChatRequest, request: Request, serving: Shared) -> Response:
    """OpenAI's chat completion, in one piece or as a stream of chunks."""
    answer = Answer(body, serving)
    messages = [message.for_template() for message in body.messages]
    given = body.sampling()
    answer.tools.apply(given)
    params = serving.params(given)
    prompt = await serving.tokens(
        lambda: answer.tools.encode(messages, serving.tokenizer),
        sum(len(message["content"]) for message in messages),
    )
    (job,) = await serving.start(answer.id, [prompt], params)
    if body.stream:
        return EventStream(answer.chunks(job), [job])
    return await answered(request, answer.whole(job), [job])


class Answer:
    """Makes the answer to one request."""

    def __init__(self, body: ChatRequest, serving: Serving) -> None:
        self.body, self.serving = body, serving
        self.model = serving.model_name(body.model)
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.tools = ToolUse.of(body, serving.tokenizer, serving.settings.tool_call_parser)

    async def whole(self, job: Job) -> Response:
        """In one piece."""
        output = await job.last()
        answer = self._head("chat.completion")
        answer["choices"] = [self._choice(choice) for choice in output.outputs]
        answer["usage"] = answers.usage_of([output])
        if output.prompt_logprobs is not None:
            answer["prompt_logprobs"] = answers.prompt_logprobs(output.prompt_logprobs)
        if self.body.return_speculation:
            answer["speculation"] = answers.speculation([output])
        return JSONResponse(answer)

    async def chunks(self, job: Job) -> AsyncGenerator[dict[str, Any]]:
        """As they come: the role, texts and calls, how it ended, the usage."""
        options, tokens = self.body.stream_options, 0
        readers = [self.tools.reader() for _ in range(self.body.n)]
        for index in range(self.body.n):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async with aclosing(job.outputs()) as outputs:
            async for output in outputs:
                for delta in output.deltas:
                    tokens += len(delta.token_ids)
                    text, calls = readers[delta.index].feed(delta.text), NO_CALLS
                    if delta.finish_reason is not None:
                        rest, calls = readers[delta.index].finish()
                        text += rest
                    chunk = self._delta_chunk(delta, text, calls)
                    if options is not None and options.continuous_usage_stats:
                        chunk["usage"] = answers.usage(
                            job.prompt_tokens, output.num_cached_tokens, tokens
                        )
                    yield chunk
        if self.body.wants_last_chunk:
            last = self._head("chat.completion.chunk") | {"choices": []}
            last["usage"] = answers.usage(job.prompt_tokens, output.num_cached_tokens, tokens)
            if self.body.return_speculation:
                last["speculation"] = answers.speculation([output])
            yield last

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _delta_chunk(self, delta: Delta, text: str, calls: list[Call]) -> dict[str, Any]:
        shown: dict[str, Any] = {"content": text} if text or not calls else {}
        if calls:
            shown["tool_calls"] = [call.as_json(index) for index, call in enumerate(calls)]
        chunk = self._chunk(delta.index, shown, self._finish(delta.finish_reason, calls))
        (choice,) = chunk["choices"]
        if delta.logprobs is not None:
            choice["logprobs"] = self._logprobs(delta.logprobs)
        if self.body.return_speculation:
            choice |= answers.chunk_speculation(delta, self.serving.token_bytes)
        return chunk

    def _choice(self, choice: CompletionOutput) -> dict[str, Any]:
        reader = self.tools.reader()
        text = reader.feed(choice.text)
        rest, calls = reader.finish()
        message: dict[str, Any] = {
            "role": "assistant", "content": text + rest or (None if calls else ""), "refusal": None
        }  # fmt: skip
        if calls:
            message["tool_calls"] = [call.as_json() for call in calls]
        return {
            "index": choice.index, "message": message,
            "finish_reason": self._finish(choice.finish_reason, calls),
            "logprobs": choice.logprobs and self._logprobs(choice.logprobs),
        }  # fmt: skip

    def _finish(self, reason: str | None, calls: list[Call]) -> str | None:
        return "tool_calls" if calls and not self.tools.named else reason

    def _logprobs(self, logprobs: Any) -> dict[str, Any]:
        return answers.chat_logprobs(
            logprobs, self.body.top_logprobs or 0, self.serving.token_bytes
        )
