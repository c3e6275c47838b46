"""Law 4: log-probabilities are those of the raw logits, whatever else was asked for.

Against an oracle without cache, tree or round: one forward over the whole text, log-softmax in
float64. And against plain decoding: the same mappings, on every shape, in batches, after
preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from aquiline.core.outputs import CompletionOutput, Logprobs, RequestOutput
from aquiline.core.params import SamplingParams
from aquiline.decoding import prompt_scores
from aquiline.engine.llm import LLM
from tests.laws.tiny import features_of
from tests.tiny_checkpoint import CYCLE, token
from tests.tiny_engine import (
    CHAIN,
    SHAPES,
    TREE,
    Make,
    assert_idle,
    count_preemptions,
    mixed_params,
    prompts,
)

TOLERANCE = 1e-3  # the law's; in float64 with fp32 results far less is needed
WARM = SamplingParams(temperature=1.5, seed=3, max_tokens=16, ignore_eos=True, logprobs=5)


def oracle(llm: LLM, text: Sequence[int]) -> torch.Tensor:
    """[T, V] float64 log-probabilities after each token of a text."""
    target = llm.engine.runner.models.target
    return target.logits(features_of(target, text))[0].double().log_softmax(dim=-1)


def assert_scores(shown: Logprobs, said: int, law: torch.Tensor, count: int) -> None:
    """One token's mapping against the law [V] at its position."""
    tokens = list(shown)
    assert tokens[0] == said
    best = [one for one, score in shown.items() if score.rank <= count]
    assert len(best) >= count
    assert len(shown) <= count + 1
    for one, score in shown.items():
        assert score.logprob == pytest.approx(float(law[one]), abs=1e-5)
    rank = 1 + sum(float(value) > shown[said].logprob + 1e-5 for value in law)
    assert rank <= shown[said].rank <= 1 + sum(float(v) > shown[said].logprob - 1e-5 for v in law)
    top = law.sort(descending=True).values[:count].tolist()
    ranked = sorted((score.rank, score.logprob) for score in shown.values())[:count]
    assert [value for _, value in ranked] == pytest.approx(top, abs=1e-5)


def assert_oracle(llm: LLM, output: RequestOutput, count: int) -> None:
    for choice in output.outputs:
        laws = oracle(llm, [*output.prompt_token_ids, *choice.token_ids])
        start = len(output.prompt_token_ids) - 1
        assert choice.logprobs is not None
        assert len(choice.logprobs) == len(choice.token_ids) > 0
        for at, (said, shown) in enumerate(zip(choice.token_ids, choice.logprobs, strict=True)):
            assert_scores(shown, said, laws[start + at], count)
        total = sum(shown[said].logprob for said, shown in zip(choice.token_ids, choice.logprobs,
                                                               strict=True))  # fmt: skip
        assert choice.cumulative_logprob == pytest.approx(total)


def assert_same(one: CompletionOutput, other: CompletionOutput) -> None:
    assert one.token_ids == other.token_ids
    assert one.logprobs is not None
    assert other.logprobs is not None
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        assert list(a) == list(b)
        for key in a:
            assert a[key].logprob == pytest.approx(b[key].logprob, abs=TOLERANCE)
            assert (a[key].rank, a[key].decoded_token) == (b[key].rank, b[key].decoded_token)


