"""create_app: routes, middleware and the engine's life, put together."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from aquiline.engine.async_llm import AsyncLLM
from aquiline.server import errors
from aquiline.server.routes import chat, completions, page, status, tokens
from aquiline.server.serving import Serving
from aquiline.server.settings import Settings

OPEN_PATHS = frozenset(("/health", "/metrics", "/version", "/openapi.json", "/docs", *page.FILES))


def create_app(
    llm: AsyncLLM, settings: Settings, start: Callable[[], None] | None = None
) -> FastAPI:
    """The application.

    Args:
        start: begins to load the model when the server is up; None if it is loaded already.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        if start is not None:
            start()
        yield
        await llm.close()

    problems: dict[int | str, dict[str, object]] = {
        code: {"description": text}
        for code, text in ((400, "Refused."), (429, "Queue is full."), (503, "Not ready."))
    }
    app = FastAPI(
        title="aquiline", version=version("aquiline"), lifespan=life, redoc_url=None,
        max_body_size=settings.max_body_bytes, responses=problems,
    )  # fmt: skip
    app.state.serving = Serving(llm, settings)
    for family in (chat, completions, tokens, status, page):
        app.include_router(family.router)
    errors.install(app)
    if settings.api_keys:
        app.add_middleware(ApiKeys, keys=settings.api_keys)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods, allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
        )  # fmt: skip
    return app


class ApiKeys:
    """Lets in who brings one of ``keys`` as a bearer token, and everybody to OPEN_PATHS."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            known = [hmac.compare_digest(given.encode(), key) for key in self._keys]
            if scheme.lower() != "bearer" or not any(known):
                body = errors.error_body("Authorization: give a valid API key as bearer token", 401)
                headers = {"WWW-Authenticate": "Bearer"}
                await JSONResponse(body, 401, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)
