"""The engine on the card: graphs, a round in flight, and the CPU's text."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from tests.tiny_checkpoint import write_draft, write_eagle3, write_target
from tests.tiny_engine import (
    CHAIN,
    SHAPES,
    TREE,
    assert_idle,
    forms_and_none,
    mixed_params,
    prompts,
    said,
)

pytestmark = pytest.mark.gpu
OPTIONS: dict[str, Any] = {"max_num_seqs": 4, "page_size": 16, "max_model_len": 96,
                           "kv_cache_tokens": 1024}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gpu")
    return {
        "target": write_target(root / "mixed", mix=0.15),
        "eagle": write_draft(root / "draft"),
        "eagle3": write_eagle3(root / "eagle3"),
    }


def make(
    folders: dict[str, Path], shape: dict[str, Any] | None, device: str, **options: Any
) -> LLM:
    speculation = None
    if shape is not None:
        method = shape.get("method", "eagle")
        speculation = {"model": str(folders[method]), **shape}
    options = {**OPTIONS, **options}
    return LLM(str(folders["target"]), "float32", speculation, device=device, **options)


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_text_is_the_cpus(folders, shape, method):
    """Greedy and seeded with every filter, requests joining and leaving a batch of four."""
    chosen = SHAPES[shape]
    asked, params = prompts(12), mixed_params(12)
    card = make(folders, None if chosen is None else {**chosen, "method": method}, "cuda")
    expected = make(folders, None, "cpu").generate(asked, params)
    got = card.generate(asked, params)
    assert [said(one) for one in got] == [said(one) for one in expected]
    again = card.generate(asked, params)
    assert [said(one) for one in again] == [said(one) for one in expected]
    card.engine.step()  # what was in flight when the last request ended
    assert_idle(card)


@pytest.mark.parametrize("rule", ["multi-round", "target-only", "independent", "block"])
def test_every_rule_runs_in_a_graph(folders, rule):
    shape = CHAIN if rule == "block" else TREE
    llm = make(folders, {**shape, "verification": rule}, "cuda")
    greedy = [replace(p, temperature=0.0) for p in mixed_params(6)]
    expected = make(folders, None, "cpu").generate(prompts(6), greedy)
    assert [said(o) for o in llm.generate(prompts(6), greedy)] == [said(o) for o in expected]
    llm.generate(prompts(6), mixed_params(6))


@pytest.mark.parametrize("shape", SHAPES)
def test_forms_in_three_graphs_say_what_the_cpu_says(folders, shape):
    """Several forms and none in batches that grow and shrink; then none alone, on one graph."""
    chosen = SHAPES[shape]
    card = make(folders, chosen, "cuda")
    asked, params = prompts(12), forms_and_none(12)
    expected = make(folders, None, "cpu").generate(asked, params)
    assert [said(o) for o in card.generate(asked, params)] == [said(o) for o in expected]
    free = mixed_params(12)
    expected = make(folders, None, "cpu").generate(asked, free)
    assert [said(o) for o in card.generate(asked, free)] == [said(o) for o in expected]
    card.engine.step()
    assert_idle(card)


@pytest.mark.parametrize("shape", SHAPES)
def test_forms_say_what_plain_decoding_says_and_capture_nothing(folders, shape, monkeypatch):
    """Every graph of batches with and without forms is there after the start."""
    card, plain = (make(folders, chosen, "cuda") for chosen in (SHAPES[shape], None))
    graphs, guided = card.engine.runner._graphs, card.engine.runner._guided
    assert set(graphs) == set(guided)
    assert card.engine.warm_up.graphs == 4 * len(graphs)
    asked, params = prompts(12), [*forms_and_none(8), *mixed_params(4)]
    expected = plain.generate(asked, params)

    def capture(*stages: Any, pool: Any = None) -> None:
        raise AssertionError("a graph is captured after the warm-up")

    monkeypatch.setattr("aquiline.engine.runner.capture", capture)
    monkeypatch.setattr("aquiline.decoding.guided.capture", capture)
    for batch in (12, 1, 3):
        got = card.generate(asked[:batch], params[:batch])
        assert [said(one) for one in got] == [said(one) for one in expected[:batch]]
    assert any(one.outputs[0].finish_reason == "stop" for one in expected)
    card.engine.step()
    assert_idle(card)


def test_preempted_forms_say_the_same(folders):
    llm = make(folders, CHAIN, "cuda", kv_cache_tokens=128)
    expected = make(folders, None, "cpu").generate(prompts(8), forms_and_none(8, 40))
    assert [said(o) for o in llm.generate(prompts(8), forms_and_none(8, 40))] == [
        said(o) for o in expected
    ]


def test_trees_chosen_by_load(folders):
    llm = make(folders, {"tree": "auto"}, "cuda", max_num_seqs=8)
    expected = make(folders, None, "cpu").generate(prompts(12), mixed_params(12))
    assert [said(o) for o in llm.generate(prompts(12), mixed_params(12))] == [
        said(o) for o in expected
    ]


def test_preempted_requests_say_the_same(folders):
    llm = make(folders, CHAIN, "cuda", kv_cache_tokens=128)
    expected = make(folders, None, "cpu").generate(prompts(8), mixed_params(8))
    assert [said(o) for o in llm.generate(prompts(8), mixed_params(8))] == [
        said(o) for o in expected
    ]


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
@pytest.mark.parametrize("budget", [5, 16, 33])
def test_stretches_and_a_prefix_cache_change_nothing(folders, budget, method):
    """Turns of conversations, in stretches and beside rounds, over few pages: a stretch and a copy
    are launched without a ticket while a round is in flight."""
    shape = {**TREE, "method": method}
    card = make(folders, shape, "cuda", max_num_batched_tokens=budget, kv_cache_tokens=384)
    plain = make(folders, None, "cpu", enable_prefix_caching=False)
    asked, params = prompts(8), [replace(p, n=1 + i % 2) for i, p in enumerate(mixed_params(8))]
    found = 0
    for _ in range(3):
        got, expected = card.generate(asked, params), plain.generate(asked, params)
        for one, other in zip(got, expected, strict=True):
            assert [c.token_ids for c in one.outputs] == [c.token_ids for c in other.outputs]
        found += sum(one.num_cached_tokens for one in got)
        asked = [
            {"prompt_token_ids": [*o.prompt_token_ids, *o.outputs[0].token_ids, 3, 4][:60]}
            for o in got
        ]
    assert found > 100
    card.engine.step()
    assert_idle(card)


def test_a_stream_goes_on_beside_a_long_prompt(folders):
    llm = make(folders, CHAIN, "cuda", max_num_batched_tokens=8)
    endless = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    stream = llm.engine.add_request([3, 4, 5], endless)
    for _ in range(4):
        llm.engine.step()
    long, steps = llm.engine.add_request([*range(3, 83)], endless), list[bool]()
    while True:
        outputs = {output.request_id for output in llm.engine.step()}
        if long in outputs:
            break
        steps.append(stream in outputs)
    assert len(steps) >= 2 * 80 // 8 - 2
    assert all(a != b for a, b in itertools.pairwise(steps[2:])), "every second step"
    for request in (stream, long):
        llm.engine.abort(request)


def test_steady_rounds_never_wait_for_the_card(folders):
    """Torch's own detector of synchronising calls is set to raise."""
    llm = make(folders, CHAIN, "cuda")
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=60, ignore_eos=True)
    for _ in range(2):
        ids = [llm.engine.add_request([3, 4, 5], params) for _ in range(4)]
        for _ in range(4):  # prefill, and capture if it is the first time
            llm.engine.step()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(6):
                llm.engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        for request in ids:
            llm.engine.abort(request)
