"""AsyncLLM: the engine in its own process says what it says in this one, killed or not."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aquiline.core.errors import AquilineError, EngineError
from aquiline.core.outputs import RequestOutput
from aquiline.core.params import SamplingParams
from aquiline.engine.async_llm import AsyncLLM
from aquiline.engine.config import EngineConfig
from aquiline.engine.llm import LLM
from aquiline.engine.loader import LoadedModel, load
from tests.tiny_checkpoint import write_draft, write_target
from tests.tiny_engine import CHAIN, mixed_params, prompts


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("async")
    target: Path = write_target(root / "target", mix=0.15, context=2048)
    draft = write_draft(root / "draft", context=2048)
    return {
        "model": str(target), "dtype": "float64", "max_num_seqs": 4, "page_size": 8,
        "speculative_config": {"model": str(draft), **CHAIN},
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(options: dict[str, Any]) -> LLM:
    return LLM(**{**options, "speculative_config": None})


@asynccontextmanager
async def running(options: dict[str, Any], **more: Any) -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM(**options, **more) as llm:
        yield llm


def wait(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


async def last(llm: AsyncLLM, prompt: Any, params: SamplingParams) -> tuple[str, RequestOutput]:
    """The text as it streamed, by choice, and the last output."""
    texts: dict[int, str] = {}
    async for output in llm.generate(prompt["prompt_token_ids"], params):
        for delta in output.deltas:
            texts[delta.index] = texts.get(delta.index, "") + delta.text
    assert [texts[one.index] for one in output.outputs] == [one.text for one in output.outputs]
    return texts[0], output


def assert_same(output: RequestOutput, expected: RequestOutput) -> None:
    for one, other in zip(output.outputs, expected.outputs, strict=True):
        assert (one.text, one.token_ids) == (other.text, other.token_ids)
        assert one.finish_reason == other.finish_reason
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob)
        assert [list(each) for each in one.logprobs or ()] == [
            list(each) for each in other.logprobs or ()
        ]
    assert (output.prompt_logprobs is None) == (expected.prompt_logprobs is None)


def test_says_what_llm_says_aborts_and_refuses(options: dict[str, Any]) -> None:
    asked = prompts(9)
    params = [replace(one, n=1 + i % 2, prompt_logprobs=1) for i, one in enumerate(mixed_params(9))]
    loads: list[Any] = []

    async def test() -> None:
        async with running(
            options, max_waiting=9, on_progress=lambda p: loads.append(p.load)
        ) as llm:
            done = await asyncio.gather(
                *(last(llm, *one) for one in zip(asked, params, strict=True))
            )
            expectations = LLM(**options).generate(asked, params)
            for (_, output), expected in zip(done, expectations, strict=True):
                assert_same(output, expected)
                assert output.speculation == expected.speculation
            assert any(sum(output.speculation.accepted_by_depth) > 2 for _, output in done)
            with pytest.raises(AquilineError, match="prompt: it is empty"):
                await llm.submit([], SamplingParams())
            streams = [
                await llm.submit([1, 2], SamplingParams(max_tokens=None, ignore_eos=True))
                for _ in range(13)
            ]
            with pytest.raises(EngineError, match="13 are in flight") as error:
                await llm.submit([1], SamplingParams())
            assert error.value.busy
            await anext(streams[0])
            for stream in streams:
                stream.abort()
            while loads[-1].running + loads[-1].waiting + loads[-1].cache_usage:
                await asyncio.sleep(0.01)
            assert llm.in_flight == 0

    wait(test())


def test_goes_on_after_a_kill(options: dict[str, Any], alone: LLM) -> None:
    """Killed at different moments, with and without a seed of the request's own; one text has a
    form, whose grammar has to stand where that text ends."""
    asked = prompts(6, seed=3)
    params = [
        SamplingParams(
            max_tokens=160, temperature=1.5, seed=i or None, ignore_eos=True, n=1 + i % 2,
            stop=("qqqq",), logprobs=1 if i > 3 else None, presence_penalty=0.1 * i,
        )
        for i in range(6)
    ]  # fmt: skip
    form = {"regex": "([a-m]{2}[n-z]){50}"}
    params[3] = replace(params[3], ignore_eos=False, structured_outputs=form)

    async def test() -> None:
        async with running(options) as llm:
            streams = [
                await llm.submit(prompt["prompt_token_ids"], one)
                for prompt, one in zip(asked, params, strict=True)
            ]

            async def read(stream: Any, kill: bool) -> RequestOutput:
                async for output in stream:
                    if kill and sum(len(one.token_ids) for one in output.outputs) > 40:
                        kill = False
                        os.kill(llm.engine_pid or 0, signal.SIGKILL)
                return output

            done = await asyncio.gather(*(read(s, i == 1) for i, s in enumerate(streams)))
            assert any(stream.deaths for stream in streams)
            seeded = [stream.params for stream in streams]
            for output, expected in zip(done, alone.generate(asked, seeded), strict=True):
                assert_same(output, expected)
            assert re.fullmatch(form["regex"], done[3].outputs[0].text)

    wait(test())


@pytest.mark.slow
def test_a_request_under_two_ends_is_given_up(options: dict[str, Any]) -> None:
    async def test() -> None:
        async with running(options) as llm:
            stream = await llm.submit([1], SamplingParams(max_tokens=None, ignore_eos=True))
            for _ in range(2):
                await anext(stream)
                os.kill(llm.engine_pid or 0, signal.SIGKILL)
                while llm.ready is not None:
                    await asyncio.sleep(0.01)
            with pytest.raises(EngineError, match="it is starting"):
                await llm.submit([1], SamplingParams())
            with pytest.raises(EngineError, match="ended 2 times under this request"):
                async for _ in stream:
                    pass
            while llm.ready is None:
                await asyncio.sleep(0.05)
            asked = SamplingParams(max_tokens=3, temperature=0)
            outputs = [output async for output in llm.generate("a", asked)]
            assert len(outputs[-1].outputs[0].token_ids) == 3

    wait(test())


def greedy_by_default(config: EngineConfig) -> LoadedModel:
    """A loader that spawned processes find by its name."""
    return replace(load(config), sampling_defaults={"temperature": 0.0})


def test_a_loader_of_ones_own(options: dict[str, Any], alone: LLM) -> None:
    async def test() -> None:
        async with running(options, loader=greedy_by_default) as llm:
            params = llm.default_sampling_params(max_tokens=20)
            assert params.temperature == 0
            (prompt,) = prompts(1)
            text, _ = await last(llm, prompt, params)
            assert text == alone.generate(prompt, params)[0].outputs[0].text

    wait(test())


def test_a_model_that_cannot_be_loaded(options: dict[str, Any]) -> None:
    async def test() -> None:
        with pytest.raises(AquilineError, match="max_model_len=4096: the model's context is 2048"):
            async with running(options, max_model_len=4096):
                pass

    wait(test())
