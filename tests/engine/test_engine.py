"""The engine: whatever joins, leaves, waits or is preempted, a request says what it says alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aquiline.core.errors import AquilineError
from aquiline.core.outputs import CompletionOutput, RequestOutput
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from tests.tiny_checkpoint import CYCLE, IM_END, VOCAB, token, write_draft, write_target
from tests.tiny_engine import (
    CHAIN,
    GREEDY,
    SHAPES,
    TREE,
    Make,
    assert_idle,
    count_preemptions,
    mixed_params,
    prompts,
    said,
)


def run(llm: LLM, text: str, **changes: Any) -> RequestOutput:
    (output,) = llm.generate(text, replace(GREEDY, **changes))
    assert_idle(llm)
    return output


# ------------------------------------------------------------------------------------- batching


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_says_what_each_request_says_alone(shape: str, make: Make) -> None:
    llm, alone = make("mixed", SHAPES[shape]), make("mixed", None)
    asked, params = prompts(12), mixed_params(12)
    together = llm.generate(asked, params)
    assert_idle(llm)
    for prompt, one, output in zip(asked, params, together, strict=True):
        (expected,) = alone.generate(prompt, one)
        assert said(output) == said(expected)
    if shape != "plain":
        accepted = [o.speculation.accepted_by_depth for o in together]
        assert sum(a[1] for a in accepted if a) > 0, "no round accepted two tokens"
        assert sum(o.speculation.rounds for o in together) < sum(
            len(o.outputs[0].token_ids) - 1 for o in together
        )


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "plain"])
def test_who_declines_speculation_gets_none_and_the_same_text(shape: str, make: Make) -> None:
    """Rounds it takes part in are plain for all; before and after them the others speculate."""
    llm = make("mixed", SHAPES[shape])
    asked = prompts(8, seed=5)
    lengths = [12 if i % 4 == 2 else 40 for i in range(8)]
    params = [
        replace(one, max_tokens=length, min_tokens=0)
        for one, length in zip(mixed_params(8), lengths, strict=True)
    ]
    declining = [replace(one, speculation=one.max_tokens == 40) for one in params]
    expected, together = llm.generate(asked, params), llm.generate(asked, declining)
    assert_idle(llm)
    assert list(map(said, together)) == list(map(said, expected))
    for one, output in zip(declining, together, strict=True):
        stats = output.speculation
        if one.speculation:
            assert stats.drafted > 0
        else:
            assert (stats.drafted, stats.accepted_by_depth) == (0, ())
            assert not any(stats.depths)
            assert stats.tokens_per_call == 1.0
    rounds = [sum(one.speculation.rounds for one in outputs) for outputs in (together, expected)]
    assert rounds[0] > rounds[1]
    (again,) = llm.generate(asked[0], params[0])
    (alone,) = make("mixed", SHAPES[shape], enable_prefix_caching=False).generate(
        asked[0], params[0]
    )
    assert said(again) == said(alone)
    assert again.speculation.accepted_by_depth == alone.speculation.accepted_by_depth


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("shape", ["chain", "tree", "eagle-25"])
def test_everything_asked_at_once_in_every_batch(shape: str, rows: int, make: Make) -> None:
    """Eight requests that differ in every parameter; with one row and with eight."""
    params = [
        SamplingParams(
            n=1 + i % 2, seed=i, max_tokens=20 + i, min_tokens=3 + i, temperature=1.0 + 0.2 * i,
            top_k=20 + i, top_p=0.99 - 0.02 * i, min_p=0.001 * i, presence_penalty=0.2 * i - 0.5,
            frequency_penalty=0.6 - 0.1 * i, repetition_penalty=0.8 + 0.1 * i,
            logit_bias={CYCLE[i]: 3.0, CYCLE[i + 1]: -2.0}, banned_token_ids=(CYCLE[20 - i],),
            allowed_token_ids=tuple(CYCLE[: 24 + i]), bad_words=("aceghijk"[i],), stop=("mn", "p"),
            stop_token_ids=(CYCLE[10 + i],), logprobs=i, prompt_logprobs=i,
        )
        for i in range(8)
    ]  # fmt: skip
    asked = prompts(8, seed=8)
    outputs = make("mixed", SHAPES[shape], max_num_seqs=rows).generate(asked, params)
    expected = make("mixed", None, max_num_seqs=1).generate(asked, params)
    for output, plain, one in zip(outputs, expected, params, strict=True):
        assert list(map(said_by, output.outputs)) == list(map(said_by, plain.outputs))
        assert len(output.outputs) == one.n
        for choice in output.outputs:
            assert one.min_tokens <= len(choice.token_ids)
            assert not {CYCLE[20 - one.logprobs], token(one.bad_words[0])} & {*choice.token_ids}
    assert {c.finish_reason for output in outputs for c in output.outputs} == {"stop", "length"}


def said_by(choice: CompletionOutput) -> tuple[object, ...]:
    shown = [list(scores) for scores in choice.logprobs or ()]
    return choice.token_ids, choice.text, choice.finish_reason, shown


def test_requests_join_and_leave_between_steps(make: Make) -> None:
    llm, alone = make("mixed", TREE), make("mixed", None)
    engine, asked, params = llm.engine, prompts(14, seed=1), mixed_params(14)
    waiting = list(zip(asked, params, strict=True))
    expected, done = {}, {}
    for step in range(1000):
        if waiting and step % 3 == 0:
            prompt, one = waiting.pop()
            request = engine.add_request(prompt["prompt_token_ids"], one)
            (expected[request],) = alone.generate(prompt, one)
        if not engine.has_work and not waiting:
            break
        for output in engine.step() if engine.has_work else []:
            if output.finished:
                done[output.request_id] = output
        engine.allocator.check_integrity([s.table.pages for s in engine.scheduler.running])
    assert {r: said(o) for r, o in done.items()} == {r: said(o) for r, o in expected.items()}
    assert_idle(llm)


def test_the_mixed_target_is_no_trivial_one(make: Make) -> None:
    """What the tests above compare differs from prompt to prompt and is not the bare cycle."""
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    outputs = make("mixed", CHAIN).generate(prompts(12), params)
    texts = {output.outputs[0].token_ids for output in outputs}
    assert len(texts) == 12
    steps = [pair for text in texts for pair in itertools.pairwise(text)]
    on_cycle = sum(CYCLE[(CYCLE.index(a) + 1) % len(CYCLE)] == b for a, b in steps)
    assert 0.2 < on_cycle / len(steps) < 0.98


def test_wrong_draft_changes_nothing_but_speed(make: Make) -> None:
    asked, params = prompts(6, seed=2), mixed_params(6)
    expected = make("mixed", None).generate(asked, params)
    for shape in (CHAIN, TREE, {"num_speculative_tokens": 64}):
        outputs = make("mixed", shape, draft="bad-draft").generate(asked, params)
        assert list(map(said, outputs)) == list(map(said, expected))


def test_prompt_lengths_around_page_edges(make: Make) -> None:
    plain = make("mixed", None)
    asked = [{"prompt_token_ids": CYCLE[:n]} for n in (1, 2, 7, 8, 9, 15, 16, 17)]
    expected = plain.generate(asked, GREEDY)
    for page_size in (1, 8, 128):
        llm = make("mixed", TREE, page_size=page_size)
        assert list(map(said, llm.generate(asked, GREEDY))) == list(map(said, expected))


def test_seed_decides_the_text_whatever_the_batch(make: Make) -> None:
    llm = make("mixed", CHAIN)
    wanted = SamplingParams(temperature=3.0, seed=5, max_tokens=16, ignore_eos=True)
    prompt = prompts(1, seed=3)[0]
    (alone,) = llm.generate(prompt, wanted)
    others = [replace(wanted, seed=seed) for seed in (6, 7, None)]
    for order in ([wanted, *others], [*others, wanted]):
        outputs = llm.generate([prompt] * 4, order)
        assert said(outputs[order.index(wanted)]) == said(alone)
        assert len({said(output) for output in outputs}) == 4
    free = replace(wanted, seed=None)
    assert said(llm.generate(prompt, free)[0]) != said(llm.generate(prompt, free)[0])


# ------------------------------------------------------------------------------ where texts end


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6])
def test_max_tokens(shape: str, max_tokens: int, make: Make) -> None:
    output = run(make("clean", SHAPES[shape]), "a", max_tokens=max_tokens)
    text = "bcdefg"[:max_tokens]
    assert said(output) == (tuple(map(token, text)), text, "length")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", "qrstuvwxyz")
def test_end_token_anywhere_in_an_accepted_run(shape: str, start: str, make: Make) -> None:
    output = run(make("clean", SHAPES[shape]), start)
    text = "abcdefghijklmnopqrstuvwxyz".partition(start)[2]
    assert said(output) == ((*map(token, text), IM_END), text, "stop")
    if shape == "chain" and len(text) > 4:
        assert output.speculation.depths[:5] == (0, 1, 2, 3, 0)


def test_ignore_eos_goes_on(make: Make) -> None:
    for shape in SHAPES.values():
        output = run(make("clean", shape), "x", ignore_eos=True, max_tokens=6)
        assert output.outputs[0].token_ids == (*map(token, "yz"), IM_END, *map(token, "abc"))
        assert output.outputs[0].text == "yzabc"
        kept = run(
            make("clean", shape), "x", ignore_eos=True, max_tokens=4, skip_special_tokens=False
        )
        assert kept.outputs[0].text == "yz<|im_end|>a"


@pytest.mark.parametrize("shape", SHAPES)
def test_stop_token_ids(shape: str, make: Make) -> None:
    for letter in "bcdefg":
        text = "bcdefg"[: "bcdefg".index(letter)]
        output = run(make("clean", SHAPES[shape]), "a", stop_token_ids=(token(letter), 0))
        assert said(output) == ((*map(token, text), token(letter)), text, "stop")
    both = run(make("clean", SHAPES[shape]), "x", ignore_eos=True, stop_token_ids=(token("b"),))
    assert said(both)[1:] == ("yza", "stop")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stop", ["b", "c", "cd", "de", "def", "efghij", "fg", "hx", "z"])
def test_stop_string_anywhere_in_an_accepted_run(shape: str, stop: str, make: Make) -> None:
    output = run(make("clean", SHAPES[shape]), "a", stop=(stop, "zzz"))
    whole = "bcdefghijklmnopqrstu"
    if stop not in whole:
        assert said(output)[1:] == (whole, "length")
        return
    text = whole.partition(stop)[0]
    assert said(output) == (tuple(map(token, text + stop)), text, "stop")
    assert len(output.speculation.depths) == len(text + stop)


def test_stream_adds_up_and_never_shows_a_stop_string(make: Make) -> None:
    params = replace(GREEDY, stop=("jk",), max_tokens=30)
    outputs = list(make("clean", CHAIN).stream("a", params))
    assert "".join(output.text_delta for output in outputs) == "bcdefghi"
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert_idle(make("clean", CHAIN))


@pytest.mark.parametrize("shape", ["chain", "tree", "eagle-25"])
@pytest.mark.parametrize("limit", [23, 24, 25, 32])
def test_context_end_is_length_with_the_same_text(shape: str, limit: int, make: Make) -> None:
    asked = [{"prompt_token_ids": CYCLE[:n]} for n in (limit - 1, limit - 2, limit - 5, 3)]
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    expected = make("mixed", None, max_model_len=limit).generate(asked, params)
    outputs = make("mixed", SHAPES[shape], max_model_len=limit).generate(asked, params)
    assert list(map(said, outputs)) == list(map(said, expected))
    for prompt, output in zip(asked, outputs, strict=True):
        assert output.outputs[0].finish_reason == "length"
        assert len(prompt["prompt_token_ids"]) + len(output.outputs[0].token_ids) == limit
    assert_idle(make("mixed", SHAPES[shape], max_model_len=limit))


def test_context_end_at_the_models_own_limit(make: Make) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    prompt = {"prompt_token_ids": (CYCLE * 10)[:240]}
    (expected,) = make("mixed", None, max_model_len=None).generate(prompt, params)
    (output,) = make("mixed", TREE, max_model_len=None).generate(prompt, params)
    assert said(output) == said(expected)
    assert len(output.outputs[0].token_ids) == 16


def test_a_mistral_says_what_transformers_says_up_to_its_window(tmp_path: Path) -> None:
    from transformers import MistralForCausalLM  # it imports Triton: not before tests/kernels

    draft = write_draft(tmp_path / "draft")
    folder = write_target(
        tmp_path / "mistral", mix=0.15, architecture="MistralForCausalLM", sliding_window=60
    )
    theirs = MistralForCausalLM.from_pretrained(folder, dtype=torch.float64)
    prompt = CYCLE[:21]
    expected = theirs.generate(
        torch.tensor([prompt]), do_sample=False, max_length=60, eos_token_id=None, use_cache=False
    )
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for speculation in (None, {"model": str(draft), **TREE}):
        llm = LLM(str(folder), "float64", speculation, page_size=8)
        (output,) = llm.generate({"prompt_token_ids": prompt}, params)
        assert [*prompt, *output.outputs[0].token_ids] == expected[0].tolist()
        assert llm.engine.max_model_len == 60
    refused = r"max_model_len=61: sliding_window=60 is not implemented .*give at most 60"
    with pytest.raises(AquilineError, match=refused):
        LLM(str(folder), "float64", max_model_len=61)


# -------------------------------------------------------------------------------- pages and rows


@pytest.mark.parametrize("shape", ["plain", "chain", "tree"])
def test_few_pages_make_requests_wait_and_come_back(
    shape: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"max_model_len": 64, "kv_cache_tokens": 80, "page_size": 4}
    llm = make("mixed", SHAPES[shape], **small)
    asked = [{"prompt_token_ids": CYCLE[n : n + 9]} for n in range(8)]
    params = [replace(p, max_tokens=40) for p in mixed_params(8)]
    preempted = count_preemptions(llm, monkeypatch)
    outputs = llm.generate(asked, params)
    assert preempted, "the pool was large enough; the test tests nothing"
    assert_idle(llm)
    alone = make("mixed", None)
    expected = [alone.generate(p, one)[0] for p, one in zip(asked, params, strict=True)]
    assert list(map(said, outputs)) == list(map(said, expected))
    for output in outputs:
        assert_consistent(output)


def test_pool_of_exactly_one_request_serves_many(make: Make) -> None:
    llm = make("mixed", CHAIN, max_model_len=60, kv_cache_tokens=68, page_size=4)
    asked = [{"prompt_token_ids": CYCLE[:n]} for n in (20, 20, 5, 50)]
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    outputs = llm.generate(asked, params)
    expected = make("mixed", None, max_model_len=60).generate(asked, params)
    assert list(map(said, outputs)) == list(map(said, expected))
    assert_idle(llm)


def test_pool_too_small_is_refused_at_start(make: Make) -> None:
    with pytest.raises(AquilineError, match=r"kv_cache_tokens=63: .*max_model_len=64"):
        make("mixed", None, max_model_len=64, kv_cache_tokens=63, page_size=1)
    with pytest.raises(AquilineError, match=r"kv_cache_tokens=64: .*draft tree needs"):
        make("mixed", CHAIN, max_model_len=64, kv_cache_tokens=64, page_size=8)
    with pytest.raises(AquilineError, match=r"max_model_len=257: .*256"):
        make("mixed", None, max_model_len=257)


def test_abort_in_mid_flight_frees_its_pages(make: Make) -> None:
    llm, alone = make("mixed", CHAIN), make("mixed", None)
    engine, asked = llm.engine, prompts(7, seed=4)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    ids = [engine.add_request(p["prompt_token_ids"], params) for p in asked]
    for _ in range(3):
        engine.step()
    running = [sequence.request.id for sequence in engine.scheduler.running]
    assert len(running) == 4, "four run, three wait"
    outputs = [engine.abort(running[1]), engine.abort(ids[5])]
    for output in outputs:
        assert output is not None
        assert output.finished
        assert output.outputs[0].finish_reason == "abort"
    assert outputs[0] is not None
    assert outputs[0].outputs[0].token_ids
    assert engine.abort(running[1]) is None
    assert engine.abort(10**9) is None
    engine.allocator.check_integrity([s.table.pages for s in engine.scheduler.running])
    done = {}
    while engine.has_work:
        done |= {o.request_id: o for o in engine.step() if o.finished}
    assert set(done) == set(ids) - {running[1], ids[5]}
    for request, prompt in zip(ids, asked, strict=True):
        if request in done:
            assert said(done[request]) == said(alone.generate(prompt, params)[0])
    assert_idle(llm)


def test_abort_of_everything_frees_everything(make: Make) -> None:
    llm = make("mixed", TREE)
    engine = llm.engine
    for steps in range(4):
        ids = [engine.add_request(p["prompt_token_ids"], GREEDY) for p in prompts(6, seed=5)]
        for _ in range(steps):
            engine.step()
        for request in ids:
            engine.abort(request)
        assert_idle(llm)


def test_stream_left_early_frees_its_pages(make: Make) -> None:
    llm = make("clean", CHAIN)
    stream = llm.stream("a", replace(GREEDY, max_tokens=60, ignore_eos=True))
    assert next(stream).text_delta == "b"
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert_idle(llm)


def test_many_requests_leak_nothing(make: Make) -> None:
    llm = make("mixed", TREE, kv_cache_tokens=160)
    draw = random.Random(6)
    for round_ in range(5):
        asked = prompts(20, seed=round_)
        llm.generate(asked, [replace(GREEDY, max_tokens=draw.randint(1, 12)) for _ in asked])
        assert_idle(llm)


# ----------------------------------------------------------------------------------- statistics


def assert_consistent(output: RequestOutput) -> None:
    stats, tokens = output.speculation, output.outputs[0].token_ids
    assert stats.tokens == sum(stats.accepted_by_depth) + stats.rounds
    assert len(stats.depths) == len(tokens)
    assert list(stats.accepted_by_depth) == sorted(stats.accepted_by_depth, reverse=True)
    assert all(count <= stats.rounds for count in stats.accepted_by_depth)
    below = 0
    for depth in stats.depths:  # runs 1, 2, 3 ... closed by the target's own token
        assert depth in (0, below + 1)
        below = depth
    # Only the last round may have been cut.
    kept = [sum(d == level for d in stats.depths) for level in range(1, max(stats.depths) + 1)]
    cut = [a - b for a, b in zip(stats.accepted_by_depth, kept, strict=False)]
    assert all(0 <= difference <= 1 for difference in cut)


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_are_consistent(shape: str, make: Make) -> None:
    outputs: Sequence[RequestOutput] = make("mixed", SHAPES[shape]).generate(
        prompts(10, seed=7), mixed_params(10)
    )
    nodes = {"plain": 0, "chain": 3, "tree": 6, "eagle-25": 25, "retrieving": 11}[shape]
    for output in outputs:
        assert_consistent(output)
        assert output.speculation.drafted == nodes * output.speculation.rounds
        if shape == "plain" and output.speculation.rounds:
            assert output.speculation.tokens_per_call == 1.0


def test_perfect_draft_reaches_its_bound(make: Make) -> None:
    output = run(make("clean", CHAIN), "a", max_tokens=17, ignore_eos=True)
    stats = output.speculation
    assert (stats.rounds, stats.tokens, stats.drafted) == (4, 16, 12)
    assert stats.accepted_by_depth == (4, 4, 4)
    assert stats.tokens_per_call == 4.0
    assert stats.depths == (0, *(1, 2, 3, 0) * 4)


@pytest.mark.parametrize("draft", ["eagle3", "bad-eagle3"])
@pytest.mark.parametrize("shape", ["chain", "eagle-25"])
def test_eagle3_says_what_plain_decoding_says(shape: str, draft: str, make: Make) -> None:
    """In batches, and with so few pages that requests are preempted and prefilled again."""
    method = {**SHAPES[shape], "method": "eagle3"}  # type: ignore[dict-item]
    asked, params = prompts(10, seed=9), mixed_params(10)
    expected = [said(output) for output in make("mixed", None).generate(asked, params)]
    for options in ({}, {"kv_cache_tokens": 152}):
        llm = make("mixed", method, draft, **options)
        assert [said(output) for output in llm.generate(asked, params)] == expected
        assert_idle(llm)


def test_eagle3_draft_reaches_its_bound(make: Make) -> None:
    """Right on the first level, from the tapped features; wrong on its own hidden state."""
    chain = make("clean", {**CHAIN, "method": "eagle3"}, "eagle3")
    stats = run(chain, "a", max_tokens=17, ignore_eos=True).speculation
    assert (stats.rounds, stats.tokens, stats.drafted) == (8, 16, 24)
    assert stats.accepted_by_depth == (8, 0, 0)


def test_64_draft_tokens_exactly(make: Make) -> None:
    chain = make("clean", {"num_speculative_tokens": 64})
    output = run(chain, "a", max_tokens=67, ignore_eos=True)
    assert output.outputs[0].token_ids == tuple((CYCLE * 3)[1:68])
    assert output.speculation.accepted_by_depth == (2,) * 64
    assert output.speculation.depths[1:66] == (*range(1, 65), 0)


# ---------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt: it is empty"),
        ({"prompt_token_ids": []}, "prompt: it is empty"),
        ({"prompt_token_ids": [1] * 96}, "96 tokens leave no room in the context of 96"),
        ("x" * 500, "500 tokens leave no room"),
        ({"prompt_token_ids": [0, VOCAB]}, f"outside the vocabulary of {VOCAB}"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids: a token is outside"),
        ({"tokens": [1]}, "give a text or"),
    ],
)
def test_prompt_that_cannot_run_is_refused(prompt: Any, message: str, make: Make) -> None:
    llm = make("mixed", CHAIN)
    with pytest.raises(AquilineError, match=message) as caught:
        llm.generate(["fine", prompt], GREEDY)
    assert "\n" not in str(caught.value)
    assert_idle(llm)  # the good prompt beside it was withdrawn


def test_options_that_cannot_be_met_are_refused(make: Make, folders: dict[str, Path]) -> None:
    target = str(folders["clean"])
    with pytest.raises(AquilineError, match="max_seqs"):
        LLM(target, max_seqs=3)
    with pytest.raises(AquilineError, match="dtype='int8'"):
        LLM(target, "int8")  # type: ignore[arg-type]
    with pytest.raises(AquilineError, match="unknown field 'depth'"):
        LLM(target, speculative_config={"depth": 3})
    with pytest.raises(AquilineError, match="no draft is shipped"):
        LLM(target, speculative_config={})
    with pytest.raises(AquilineError, match="tree='oak'"):
        make("clean", {"tree": "oak"})
    with pytest.raises(AquilineError, match="2 for 1 prompts"):
        make("clean", None).generate("a", [GREEDY, GREEDY])
    with pytest.raises(AquilineError, match="tensor_parallel_size=2"):
        LLM(target, tensor_parallel_size=2)
    for option in ("max_num_seqs", "page_size", "max_model_len", "kv_cache_tokens"):
        with pytest.raises(AquilineError, match=f"{option}=0"):
            LLM(target, **{option: 0})


def test_unknown_device_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(AquilineError, match="device='banana'"):
        LLM(str(folders["clean"]), device="banana")
