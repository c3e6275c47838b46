"""Several choices of one request: pages are shared, and each says what it says alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from aquiline.core.outputs import RequestOutput
from aquiline.core.params import SamplingParams
from tests.tiny_checkpoint import CYCLE
from tests.tiny_engine import (
    CHAIN,
    SHAPES,
    TREE,
    Make,
    assert_idle,
    count_preemptions,
    mixed_params,
    prompts,
    said,
)

WARM = SamplingParams(temperature=2.0, seed=11, max_tokens=24, ignore_eos=True)
EDGES = [{"prompt_token_ids": (CYCLE * 2)[:n]} for n in (1, 2, 8, 9, 33)]


def texts(output: RequestOutput) -> list[tuple[int, ...]]:
    return [choice.token_ids for choice in output.outputs]


@pytest.mark.parametrize("page_size", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_choices_are_those_of_plain_decoding_at_page_edges(page_size: int, make: Make) -> None:
    """Rows for four choices of five at a time; the plain engine has one, so shares nothing."""
    params = replace(WARM, n=5, max_tokens=12)
    plain = make("mixed", None, max_num_seqs=1).generate(EDGES, params)
    for shape in SHAPES.values():
        llm = make("mixed", shape, page_size=page_size)
        for prompt, expected in zip(EDGES, plain, strict=True):
            (output,) = llm.generate(prompt, params)
            assert_idle(llm)
            assert [choice.index for choice in output.outputs] == [0, 1, 2, 3, 4]
            assert len(set(texts(output))) == 5
            assert texts(output) == texts(expected)
    (first,) = llm.generate(EDGES[-1], replace(params, n=1))
    assert texts(first) == texts(output)[:1]


def test_drafts_of_a_choice_are_those_it_has_alone(make: Make) -> None:
    """What the draft reads is each choice's own where the choices part, also at page edges."""
    shared = make("mixed", CHAIN, "bad-draft", page_size=4)
    apart = make("mixed", CHAIN, "bad-draft", max_num_seqs=1)
    params = replace(WARM, n=4, temperature=30.0)
    for length in (3, 4, 5, 8):
        prompt = {"prompt_token_ids": CYCLE[:length]}
        (output,), (expected,) = shared.generate(prompt, params), apart.generate(prompt, params)
        assert output.speculation == expected.speculation
        assert sum(output.speculation.accepted_by_depth) > 20


def test_choices_share_the_pages_that_the_prompt_fills(make: Make) -> None:
    llm = make("mixed", CHAIN, page_size=4, kv_cache_tokens=200)
    engine = llm.engine
    for length, shared in ((4, 0), (5, 1), (8, 1), (9, 2), (27, 6)):
        request = engine.add_request([*CYCLE[:length]], replace(WARM, n=4))
        while len(engine.scheduler.running) < 4:
            engine.step()
        tables = [sequence.table.pages for sequence in engine.scheduler.running]
        cached = [sequence.cached for sequence in engine.scheduler.running]
        assert cached[1:] == [length - 1] * 3, "the prompt was run once, and its last token by all"
        engine.allocator.check_integrity(tables)
        for one, other in itertools.combinations(tables, 2):
            assert set(one) & set(other) == set(tables[0][:shared])
        engine.abort(request)
        assert_idle(llm)


@pytest.mark.parametrize("shape", ["plain", "chain", "tree"])
def test_choices_in_a_batch_that_is_preempted(
    shape: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make("mixed", SHAPES[shape], max_model_len=64, kv_cache_tokens=80, page_size=4)
    asked = [{"prompt_token_ids": CYCLE[n : n + 9]} for n in range(6)]
    params = [replace(p, max_tokens=40, n=1 + i % 3) for i, p in enumerate(mixed_params(6))]
    preempted = count_preemptions(llm, monkeypatch)
    outputs = llm.generate(asked, params)
    assert preempted, "the pool was large enough; the test tests nothing"
    assert_idle(llm)
    alone = make("mixed", None)
    for prompt, one, output in zip(asked, params, outputs, strict=True):
        (expected,) = alone.generate(prompt, one)
        assert texts(output) == texts(expected)
        assert len(output.outputs) == one.n
        assert len(output.speculation.depths) == sum(map(len, texts(output)))


def test_greedy_choices_are_equal(make: Make) -> None:
    greedy = SamplingParams(temperature=0, n=3, max_tokens=12)
    (output,) = make("mixed", TREE).generate(prompts(1)[0], greedy)
    assert len(set(texts(output))) == 1
    (alone,) = make("mixed", TREE).generate(prompts(1)[0], replace(greedy, n=1))
    assert texts(alone)[0] == texts(output)[0]


def test_choices_without_a_seed_differ(make: Make) -> None:
    (output,) = make("mixed", CHAIN).generate(prompts(1)[0], replace(WARM, seed=None, n=6))
    assert len(set(texts(output))) == 6


@pytest.mark.parametrize("draft", ["eagle3", "bad-eagle3"])
def test_choices_with_eagle3(draft: str, make: Make) -> None:
    method: dict[str, Any] = {**CHAIN, "method": "eagle3"}
    for prompt in EDGES[2:4]:
        (output,) = make("mixed", method, draft).generate(prompt, replace(WARM, n=3))
        (expected,) = make("mixed", None).generate(prompt, replace(WARM, n=3))
        assert texts(output) == texts(expected)


def test_choices_end_one_by_one_and_stream_apart(make: Make) -> None:
    """Each delta adds up to its own choice's text; the request is finished with the last one."""
    llm = make("mixed", CHAIN)
    params = replace(WARM, n=3, ignore_eos=False, stop=("e", "k"), max_tokens=40)
    outputs = list(llm.stream("abc", params))
    last = outputs[-1]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    lengths = {len(choice.token_ids) for choice in last.outputs}
    assert len(lengths) > 1
    for index, choice in enumerate(last.outputs):
        assert (
            "".join(d.text for output in outputs for d in output.deltas if d.index == index)
            == choice.text
        )
    (whole,) = llm.generate("abc", params)
    assert [said(last), texts(last)] == [said(whole), texts(whole)]
    assert_idle(llm)


def test_abort_ends_every_choice(make: Make) -> None:
    llm = make("mixed", CHAIN)
    engine = llm.engine
    request = engine.add_request(CYCLE[:9], replace(WARM, n=6))  # four run, two wait
    other = engine.add_request(CYCLE[:3], WARM)
    for _ in range(5):  # the first choice, a round, the others
        engine.step()
    output = engine.abort(request)
    assert output is not None
    assert output.finished
    assert [choice.finish_reason for choice in output.outputs] == ["abort"] * 6
    assert [bool(choice.token_ids) for choice in output.outputs] == [True] * 4 + [False] * 2
    assert engine.abort(request) is None
    done = []
    while engine.has_work:
        done += [out.request_id for out in engine.step() if out.finished]
    assert done == [other]
    assert_idle(llm)
