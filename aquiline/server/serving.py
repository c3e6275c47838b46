"""Serving: what all routes share. From a request's fields to a job that streams outputs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from aquiline.core.outputs import RequestOutput
from aquiline.core.params import SamplingParams
from aquiline.engine.async_llm import AsyncLLM, Stream
from aquiline.server import logs
from aquiline.server.errors import UnknownModel
from aquiline.server.metrics import Metrics, RequestMetrics
from aquiline.server.settings import Settings

LONG_TEXT = 16384  # characters; a longer one is tokenised beside the event loop


class Serving:
    """The model, its settings and its counters.

    Attributes:
        token_bytes: the bytes of every token; none for special ones.
    """

    def __init__(self, llm: AsyncLLM, settings: Settings) -> None:
        self.llm, self.settings, self.tokenizer = llm, settings, llm.tokenizer
        self.metrics = Metrics(settings.model_names[0])
        self.token_bytes = llm.tokenizer.token_bytes()
        self.created = int(time.time())
        llm.on_progress = self.metrics.progress
        self.metrics.restarts.set_function(lambda: llm.restarts)

    def model_name(self, asked: str | None) -> str:
        """The name that the answer carries; raises UnknownModel."""
        names = self.settings.model_names
        if asked is not None and asked not in names:
            raise UnknownModel(f"model: {asked!r} is not served; ask for {names[0]!r}")
        return asked or names[0]

    def params(self, given: Mapping[str, Any]) -> SamplingParams:
        """The checkpoint's defaults with what was given; raises AquilineError."""
        return self.llm.default_sampling_params(**given)

    async def tokens(self, encode: Callable[[], list[int]], characters: int) -> list[int]:
        """What ``encode`` makes of a text of so many characters."""
        return await asyncio.to_thread(encode) if characters > LONG_TEXT else encode()

    async def start(
        self, request_id: str, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Job]:
        """Queue prompts, all or none; raises AquilineError."""
        jobs: list[Job] = []
        try:
            for prompt in prompts:
                started = time.perf_counter()
                stream = await self.llm.submit(prompt, params)
                jobs.append(Job(self, request_id, stream, started))
        except BaseException:
            for job in jobs:
                job.close()
            raise
        return jobs


class Job:
    """One prompt being answered; counted and logged when it ends, aborted if it is closed early."""

    def __init__(self, serving: Serving, request_id: str, stream: Stream, started: float) -> None:
        self.stream, self.request_id, self._serving = stream, request_id, serving
        self._metrics = RequestMetrics(serving.metrics, self.prompt_tokens, started)
        self._last: RequestOutput | None = None
        self._closed = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.stream.prompt_token_ids)

    async def outputs(self) -> AsyncGenerator[RequestOutput]:
        """Step by step; raises EngineError if the request was given up."""
        try:
            async for output in self.stream:
                self._last = output
                self._metrics.output(output)
                yield output
        finally:
            self.close()

    async def last(self) -> RequestOutput:
        """The finished output."""
        return [output async for output in self.outputs()][-1]

    def close(self) -> None:
        """Abort, unless it has ended; tell the log."""
        if self._closed:
            return
        self._closed = True
        self.stream.abort()
        logs.request_ended(
            self.request_id, self.prompt_tokens, self._last, self._metrics.first,
            self._metrics.elapsed,
        )  # fmt: skip
        if self._serving.settings.log_requests and self._last is not None:
            prompt = self._serving.tokenizer.decode(self.stream.prompt_token_ids, False)
            logs.request_texts(self.request_id, prompt, self._last)
