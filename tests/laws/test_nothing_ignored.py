"""Law 5: every field changes the result as it is documented to, or is refused with its name.

A text is compared with one that is made token by token: whole forwards without a cache, the
oracle's adjustments and distribution, the noise of the choice. A new field without a case here
fails the last test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
import torch

from aquiline.core.errors import AquilineError
from aquiline.core.guided_params import StructuredOutput
from aquiline.core.outputs import RequestOutput
from aquiline.core.params import SamplingParams, SpeculationParams
from aquiline.engine.llm import LLM
from aquiline.evaluation.oracle import adjusted_logits, target_distribution
from aquiline.kernels import ops
from tests.laws.tiny import features_of
from tests.tiny_checkpoint import CYCLE, IM_END, VOCAB, token
from tests.tiny_engine import CHAIN, TREE, Make

PROMPT = {"prompt_token_ids": CYCLE[2:9]}
BASE = SamplingParams(temperature=1.5, seed=3, max_tokens=24, ignore_eos=True)
GREEDY = {"temperature": 0.0}
EARLY = {"stop_token_ids": tuple(CYCLE[:20])}  # ends as soon as it may


_DOCUMENTED: dict[tuple[str, int], list[int]] = {}  # shapes and paces share their questions


def documented(llm: LLM, params: SamplingParams, choice: int = 0) -> list[int]:
    """The text's tokens as SamplingParams describes them, up to a token that ends it."""
    if (key := (repr(params), choice)) in _DOCUMENTED:
        return _DOCUMENTED[key]
    target = llm.engine.runner.models.target
    prompt: list[int] = PROMPT["prompt_token_ids"]
    said: list[int] = []
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else (IM_END,))}
    words = [llm.tokenizer.encode(word)[0] for word in params.bad_words]
    spelled = replace(params, banned_token_ids=(*params.banned_token_ids, *words))
    if params.structured_outputs is not None:
        assert params.structured_outputs == StructuredOutput(regex="[d-n]*")
        letters = tuple(token(letter) for letter in "defghijklmn")
        spelled = replace(params, structured_outputs=None, allowed_token_ids=(*letters, IM_END))
    while len(said) < (params.max_tokens or 0):
        text = [*prompt, *said]
        logits = target.logits(features_of(target, text)[:, -1])[0]
        adjusted = adjusted_logits(logits, spelled, prompt, said, ends)
        scores = target_distribution(adjusted, params).log()
        if params.temperature > 0:
            seed, index = torch.tensor([params.seed]), torch.tensor([choice])
            noise = ops.gumbel_noise(seed, index, torch.tensor([[len(text)]]), VOCAB)
            scores = scores + noise[0, 0]
        said.append(int(scores.argmax()))
        if said[-1] in ends:
            break
    _DOCUMENTED[key] = said
    return said


@dataclass(frozen=True)
class Case:
    """``changes`` to BASE with ``beside``; ``shows`` what else the documentation promises."""

    changes: dict[str, Any]
    shows: Callable[[RequestOutput, RequestOutput], bool] = lambda _before, _after: True
    beside: dict[str, Any] = field(default_factory=dict)
    same_tokens: bool = False  # another view of the same text


def text(output: RequestOutput) -> str:
    return output.outputs[0].text


