"""A client that puts a load on an OpenAI-compatible server and writes down when tokens arrive.

Answers are streamed; a chunk may carry several tokens, so tokens are counted by the server's own
``usage``, chunks are what is timed. In an open load the clock of a request starts when it was due,
so that waiting for a free place among ``concurrency`` counts as waiting.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from aquiline.core.errors import AquilineError
from aquiline.evaluation.load import Planned


@dataclass(frozen=True)
class Endpoint:
    """Where requests go and what they all say.

    Attributes:
        base_url: with or without ``/v1``.
        model: the name that requests give.
        fields: sampling fields of every request (``temperature``, ``seed``, ...).
        timeout: seconds that a server may be silent.
    """

    base_url: str
    model: str = ""
    api_key: str | None = None
    max_tokens: int = 128
    fields: Mapping[str, Any] | None = None
    timeout: float = 600.0

    @property
    def root(self) -> str:
        return self.base_url.rstrip("/").removesuffix("/v1")

    def client(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(
            base_url=self.root, headers=headers, limits=limits, timeout=self.timeout
        )

    def request(self, planned: Planned) -> tuple[str, dict[str, Any]]:
        """The route and the body."""
        route = "/v1/chat/completions" if planned.is_chat else "/v1/completions"
        prompt = planned.prompt if isinstance(planned.prompt, str) else list(planned.prompt)
        seed = {} if planned.seed is None else {"seed": planned.seed}
        return route, {
            "model": self.model, "messages" if planned.is_chat else "prompt": prompt,
            "max_tokens": planned.max_tokens or self.max_tokens, "stream": True,
            "stream_options": {"include_usage": True}, **(self.fields or {}), **seed,
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """How one request went; seconds.

    Attributes:
        start: its clock's start, after the load's.
        arrivals: of each chunk that carried text, after ``start``.
        end: of the stream, after ``start``.
        tokens: as the server counts them; without its usage, the chunks.
        error: why there is no answer, or None.
    """

    start: float
    arrivals: tuple[float, ...]
    end: float
    tokens: int
    prompt_tokens: int
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.arrivals[0]

    @property
    def ttit(self) -> float | None:
        """(last - first arrival) / (tokens - 1); None for a single token."""
        return (
            (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1) if self.tokens > 1 else None
        )


async def put_load(
    endpoint: Endpoint, requests: Sequence[Planned], concurrency: int
) -> list[Answer]:
    """Send all requests, at most ``concurrency`` at a time; answers in the same order."""
    places = asyncio.Semaphore(concurrency)
    async with endpoint.client() as client:
        opened = time.perf_counter()

        async def one(planned: Planned) -> Answer:
            if planned.at is not None:
                await asyncio.sleep(opened + planned.at - time.perf_counter())
            async with places:
                due = time.perf_counter() if planned.at is None else opened + planned.at
                return await _answer(client, *endpoint.request(planned), due, opened)

        return list(await asyncio.gather(*map(one, requests)))


async def _answer(
    client: httpx.AsyncClient, route: str, body: Mapping[str, Any], due: float, opened: float
) -> Answer:
    arrivals: list[float] = []
    usage: Mapping[str, int] = {}
    error = None
    try:
        async with client.stream("POST", route, json=body) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                raise ValueError(f"{response.status_code} {text[:300]}")
            async for event in events(response):
                if "error" in event:
                    raise ValueError(str(event["error"])[:300])
                if any(_says_something(choice) for choice in event.get("choices", ())):
                    arrivals.append(time.perf_counter() - due)
                usage = event.get("usage") or usage
        if not arrivals:
            raise ValueError("the stream held no text")
    except (httpx.HTTPError, ValueError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    tokens = usage.get("completion_tokens", len(arrivals))
    end = time.perf_counter() - due
    return Answer(due - opened, tuple(arrivals), end, tokens, usage.get("prompt_tokens", 0), error)


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to [DONE]."""
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield json.loads(data)


def _says_something(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    fields = (choice.get("text"), *(delta.get(n) for n in ("content", "tool_calls", "reasoning")))
    return any(fields)


async def only_model(endpoint: Endpoint) -> str:
    """The first model that the server names; AquilineError where it does not answer."""
    try:
        async with endpoint.client() as client:
            response = await client.get("/v1/models")
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise AquilineError(
            f"--base-url {endpoint.base_url}: {error}; give the address of a server that speaks "
            "OpenAI's protocol"
        ) from None


async def page(endpoint: Endpoint, route: str) -> str | None:
    """What the server says at a route; None where it has none."""
    try:
        async with endpoint.client() as client:
            response = await client.get(route)
            return response.text if response.status_code == httpx.codes.OK else None
    except httpx.HTTPError:
        return None
