"""AsyncLLM: requests that stream, from an engine in a process of its own.

If that process ends, another is started and every running request goes on there: it is submitted
again with the seed it had and what it has said, and the seed contract makes the rest of the text
the same. A request that was running in two processes that ended is given up.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from aquiline.core.errors import AquilineError, CheckpointError, EngineError
from aquiline.core.outputs import RequestOutput
from aquiline.core.params import MAX_SEED, SamplingParams
from aquiline.engine.config import DtypeName, EngineConfig
from aquiline.engine.loader import Loader, load
from aquiline.engine.messages import (
    Abort,
    Admitted,
    Failed,
    Progress,
    Ready,
    Refused,
    Report,
    Submit,
)
from aquiline.engine.process import EngineProcess
from aquiline.engine.transcript import Transcript
from aquiline.models.registry import resolve
from aquiline.text.tokenizer import load_tokenizer

MAX_DEATHS = 2  # of the engine under one request
RESTART_SECONDS = (0, 1, 2, 5, 15, 60)  # before the n-th restart in a row that does not get ready
log = logging.getLogger(__name__)


class AsyncLLM:
    """A model in an engine process.

        async with AsyncLLM("smollm2-135m-instruct") as llm:
            async for output in llm.generate("Once", SamplingParams(max_tokens=8)):
                print(output.text_delta)

    Processes are spawned: a script needs ``if __name__ == "__main__"``. All methods belong to one
    event loop.

    Args:
        max_waiting: choices that may wait beyond ``max_num_seqs``; a request that finds so many is
            refused.
        on_progress: called with every Progress report, for counting.
        loader: makes the model in the engine's process, so it must be one that can be pickled.
        The others: see LLM.

    Attributes:
        tokenizer: the checkpoint's.
        ready: what the engine said when it was; None while it is away.
        restarts: engine processes started after the first.
    """

    def __init__(
        self,
        model: str,
        dtype: DtypeName = "auto",
        speculative_config: Mapping[str, Any] | None = None,
        max_waiting: int = 1024,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        loader: Loader = load,
        **options: Any,
    ) -> None:
        self.config = EngineConfig.of(model, dtype, speculative_config, options)
        self.tokenizer = load_tokenizer(resolve(model))
        self.max_waiting, self.on_progress, self._loader = max_waiting, on_progress, loader
        self.ready: Ready | None = None
        self._streams: dict[int, Stream] = {}
        self._ids = itertools.count(1)
        self._process: EngineProcess | None = None
        self._first: asyncio.Future[None] | None = None  # the first start's end, until it is known
        self._restart: asyncio.Task[None] | None = None
        self._attempts = self.restarts = 0

    async def start(self) -> None:
        """Load the model; raises AquilineError if that fails."""
        self._first = asyncio.get_running_loop().create_future()
        self._spawn()
        try:
            await self._first
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End the process and every request."""
        if self._restart is not None:
            self._restart.cancel()
        process, self._process, self.ready = self._process, None, None
        for stream in list(self._streams.values()):
            self._end(stream, EngineError("engine: it was closed; start it again"))
        if process is not None:
            await process.close()

    async def __aenter__(self) -> AsyncLLM:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def engine_pid(self) -> int | None:
        """The engine's process, if there is one."""
        return None if self._process is None else self._process.pid

    @property
    def in_flight(self) -> int:
        """Choices that run or wait."""
        return sum(stream.params.n for stream in self._streams.values())

    def require_ready(self) -> Ready:
        """``ready``; raises EngineError while the engine is away."""
        if self.ready is None:
            raise EngineError("engine: it is starting; try again in some seconds")
        return self.ready

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """The checkpoint's sampling defaults with ``changes``; raises EngineError while away."""
        return SamplingParams(**{**self.require_ready().sampling_defaults, **changes})

    async def submit(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> Stream:
        """Queue a prompt.

        Raises:
            AquilineError: it cannot run; names the field and the remedy.
            EngineError: the engine is away, or its queue is full.
        """
        self.require_ready()
        limit = self.config.max_num_seqs + self.max_waiting
        if self.in_flight >= limit:
            raise EngineError(f"requests: {limit} are in flight; try again later", busy=True)
        seed = secrets.randbelow(MAX_SEED) if params.seed is None else params.seed
        stream = Stream(self, next(self._ids), tuple(prompt_token_ids), replace(params, seed=seed))
        self._streams[stream.request_id] = stream
        self._submit(stream)
        try:
            await stream.admitted
        except BaseException:
            stream.abort()
            raise
        return stream

    async def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Continue a text or tokens, an output a step; leaving the loop aborts the request."""
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        stream = await self.submit(tokens, params or self.default_sampling_params())
        try:
            async for output in stream:
                yield output
        finally:
            stream.abort()

    def abort(self, request_id: int) -> None:
        """End a request; its stream says nothing more. One that has ended may be given."""
        if self._streams.pop(request_id, None) is not None and self._process is not None:
            self._process.send(Abort(request_id))

    # ----------------------------------------------------------------------------- process and pipe

    def _spawn(self) -> None:
        self._process = EngineProcess(self.config, self._loader, self._take, self._died)

    def _submit(self, stream: Stream) -> None:
        assert self._process is not None
        self._process.send(
            Submit(
                stream.request_id, stream.prompt_token_ids, stream.params, stream.transcript.said()
            )
        )

    def _take(self, report: Report) -> None:
        match report:
            case Progress():
                self.on_progress(report)
                for update in report.updates:
                    stream = self._streams.get(update.request_id)
                    if stream is not None:
                        if update.finished:
                            del self._streams[update.request_id]
                        stream.put(stream.transcript.add(update))
            case Admitted(request) if request in self._streams:
                self._streams[request].admit()
            case Refused(request, message) if request in self._streams:
                self._end(self._streams[request], AquilineError(message))
            case Ready():
                self.ready, self._attempts = report, 0
                for stream in self._streams.values():
                    self._submit(stream)
                self._started(None)
            case Failed(message):
                log.error("engine: %s", message)
                self._started(CheckpointError(message))

    def _started(self, error: AquilineError | None) -> None:
        """The first start's result is told once."""
        first, self._first = self._first, None
        if first is not None and not first.done():
            if error is None:
                first.set_result(None)
            else:
                first.set_exception(error)

    def _died(self) -> None:
        """The process ended by itself: its requests wait for the next one, or are given up."""
        log.error("engine: its process ended with %d requests", len(self._streams))
        was_ready, self.ready = self.ready is not None, None
        for stream in list(self._streams.values()):
            stream.deaths += was_ready
            if stream.deaths >= MAX_DEATHS:
                self._end(
                    stream,
                    EngineError(
                        f"engine: it ended {MAX_DEATHS} times under this request, which is given "
                        "up; see the server's log"
                    ),
                )
        if self._first is not None:
            self._started(EngineError("engine: its process ended while loading; see its output"))
        elif self._process is not None:
            self._restart = asyncio.create_task(self._revive(self._process))

    async def _revive(self, dead: EngineProcess) -> None:
        await dead.close()
        await asyncio.sleep(RESTART_SECONDS[min(self._attempts, len(RESTART_SECONDS) - 1)])
        self._attempts += 1
        self.restarts += 1
        self._spawn()

    def _end(self, stream: Stream, error: AquilineError) -> None:
        self._streams.pop(stream.request_id, None)
        stream.put(error)


class Stream:
    """The outputs of one request, to be iterated over once.

    Attributes:
        params: with the seed that was fixed.
        admitted: done when the engine has taken the request, or refused it.
        deaths: engine processes that ended while it ran.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        request_id: int,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
    ) -> None:
        self.request_id, self.prompt_token_ids, self.params = request_id, prompt_token_ids, params
        self.transcript = Transcript(
            request_id, prompt_token_ids, params.n, params.logprobs is not None
        )
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.deaths = 0
        self._llm = llm
        self._outputs: asyncio.Queue[RequestOutput | AquilineError] = asyncio.Queue()
        self._finished = False

    def admit(self) -> None:
        """The engine has taken the request."""
        if not self.admitted.done():
            self.admitted.set_result(None)

    def put(self, output: RequestOutput | AquilineError) -> None:
        """Add what the reader gets next; an error is the last."""
        if isinstance(output, AquilineError) and not self.admitted.done():
            self.admitted.set_exception(output)
        else:
            self._outputs.put_nowait(output)

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._finished:
            raise StopAsyncIteration
        output = await self._outputs.get()
        if isinstance(output, AquilineError):
            self._finished = True
            raise output
        self._finished = output.finished
        return output

    def abort(self) -> None:
        """End the request, unless it has ended."""
        self._llm.abort(self.request_id)
