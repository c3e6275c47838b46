"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from aquiline.core.outputs import Logprobs, RequestOutput
from aquiline.server import answers
from aquiline.server.protocol.completions import CompletionRequest
from aquiline.server.routes.json_route import JsonRoute, Shared
from aquiline.server.serving import Job, Serving
from aquiline.server.streaming import EventStream, answered, merged

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions", summary="Continue texts")
async def completions(body: CompletionRequest, request: Request, serving: Shared) -> Response:
    """OpenAI's completion; the choices of several prompts follow each other."""
    answer = Answer(body, serving)
    params = serving.params(body.sampling())
    prompts = [await _tokens(prompt, body, serving) for prompt in body.prompts()]
    jobs = await serving.start(answer.id, prompts, params)
    if body.stream:
        return EventStream(answer.chunks(jobs), jobs)
    return await answered(request, answer.whole(jobs), jobs)


async def _tokens(prompt: str | list[int], body: CompletionRequest, serving: Serving) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    special = body.add_special_tokens
    return await serving.tokens(lambda: serving.tokenizer.encode(prompt, special), len(prompt))


class Answer:
    """Makes the answer to one request."""

    def __init__(self, body: CompletionRequest, serving: Serving) -> None:
        self.body, self.serving = body, serving
        self.model = serving.model_name(body.model)
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())

    async def whole(self, jobs: list[Job]) -> Response:
        """In one piece."""
        outputs = await asyncio.gather(*(job.last() for job in jobs))
        choices = [
            self._choice(
                place * self.body.n + one.index, one.text, one.finish_reason, one.logprobs, 0
            )
            for place, output in enumerate(outputs)
            for one in output.outputs
        ]
        for output, choice in zip(outputs, choices[:: self.body.n], strict=True):
            if output.prompt_logprobs is not None:
                choice["prompt_logprobs"] = answers.prompt_logprobs(output.prompt_logprobs)
        answer = self._head() | {"choices": choices, "usage": answers.usage_of(outputs)}
        if self.body.return_speculation:
            answer["speculation"] = answers.speculation(outputs)
        return JSONResponse(answer)

    async def chunks(self, jobs: list[Job]) -> AsyncGenerator[dict[str, Any]]:
        """As they come, the usage last."""
        options, tokens, latest = self.body.stream_options, 0, dict[int, RequestOutput]()
        prompt_tokens = sum(job.prompt_tokens for job in jobs)
        offsets: dict[int, int] = {}

        def usage() -> dict[str, Any]:
            cached = sum(output.num_cached_tokens for output in latest.values())
            return answers.usage(prompt_tokens, cached, tokens)

        async with aclosing(merged(jobs)) as outputs:
            async for place, output in outputs:
                latest[place] = output
                for delta in output.deltas:
                    tokens += len(delta.token_ids)
                    index = place * self.body.n + delta.index
                    at = offsets.setdefault(index, 0)
                    choice = self._choice(
                        index, delta.text, delta.finish_reason, delta.logprobs, at
                    )
                    for position in delta.logprobs or ():
                        offsets[index] += len(next(iter(position.values())).decoded_token)
                    if self.body.return_speculation:
                        choice |= answers.chunk_speculation(delta, self.serving.token_bytes)
                    chunk = self._head() | {"choices": [choice]}
                    if options is not None and options.continuous_usage_stats:
                        chunk["usage"] = usage()
                    yield chunk
        if self.body.wants_last_chunk:
            last = self._head() | {"choices": []}
            last["usage"] = usage()
            if self.body.return_speculation:
                last["speculation"] = answers.speculation([latest[at] for at in sorted(latest)])
            yield last

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id, "object": "text_completion", "created": self.created,
            "model": self.model,
        }  # fmt: skip

    def _choice(
        self,
        index: int,
        text: str,
        finish_reason: str | None,
        logprobs: tuple[Logprobs, ...] | None,
        offset: int,
    ) -> dict[str, Any]:
        return {
            "index": index, "text": text, "finish_reason": finish_reason,
            "logprobs": None if logprobs is None else answers.text_logprobs(logprobs, offset),
        }  # fmt: skip