def asking(count: int) -> list[SamplingParams]:
    """Every parameter, with 0 to 20 alternatives."""
    return [
        replace(one, logprobs=(0, 1, 3, 20)[i % 4]) for i, one in enumerate(mixed_params(count))
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_are_the_oracles(shape: str, make: Make) -> None:
    llm = make("mixed", SHAPES[shape])
    params = asking(10)
    for one, output in zip(params, llm.generate(prompts(10), params), strict=True):
        assert_oracle(llm, output, one.logprobs or 0)
    if shape != "plain":
        assert output.speculation.tokens > output.speculation.rounds


@pytest.mark.parametrize("shape", ["plain", "chain", "tree"])
def test_logprobs_are_those_of_plain_decoding_after_preemption(
    shape: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make("mixed", SHAPES[shape], max_model_len=64, kv_cache_tokens=80, page_size=4)
    asked = [{"prompt_token_ids": CYCLE[n : n + 9]} for n in range(8)]
    params = [replace(one, max_tokens=30, n=1 + i % 2) for i, one in enumerate(asking(8))]
    preempted = count_preemptions(llm, monkeypatch)
    outputs = llm.generate(asked, params)
    assert preempted, "the pool was large enough; the test tests nothing"
    assert_idle(llm)
    alone = make("mixed", None, max_num_seqs=1)
    for prompt, one, output in zip(asked, params, outputs, strict=True):
        (expected,) = alone.generate(prompt, one)
        for choice, plain in zip(output.outputs, expected.outputs, strict=True):
            assert_same(choice, plain)


@pytest.mark.parametrize("changes", [{"stop": ("e",)}, {"stop_token_ids": (token("e"),)}, {}])
def test_logprobs_are_cut_with_the_tokens(changes: dict[str, Any], make: Make) -> None:
    """A round of the perfect draft goes past the end of the text."""
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, **changes)
    llm = make("clean", CHAIN)
    (output,) = llm.generate("b", params)
    assert output.outputs[0].token_ids == (token("c"), token("d"), token("e"))
    assert_oracle(llm, output, 2)
    shown = output.outputs[0].logprobs
    assert shown is not None
    assert shown[0][token("c")].decoded_token == "c"


def test_logprobs_beside_requests_that_want_none(make: Make) -> None:
    llm = make("mixed", TREE)
    outputs = llm.generate(prompts(4), [WARM, replace(WARM, logprobs=None)] * 2)
    for output in outputs[::2]:
        assert_oracle(llm, output, 5)
    for output in outputs[1::2]:
        assert output.outputs[0].logprobs is None
        assert output.outputs[0].cumulative_logprob is None


def test_logprobs_grow_with_the_stream(make: Make) -> None:
    outputs = list(make("mixed", CHAIN).stream("abc", WARM))
    for output in outputs:
        choice = output.outputs[0]
        assert choice.logprobs is not None
        assert len(choice.logprobs) == len(choice.token_ids)
    assert len(outputs) > 3


# ----------------------------------------------------------------------------------- the prompt's


@pytest.mark.parametrize("shape", ["plain", "tree"])
def test_prompt_logprobs_are_the_oracles(
    shape: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch with a request that wants none, with chunks shorter than the prompts."""
    monkeypatch.setattr(prompt_scores, "CHUNK", 4)
    llm = make("mixed", SHAPES[shape])
    asked = [{"prompt_token_ids": CYCLE[:n]} for n in (1, 2, 5, 9, 20)]
    wishes = [3, 0, 20, None, 2]
    params = [replace(WARM, prompt_logprobs=k, logprobs=None, n=1 + i % 2)
              for i, k in enumerate(wishes)]  # fmt: skip
    for count, output in zip(wishes, llm.generate(asked, params), strict=True):
        shown = output.prompt_logprobs
        if count is None:
            assert shown is None
            continue
        assert shown is not None
        assert len(shown) == len(output.prompt_token_ids)
        assert shown[0] is None
        laws = oracle(llm, output.prompt_token_ids)
        for at, scores in enumerate(shown[1:], 1):
            assert scores is not None
            assert_scores(scores, output.prompt_token_ids[at], laws[at - 1], count)


def test_prompt_logprobs_are_kept_through_preemption(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make("mixed", CHAIN, max_model_len=64, kv_cache_tokens=80, page_size=4)
    asked = [{"prompt_token_ids": CYCLE[n : n + 9]} for n in range(6)]
    params = replace(WARM, max_tokens=40, prompt_logprobs=1)
    preempted = count_preemptions(llm, monkeypatch)
    outputs = llm.generate(asked, params)
    assert preempted
    for prompt, output in zip(asked, outputs, strict=True):
        (alone,) = make("mixed", None).generate(prompt, params)
        assert output.prompt_logprobs is not None
        assert alone.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == 9
        for one, other in zip(output.prompt_logprobs[1:], alone.prompt_logprobs[1:], strict=True):
            assert one is not None
            assert other is not None
            assert list(one) == list(other)
