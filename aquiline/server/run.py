"""run: the server process, from the first socket to the last answer.

The socket is open before the model is loaded, so that /health can say 503. SIGTERM stops accepting
connections, waits for running requests, then ends the engine.
"""

from __future__ import annotations

import asyncio
import signal

import uvicorn

from aquiline.core.errors import AquilineError
from aquiline.core.heap import settled_heap
from aquiline.engine.async_llm import AsyncLLM
from aquiline.server import logs
from aquiline.server.app import create_app
from aquiline.server.settings import Settings


def run(llm: AsyncLLM, settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; raises AquilineError if the model cannot be loaded."""
    logs.configure()
    loading: list[asyncio.Task[None]] = []

    def start() -> None:
        loading.append(asyncio.create_task(load()))

    async def load() -> None:
        try:
            await llm.start()
            logs.log.info("ready", extra={"fields": {"models": settings.model_names}})
        except AquilineError:
            server.should_exit = True
            raise

    config = uvicorn.Config(
        create_app(llm, settings, start), settings.host, settings.port, log_config=None,
        access_log=False, timeout_graceful_shutdown=settings.shutdown_timeout, lifespan="on",
    )  # fmt: skip
    server = uvicorn.Server(config)
    # uvicorn drains, then raises the signal again: it has been obeyed by then.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with settled_heap():
            server.run()
    except SystemExit:  # uvicorn's way to say so
        raise AquilineError(
            f"port={settings.port}: {settings.host} cannot be listened on there; choose another"
        ) from None
    if loading and loading[0].done() and not loading[0].cancelled():
        error = loading[0].exception()
        if error is not None:
            raise error