CASES = {
    "max_tokens": Case({"max_tokens": 5}, lambda b, a: text(b).startswith(text(a))),
    "temperature": Case({"temperature": 0.0}),
    "top_k": Case({"top_k": 2}),
    "top_p": Case({"top_p": 0.3}),
    "min_p": Case({"min_p": 0.4}),
    "seed": Case({"seed": 4}),
    "stop": Case(
        {"stop": ("e",)}, lambda b, a: text(a) == text(b).partition("e")[0], GREEDY, True
    ),
    "stop_token_ids": Case({"stop_token_ids": (token("e"),)}, beside=GREEDY),
    "ignore_eos": Case({"ignore_eos": False}, beside={**GREEDY, "logit_bias": {IM_END: 6.0}}),
    "skip_special_tokens": Case(
        {"skip_special_tokens": False},
        lambda b, a: "<|im_end|>" in text(a) and text(b) == text(a).replace("<|im_end|>", ""),
        {**GREEDY, "logit_bias": {IM_END: 6.0}}, True,
    ),
    "n": Case({"n": 3}, lambda _, a: len({c.token_ids for c in a.outputs}) == 3, {}, True),
    "min_tokens": Case(
        {"min_tokens": 7},
        lambda b, a: len(b.outputs[0].token_ids) < 7 < len(a.outputs[0].token_ids), EARLY,
    ),
    "presence_penalty": Case({"presence_penalty": 2.0}),
    "frequency_penalty": Case({"frequency_penalty": -2.0}),
    "repetition_penalty": Case({"repetition_penalty": 3.0}),
    "logit_bias": Case({"logit_bias": {token("q"): 4.0, token("k"): -100.0}}),
    "allowed_token_ids": Case({"allowed_token_ids": tuple(CYCLE[5:15])}),
    "banned_token_ids": Case({"banned_token_ids": tuple(CYCLE[8:15])}),
    "bad_words": Case({"bad_words": ("k", "l")}, lambda _, a: not set("kl") & set(text(a))),
    "logprobs": Case(
        {"logprobs": 0},
        lambda b, a: b.outputs[0].logprobs is None and a.outputs[0].logprobs is not None, {}, True,
    ),
    "prompt_logprobs": Case(
        {"prompt_logprobs": 0},
        lambda b, a: b.prompt_logprobs is None and a.prompt_logprobs is not None, {}, True,
    ),
    "speculation": Case(
        {"speculation": False},
        lambda b, a: b.speculation.drafted > 0 and a.speculation.drafted == 0
        and a.speculation.rounds == len(a.outputs[0].token_ids) - 1, {}, True,
    ),
    "structured_outputs": Case(
        {"structured_outputs": {"regex": "[d-n]*"}},
        lambda _, a: set(text(a)) <= set("defghijklmn"), {"ignore_eos": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("name", CASES)
def test_a_field_changes_the_result_as_documented(name: str, shape: str, make: Make) -> None:
    case, llm = CASES[name], make("mixed", {"chain": CHAIN, "tree": TREE}[shape])
    before = replace(BASE, **case.beside)
    after = replace(before, **case.changes)
    assert set(case.changes) == {name}
    outputs = [llm.generate(PROMPT, params)[0] for params in (before, after)]
    first = [output.outputs[0].token_ids for output in outputs]
    if name == "stop":  # documented() knows tokens alone
        assert first[1] == first[0][: len(first[1])]
        assert len(first[1]) < len(first[0])
    else:
        for output, params in zip(outputs, (before, after), strict=True):
            for choice in output.outputs:
                assert list(choice.token_ids) == documented(llm, params, choice.index)
        assert (first[0] == first[1]) == case.same_tokens
    assert case.shows(*outputs)


def test_every_field_has_a_case() -> None:
    assert set(CASES) == {one.name for one in fields(SamplingParams)}


# ------------------------------------------------------------------------- refused with their names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, f"logit_bias: token {VOCAB}"),
        ({"allowed_token_ids": (1, VOCAB)}, f"allowed_token_ids: token {VOCAB}"),
        ({"banned_token_ids": (VOCAB + 5,)}, f"banned_token_ids: token {VOCAB + 5}"),
        ({"stop_token_ids": (VOCAB,)}, f"stop_token_ids: token {VOCAB}"),
        ({"banned_token_ids": tuple(range(VOCAB))}, "banned_token_ids: no token is left"),
        (
            {"allowed_token_ids": (70,), "bad_words": ("g",)},
            r"allowed_token_ids=\(70,\): banned_token_ids",
        ),
        ({"bad_words": ("be",)}, "bad_words: 'be' is 2 tokens"),
        ({"min_tokens": 95, "max_tokens": None}, "min_tokens=95: .* room for 89"),
        (
            {"allowed_token_ids": (70,), "stop_token_ids": (70,), "min_tokens": 2},
            "allowed_token_ids: ",
        ),
        ({"stop_token_ids": tuple(range(65)), "min_tokens": 2}, "stop_token_ids: .*64"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    changes: dict[str, Any], message: str, make: Make
) -> None:
    llm = make("mixed", CHAIN)
    with pytest.raises(AquilineError, match=message) as caught:
        llm.generate(PROMPT, replace(BASE, **changes))
    assert "\n" not in str(caught.value)
    assert not llm.engine.has_work


def test_every_speculation_field_counts(make: Make) -> None:
    """Or is refused: a table that does not exist, a method that the draft's keys contradict."""
    params = replace(BASE, temperature=0.0, max_tokens=17)

    def speculate(draft: str = "draft", **config: Any) -> RequestOutput:
        return make("clean", config, draft).generate(PROMPT, params)[0]

    chain, longer = speculate(num_speculative_tokens=1), speculate(num_speculative_tokens=3)
    assert chain.speculation.rounds > longer.speculation.rounds
    assert speculate(tree=[[0], [1]]).speculation.drafted == 2 * chain.speculation.drafted
    worse = speculate("bad-draft", num_speculative_tokens=3)
    assert worse.speculation.rounds > longer.speculation.rounds
    twice = {
        "prompt_token_ids": (CYCLE * 2)[: len(CYCLE) + 3]
    }  # the bad draft's text is read there
    retrieved = make("clean", {**CHAIN, "retrieval": 4}, "bad-draft").generate(twice, params)[0]
    assert retrieved.speculation.accepted_by_depth[3] > 0, "no drafted node is so deep"
    for config in (
        {"method": "eagle3"}, {"tree": "auto", "dispatch_table": "none.json"}, {"model": "nowhere"},
    ):  # fmt: skip
        with pytest.raises(AquilineError):
            speculate(**config)
    warm = replace(params, temperature=2.0)
    texts = {
        make("mixed", {**CHAIN, "verification": rule}).generate(PROMPT, warm)[0].outputs[0].text
        for rule in ("coupled", "multi-round")
    }
    assert len(texts) == 2
    tried = {
        "num_speculative_tokens", "tree", "model", "method", "dispatch_table", "verification",
        "retrieval",
    }  # fmt: skip
    assert tried == {one.name for one in fields(SpeculationParams)}
