"""The application around the engine: keys, CORS, sizes, readiness, settings; nothing is loaded."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from aquiline.core.errors import AquilineError
from aquiline.engine.async_llm import AsyncLLM
from aquiline.server.app import create_app
from aquiline.server.settings import Settings


def app(checkpoints: Path, **settings: Any) -> FastAPI:
    llm = AsyncLLM(str(checkpoints / "target"))
    return create_app(llm, Settings(("tiny", "other"), **settings))


def ask(application: FastAPI, method: str, path: str, **more: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, path, **more)

    return asyncio.run(send())


def test_keys(checkpoints: Path) -> None:
    locked = app(checkpoints, api_keys=("first", "second"))
    for given in (None, "Bearer", "Bearer third", "Basic first", "first", "Bearer firs\xe9"):
        headers = {} if given is None else {"Authorization": given.encode("latin-1")}
        answer = ask(locked, "GET", "/v1/models", headers=headers)
        assert answer.status_code == 401, given
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for key in ("first", "second"):
        headers = {"Authorization": f"Bearer {key}"}
        assert ask(locked, "GET", "/v1/models", headers=headers).status_code == 200
    assert ask(locked, "POST", "/tokenize", json={"prompt": "a"}).status_code == 401
    for path, status in (("/metrics", 200), ("/version", 200), ("/health", 503)):
        assert ask(locked, "GET", path).status_code == status


def test_not_ready_is_503_on_every_route(checkpoints: Path) -> None:
    application = app(checkpoints)
    talk = {"messages": [{"role": "user", "content": "a"}]}
    for path, body in (
        ("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", talk),
        ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]}),
    ):  # fmt: skip
        answer = ask(application, "POST", path, json=body)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1"), path
    models = ask(application, "GET", "/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tiny", "other"]


def test_cors_and_sizes(checkpoints: Path) -> None:
    headers = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    open_to = app(checkpoints, allowed_origins=("http://page",), api_keys=("key",))
    answer = ask(open_to, "OPTIONS", "/v1/completions", headers=headers)
    assert answer.headers["access-control-allow-origin"] == "http://page"
    closed = ask(app(checkpoints), "OPTIONS", "/v1/completions", headers=headers)
    assert "access-control-allow-origin" not in closed.headers
    small = app(checkpoints, max_body_bytes=50)
    assert ask(small, "POST", "/tokenize", json={"prompt": "a" * 50}).status_code == 413

    async def pieces() -> Any:
        for _ in range(60):
            yield b" "

    kind = {"Content-Type": "application/json"}
    assert ask(small, "POST", "/tokenize", content=pieces(), headers=kind).status_code == 413
    assert ask(small, "GET", "/nowhere").json()["error"]["message"] == "Not Found"


def test_the_page_asks_nobody_else(checkpoints: Path) -> None:
    """Also without a key; no script or style stands in the page itself, no address leads away."""
    locked = app(checkpoints, api_keys=("key",))
    kinds = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}
    for path, kind in kinds.items():
        answer = ask(locked, "GET", path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
        policy = dict(
            part.strip().split(" ", 1)
            for part in answer.headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
        assert answer.headers["x-content-type-options"] == "nosniff"
        text = answer.text.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert "//" not in re.sub(r"^\s*//.*|(;|,|\)) //.*", "", text, flags=re.M)
    html = ask(locked, "GET", "/").text
    assert not re.search(
        r"<style|style=|\son\w+=|<script(?! src=\"page.js\" defer></script>)", html
    )
    labelled = set(re.findall(r'for="(\w+)"', html))
    for tag in re.findall(r"<(?:input|textarea)[^>]*>", html):
        name = re.search(r'id="(\w+)"', tag)
        assert name is not None
        assert name[1] in labelled or re.search(rf"<label[^>]*>[^<]*{re.escape(tag)}", html), tag
    assert "/page.js" not in ask(locked, "GET", "/openapi.json").text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_names": ()}, "served_model_name"), ({"port": 70000}, "port=70000"),
        ({"api_keys": ("",)}, "api_key"), ({"max_body_bytes": 0}, "max_body_bytes=0"),
        ({"tool_call_parser": "x"}, "tool_call_parser='x': one of auto, llama3_json, hermes"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AquilineError, match=message):
        Settings(**{"model_names": ("a",), **settings})
