"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import re
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from aquiline.core.errors import AquilineError, EngineError

RETRY_AFTER = {"Retry-After": "1"}
MAX_SHOWN = 500  # characters of a message
log = logging.getLogger(__name__)


class UnknownModel(AquilineError):
    """The request names a model that is not served."""


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The body of an answer with ``status``."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}.get(status)
    return {"error": {"message": message[:MAX_SHOWN], "type": kind, "param": param, "code": code}}


def status_of(error: AquilineError) -> int:
    """The HTTP status that tells of it."""
    if isinstance(error, EngineError):
        return HTTPStatus.TOO_MANY_REQUESTS if error.busy else HTTPStatus.SERVICE_UNAVAILABLE
    return HTTPStatus.NOT_FOUND if isinstance(error, UnknownModel) else HTTPStatus.BAD_REQUEST


def body_of(error: AquilineError) -> dict[str, Any]:
    """Names the field that the message begins with."""
    message = str(error).replace("\n", " ")
    field = re.match(r"([\w.\[\]]+)[=:]", message)
    return error_body(message, status_of(error), field and field[1])


def install(app: FastAPI) -> None:
    """Answer every error in this form."""

    @app.exception_handler(AquilineError)
    async def refused(request: Request, error: AquilineError) -> JSONResponse:
        status = status_of(error)
        headers = RETRY_AFTER if isinstance(error, EngineError) else None
        return JSONResponse(body_of(error), status, headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "unknown field; leave it out"
        if first["type"] == "value_error" and not field:
            field = message.partition(":")[0]
        elif field:
            message = f"{field}: {message}"
        return JSONResponse(error_body(message, 400, field or None), 400)

    @app.exception_handler(HTTPException)
    async def refused_by_http(request: Request, error: HTTPException) -> JSONResponse:
        body = error_body(str(error.detail), error.status_code)
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        log.error("%s failed", request.url.path, exc_info=error)
        return JSONResponse(error_body("the server failed; see its log", 500), 500)
