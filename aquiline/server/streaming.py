"""Server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from aquiline.core.errors import AquilineError
from aquiline.core.outputs import RequestOutput
from aquiline.server.errors import body_of
from aquiline.server.serving import Job

CLIENT_LEFT = 499  # nobody reads it
DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The work's result; None if the client left first: then the work is cancelled."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, leaving):
            if not one.done():
                one.cancel()
                await asyncio.gather(one, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answered(
    request: Request, work: Coroutine[Any, Any, Response], jobs: Sequence[Job]
) -> Response:
    """A response that is made in one piece from ``jobs``."""
    try:
        return await unless_left(request.receive, work) or Response(status_code=CLIENT_LEFT)
    finally:
        for job in jobs:
            job.close()


class EventStream(StreamingResponse):
    """Sends each object of ``events`` as it comes, and ends with [DONE]. An AquilineError on the
    way is sent as an event. When that is done or the client leaves, ``jobs`` are closed."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any]], jobs: Sequence[Job]) -> None:
        super().__init__(_encoded(events), headers={"Cache-Control": "no-cache"})
        self._events, self._jobs = events, jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Race the stream against the client's leaving."""
        try:
            await unless_left(receive, self.stream_response(send))
        finally:
            for job in self._jobs:  # an iterator that never began closes nothing
                job.close()
            await self._events.aclose()


async def _encoded(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield b"data: " + to_json(event) + b"\n\n"
    except AquilineError as error:
        yield b"data: " + to_json(body_of(error)) + b"\n\n"
    yield DONE


async def merged(jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """The outputs of all as they come, each with its job's place."""
    waiting: dict[asyncio.Future[RequestOutput], int] = {}
    streams = [job.outputs() for job in jobs]
    try:
        for place, stream in enumerate(streams):
            waiting[asyncio.ensure_future(anext(stream))] = place
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                place = waiting.pop(future)
                output = future.result()
                yield place, output
                if not output.finished:
                    again = asyncio.ensure_future(anext(streams[place]))
                    waiting[again] = place
    finally:
        for future in waiting:
            future.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
