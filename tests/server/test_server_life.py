"""What production does to a server: kills, floods, clients that leave, SIGTERM."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from tests.server.http_server import NAME, Running, serving

TALK: list[Any] = [{"role": "user", "content": "abc"}]


@pytest.fixture(scope="module")
def small(checkpoints: Path) -> Iterator[Running]:
    """Two choices run, two may wait."""
    log = checkpoints / "small.log"
    flags = ("--max-num-seqs", "2", "--max-waiting", "2")
    with serving(checkpoints / "target", checkpoints / "draft", log, *flags) as running:
        yield running


def client(server: Running) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


async def stream_text(
    server: Running,
    seed: int,
    max_tokens: int,
    after: int = 0,
    do: Callable[[], None] | None = None,
) -> str:
    """The streamed text of a seed; ``do`` is done once, after so many chunks."""
    async with client(server) as one:
        stream = await one.chat.completions.create(
            model=NAME, messages=TALK, stream=True, seed=seed, max_tokens=max_tokens,
            temperature=1.2, extra_body={"ignore_eos": True},
        )  # fmt: skip
        text, count = "", 0
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            count += 1
            if count == after and do is not None:
                do()
        return text


def expected(alone: LLM, seed: int, max_tokens: int) -> str:
    params = SamplingParams(seed=seed, max_tokens=max_tokens, temperature=1.2, ignore_eos=True)
    return alone.chat(TALK, params)[0].outputs[0].text


async def until(done: Callable[[], Awaitable[bool]]) -> None:
    end = time.monotonic() + 60
    while not await done():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def test_streams_go_on_after_the_engine_is_killed(small: Running, alone: LLM) -> None:
    restarts = small.metric("engine_restarts")

    async def test() -> list[str]:
        def kill() -> None:
            os.kill(small.engine_pid(), signal.SIGKILL)

        tasks = [
            asyncio.create_task(stream_text(small, seed, 150, 40, kill if seed == 0 else None))
            for seed in range(4)
        ]
        async with httpx.AsyncClient() as http:

            async def away() -> bool:
                return (await http.get(small.url + "/health")).status_code == 503

            await until(away)
            refused = await http.post(small.url + "/v1/completions", json={"prompt": "a"})
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        return await asyncio.gather(*tasks)

    texts = asyncio.run(test())
    assert texts == [expected(alone, seed, 150) for seed in range(4)]
    assert small.get("/health").status_code == 200
    assert small.metric("engine_restarts") == restarts + 1


def test_a_full_queue_is_429_and_leaving_makes_room(small: Running) -> None:
    endless = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True}

    async def test() -> None:
        async with httpx.AsyncClient(timeout=60) as http:
            url = small.url + "/v1/completions"
            whole = [
                asyncio.create_task(http.post(url, json=endless)),
                asyncio.create_task(http.post(url, json={**endless, "n": 2})),
            ]

            async def taken() -> bool:
                return small.metric("num_requests_running") == 2

            await until(taken)
            async with http.stream("POST", url, json={**endless, "stream": True}) as streamed:
                assert streamed.status_code == 200
                refused = await http.post(url, json=endless)
                assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
                assert "try again" in refused.json()["error"]["message"]
                for task in whole:
                    task.cancel()
            await asyncio.gather(*whole, return_exceptions=True)

            async def idle() -> bool:
                names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
                return sum(map(small.metric, names)) == 0

            await until(idle)
            assert (await http.post(url, json={"prompt": "a"})).status_code == 200

    asyncio.run(test())


def test_a_client_that_leaves_between_chunks_ends_its_request(small: Running) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", small.url + "/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    started = time.monotonic()
    while small.metric("num_requests_running") + small.metric("kv_cache_usage_perc"):
        assert time.monotonic() < started + 3
        time.sleep(0.02)


def test_the_log_is_json_and_has_no_prompt(small: Running) -> None:
    small.post("/v1/completions", {"prompt": "a secret", "max_tokens": 2})
    lines = small.log.read_text().splitlines()
    assert any('"event": "request ended"' in line and '"tokens": 2' in line for line in lines)
    assert not any("secret" in line for line in lines)


def test_sigterm_finishes_what_runs(small: Running, alone: LLM) -> None:
    """The last test here: it ends the server. The engine, told too, takes no notice. One request
    waits for its form, which takes a second to compile."""
    choices = ["".join(random.Random(i).choices("abcdefgh", k=12)) for i in range(10000)]

    async def of_a_form() -> str:
        async with client(small) as one:
            form = {"structured_outputs": {"choice": choices}}
            answer = await one.chat.completions.create(
                model=NAME, messages=TALK, seed=0, max_tokens=20, extra_body=form
            )
            return answer.choices[0].message.content or ""

    async def test() -> list[str]:
        def end() -> None:
            os.kill(small.engine_pid(), signal.SIGTERM)
            small.process.send_signal(signal.SIGTERM)

        texts = asyncio.gather(
            stream_text(small, 0, 150, 30, end), *(stream_text(small, i, 100) for i in (1, 2)),
            of_a_form(),
        )  # fmt: skip
        return list(await texts)

    *texts, formed = asyncio.run(test())
    assert formed in choices
    assert texts == [expected(alone, 0, 150), *(expected(alone, i, 100) for i in (1, 2))]
    assert small.process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        small.get("/health")
