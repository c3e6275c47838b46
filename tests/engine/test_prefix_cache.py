"""The prefix cache in the engine: what a later request reuses, and that nothing tells but the time.

A conversation is played turn after turn: each prompt is the last prompt, the answer to it, and
something new. ``bad-draft`` looks at its whole context, so a wrong slot of its cache changes what
it drafts.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from aquiline.core.outputs import RequestOutput, SpeculationStats
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from tests.tiny_checkpoint import CYCLE
from tests.tiny_engine import (
    CHAIN,
    GREEDY,
    SHAPES,
    TREE,
    Make,
    assert_idle,
    mixed_params,
    prompts,
    said,
)

WARM = SamplingParams(temperature=30.0, seed=3, max_tokens=9, ignore_eos=True)
LONG: dict[str, Any] = {"max_model_len": 240, "kv_cache_tokens": 1000}


def conversation(llm: LLM, turns: int, params: SamplingParams) -> list[RequestOutput]:
    """Each turn's output; the user says 1 to 5 letters."""
    draw, outputs = random.Random(1), list[RequestOutput]()
    prompt: list[int] = []
    for turn in range(turns):
        prompt += [draw.choice(CYCLE) for _ in range(1 + turn % 5)]
        outputs += llm.generate({"prompt_token_ids": prompt}, replace(params, seed=turn))
        prompt += outputs[-1].outputs[0].token_ids
        assert_idle(llm)
    return outputs


@pytest.mark.parametrize("page_size", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_turns_of_a_conversation(shape: str, page_size: int, make: Make) -> None:
    """All of the last turn comes from the cache but its last token, what the last round accepted,
    and one token more; text and drafting are those without a cache."""
    cached = make("mixed", SHAPES[shape], "bad-draft", page_size=page_size, **LONG)
    plain = make("mixed", SHAPES[shape], "bad-draft", enable_prefix_caching=False, **LONG)
    depth = {"plain": 0, "chain": 3, "tree": 3, "eagle-25": 5, "retrieving": 5}[shape]
    got = conversation(cached, 10, WARM)
    asked = [{"prompt_token_ids": one.prompt_token_ids} for one in got]
    expected = plain.generate(asked, [replace(WARM, seed=turn) for turn in range(10)])
    assert list(map(said, got)) == list(map(said, expected))
    assert [one.speculation for one in got] == [one.speculation for one in expected]
    assert [one.num_cached_tokens for one in expected] == [0] * 10
    known = 0
    for output in got:
        assert known - (depth + 2) <= output.num_cached_tokens <= max(known - 1, 0)
        known = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
    assert shape == "plain" or sum(sum(o.speculation.accepted_by_depth) for o in got) > 5


@pytest.mark.parametrize("page_size", [4, 32])
def test_retrieval_looks_up_what_was_cached(page_size: int, make: Make) -> None:
    """The target recites the alphabet and the draft does not, so only the prompt tells what comes
    next; where it tells it lies in pages that are shared, or in the one that is copied."""
    shape = SHAPES["retrieving"]
    cached = make("clean", shape, "bad-draft", page_size=page_size)
    plain = make("clean", shape, "bad-draft", enable_prefix_caching=False)
    prompt = {"prompt_token_ids": [*CYCLE, *CYCLE[:5]]}
    _, again = (cached.generate(prompt, GREEDY)[0] for _ in range(2))
    (expected,) = plain.generate(prompt, GREEDY)
    assert again.num_cached_tokens == len(prompt["prompt_token_ids"]) - 1
    assert said(again) == said(expected)
    assert again.speculation == expected.speculation
    assert again.speculation.tokens_per_call > 3


@pytest.mark.parametrize("method", ["bad-draft", "bad-eagle3"])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_beginnings_that_part_anywhere(shape: str, method: str, make: Make) -> None:
    """A text of 20 tokens is known; others leave it after 1, 2, ... of them."""
    speculation = {**SHAPES[shape], "method": "eagle3" if "eagle3" in method else "eagle"}  # type: ignore[dict-item]
    cached = make("mixed", speculation, method, page_size=4)
    plain = make("mixed", speculation, method, enable_prefix_caching=False)
    text = [CYCLE[(7 * i) % 26] for i in range(20)]
    cached.generate({"prompt_token_ids": text}, WARM)
    lengths = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 19)
    asked = [{"prompt_token_ids": [*text[:common], CYCLE[common], 7]} for common in lengths]
    for common, prompt, expected in zip(lengths, asked, plain.generate(asked, WARM), strict=True):
        (output,) = cached.generate(prompt, WARM)
        assert said(output) == said(expected)
        assert output.speculation == expected.speculation
        assert output.num_cached_tokens >= common - 1
    assert_idle(cached)


