"""Prompts in stretches: the same text and drafts, and nobody waits longer than the rule says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from aquiline.core.errors import AquilineError
from aquiline.core.params import SamplingParams
from tests.tiny_checkpoint import CYCLE
from tests.tiny_engine import CHAIN, GREEDY, SHAPES, Make, assert_idle, said

WARM = SamplingParams(temperature=30.0, seed=3, max_tokens=9, ignore_eos=True)
ASKED = [{"prompt_token_ids": (CYCLE * 2)[n : 2 * n + 1]} for n in (1, 7, 8, 9, 16, 23, 24)]
SHORT = replace(GREEDY, ignore_eos=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_stretches_say_what_the_whole_says(shape: str, make: Make) -> None:
    options: dict[str, Any] = {"page_size": 4, "enable_prefix_caching": False}
    whole = make("mixed", SHAPES[shape], "bad-draft", **options)
    for max_tokens in (1, 2, 3, 9):
        params = replace(WARM, max_tokens=max_tokens)
        expected = whole.generate(ASKED, params)
        for budget in (1, 3, 8, 9):
            options["max_num_batched_tokens"] = budget
            parts = make("mixed", SHAPES[shape], "bad-draft", **options)
            got = parts.generate(ASKED, params)
            assert_idle(parts)
            assert list(map(said, got)) == list(map(said, expected)), budget
            assert [one.speculation for one in got] == [one.speculation for one in expected]


@pytest.mark.parametrize("draft", ["eagle3", "bad-eagle3"])
def test_stretches_with_eagle3(draft: str, make: Make) -> None:
    method: dict[str, Any] = {**CHAIN, "method": "eagle3"}
    whole = make("mixed", method, draft, enable_prefix_caching=False)
    parts = make("mixed", method, draft, enable_prefix_caching=False, max_num_batched_tokens=5)
    expected, got = whole.generate(ASKED, WARM), parts.generate(ASKED, WARM)
    assert list(map(said, got)) == list(map(said, expected))
    assert [one.speculation for one in got] == [one.speculation for one in expected]


def test_scores_of_a_prompt_in_stretches(make: Make) -> None:
    params = replace(WARM, prompt_logprobs=3, logprobs=1)
    (expected,) = make("mixed", None).generate(ASKED[-1], params)
    (got,) = make("mixed", CHAIN, max_num_batched_tokens=7).generate(ASKED[-1], params)
    assert got.prompt_logprobs is not None
    assert expected.prompt_logprobs is not None
    assert len(got.prompt_logprobs) == len(ASKED[-1]["prompt_token_ids"])
    for one, other in zip(got.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        assert one is not None
        assert other is not None
        assert [(i, p.rank) for i, p in one.items()] == [(i, p.rank) for i, p in other.items()]
        for token in one:
            assert one[token].logprob == pytest.approx(other[token].logprob, abs=1e-9)


def test_a_long_prompt_takes_turns_with_streams_and_with_short_prompts(make: Make) -> None:
    """Every second step is a round; a short prompt waits for one stretch of the long one."""
    llm = make("mixed", None, max_num_batched_tokens=8, enable_prefix_caching=False)
    engine = llm.engine
    stream = engine.add_request(CYCLE[:3], replace(SHORT, max_tokens=60))
    engine.step()
    long = engine.add_request((CYCLE * 3)[:70], SHORT)
    lengths, firsts = list[int](), dict[int, int]()
    short = 0
    for step in range(40):
        if step == 3:
            short = engine.add_request(CYCLE[:5], SHORT)
        for output in engine.step():
            if output.request_id == stream:
                lengths.append(step)
            firsts.setdefault(output.request_id, step)
    gaps = [after - before for before, after in itertools.pairwise(lengths)]
    assert max(gaps) <= 2
    assert firsts[short] - 3 <= 4 + engine.runner.ahead
    assert firsts[long] >= 2 * (70 // 8), "it took as many turns as it has stretches"
    while engine.has_work:
        engine.step()
    assert_idle(llm)


def test_short_prompts_that_keep_coming_do_not_hold_up_a_long_one(make: Make) -> None:
    """Two come in every step, each of them a whole budget; the long one has ten stretches."""
    llm = make("mixed", None, max_num_batched_tokens=8, enable_prefix_caching=False)
    engine = llm.engine
    long = engine.add_request((CYCLE * 3)[:80], replace(SHORT, max_tokens=1))
    ids, ended = list[int](), None
    for step in range(200):
        if ended is None:
            ids += [
                engine.add_request(CYCLE[step % 9 :][:8], replace(SHORT, max_tokens=1))
                for _ in range(2 if step < 60 else 0)
            ]
        for output in engine.step():
            if output.request_id == long:
                ended = step
        if not engine.has_work:
            break
    assert ended is not None
    assert ended < 60
    assert_idle(llm)


def test_several_short_prompts_are_one_batch(make: Make) -> None:
    llm = make("mixed", CHAIN, max_num_batched_tokens=24)
    for length in (5, 3, 6, 2):
        llm.engine.add_request(CYCLE[9 - length :][:length], SHORT)
    batch = llm.engine.scheduler.schedule()
    assert [(one.length, one.last) for one in batch.prefills] == [
        (5, True), (3, True), (6, True), (2, True)
    ]  # fmt: skip
    for request in range(1, llm.engine._next_id + 1):
        llm.engine.abort(request)
    assert_idle(llm)


def test_a_budget_below_one_is_refused(make: Make) -> None:
    with pytest.raises(AquilineError, match="max_num_batched_tokens=0"):
        make("mixed", None, max_num_batched_tokens=0)
