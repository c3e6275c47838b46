"""GET /health, /metrics, /version, /v1/models."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from aquiline.server.errors import UnknownModel
from aquiline.server.routes.json_route import Shared
from aquiline.server.serving import Serving

router = APIRouter()


@router.get("/health", summary="200 when requests can be served, else 503")
async def health(serving: Shared) -> Response:
    """Empty; 503 while the engine loads or is away."""
    serving.llm.require_ready()
    return Response()


@router.get("/metrics", summary="Counters for Prometheus")
async def metrics(serving: Shared) -> Response:
    """In Prometheus' text format."""
    return Response(serving.metrics.page(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", summary="The server's version")
async def the_version() -> dict[str, str]:
    """Of the package."""
    return {"version": version("aquiline")}


@router.get("/v1/models", summary="What is served")
async def models(serving: Shared) -> dict[str, Any]:
    """One entry a name."""
    names = serving.settings.model_names
    return {"object": "list", "data": [_model(name, serving) for name in names]}


@router.get("/v1/models/{name:path}", summary="One of them")
async def model(name: str, serving: Shared) -> dict[str, Any]:
    """404 if it is not served."""
    if name not in serving.settings.model_names:
        raise UnknownModel(f"model: {name!r} is not served")
    return _model(name, serving)


def _model(name: str, serving: Serving) -> dict[str, Any]:
    ready = serving.llm.ready
    return {
        "id": name, "object": "model", "created": serving.created, "owned_by": "aquiline",
        "root": serving.llm.config.model,
        "max_model_len": None if ready is None else ready.max_model_len,
    }  # fmt: skip