def test_what_is_asked_again_runs_one_token(make: Make) -> None:
    llm = make("mixed", TREE, page_size=4)
    for prompt in prompts(6, seed=3):
        length = len(prompt["prompt_token_ids"])
        first, again = (llm.generate(prompt, replace(WARM, seed=9))[0] for _ in range(2))
        assert said(first) == said(again)
        assert again.num_cached_tokens == length - 1


def test_prompt_logprobs_are_computed_anew(make: Make) -> None:
    llm = make("mixed", CHAIN, page_size=4)
    params = replace(WARM, prompt_logprobs=2, n=3)
    first, again = (llm.generate({"prompt_token_ids": CYCLE[:14]}, params)[0] for _ in range(2))
    assert again.num_cached_tokens == 0
    assert again.prompt_logprobs == first.prompt_logprobs
    assert again.prompt_logprobs is not None
    assert len(again.prompt_logprobs) == 14
    assert [c.token_ids for c in again.outputs] == [c.token_ids for c in first.outputs]


def test_a_prompt_that_is_under_way_is_waited_for(make: Make) -> None:
    """Ten requests with one long beginning: it is run once."""
    llm = make("mixed", CHAIN, "bad-draft", page_size=4, max_num_seqs=8)
    plain = make("mixed", CHAIN, "bad-draft", enable_prefix_caching=False)
    asked = [{"prompt_token_ids": [*CYCLE[3:], 5, CYCLE[i], 6, 7]} for i in range(10)]
    outputs = llm.generate(asked, WARM)
    assert [o.num_cached_tokens for o in outputs] == [0] + [24] * 9
    expected = plain.generate(asked, WARM)
    assert list(map(said, outputs)) == list(map(said, expected))
    assert SpeculationStats.sum(o.speculation for o in outputs) == SpeculationStats.sum(
        o.speculation for o in expected
    )


@pytest.mark.parametrize("shape", ["plain", "chain", "tree"])
def test_joining_aborting_and_evicting_at_random(shape: str, make: Make) -> None:
    """Conversations over few pages in a random order of steps; no page is lost, no text differs."""
    llm = make("mixed", SHAPES[shape], page_size=4, kv_cache_tokens=140, max_num_batched_tokens=9)
    alone = make("mixed", None, enable_prefix_caching=False)
    engine, draw = llm.engine, random.Random(5)
    params = [replace(one, n=1 + i % 2) for i, one in enumerate(mixed_params(40))]
    texts, asked, done = [CYCLE[:5]], dict[int, tuple[list[int], SamplingParams]](), {}
    for one in params:
        text = draw.choice(texts)
        prompt = [*text[: draw.randint(1, len(text))], draw.choice(CYCLE)][:50]
        request = engine.add_request(prompt, one)
        asked[request] = prompt, one
        for _ in range(draw.randint(0, 6)):
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = output
                    texts.append([*output.prompt_token_ids, *output.outputs[0].token_ids])
            tables = [sequence.table.pages for sequence in engine.scheduler.running]
            engine.allocator.check_integrity(tables)
            assert engine.scheduler.cache is not None
            engine.scheduler.cache.check_integrity()
        if draw.random() < 0.2:
            engine.abort(draw.choice(list(asked)))
    while engine.has_work:
        done |= {output.request_id: output for output in engine.step() if output.finished}
    assert_idle(llm)
    assert len(done) > 20
    assert sum(output.num_cached_tokens for output in done.values()) > 50
    asked_for, wanted = zip(*(asked[request] for request in done), strict=True)
    all_expected = alone.generate([{"prompt_token_ids": one} for one in asked_for], wanted)
    for output, expected in zip(done.values(), all_expected, strict=True):
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in expected.outputs]
