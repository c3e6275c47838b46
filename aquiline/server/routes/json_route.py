"""JsonRoute: bodies are parsed by pydantic's parser, which bounds depth and length of numbers and
refuses what is not UTF-8 or no character."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from aquiline.server.serving import Serving


class _Request(Request):
    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"body: not valid JSON ({error}); correct it") from None


class JsonRoute(APIRoute):
    """A route whose body is read that way."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, given such a request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_Request(request.scope, request.receive))

        return handle


def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


Shared = Annotated[Serving, Depends(_serving)]
