"""Texts of a given form through the engine: valid, and for a seed those of plain decoding."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from aquiline.core.errors import AquilineError
from aquiline.core.guided_params import StructuredOutput
from aquiline.core.outputs import RequestOutput
from aquiline.core.params import SamplingParams
from tests.tiny_checkpoint import CYCLE, IM_END
from tests.tiny_engine import (
    CHAIN,
    FORMS,
    LETTERS,
    SCHEMA,
    SHAPES,
    TREE,
    Make,
    assert_idle,
    count_preemptions,
    forms_and_none,
    prompts,
    said,
)

WARM = SamplingParams(temperature=2.0, top_p=0.95, max_tokens=70)


def assert_has_form(output: RequestOutput, form: dict[str, Any]) -> None:
    for choice in output.outputs:
        if choice.finish_reason == "stop":
            assert choice.token_ids[-1] == IM_END
            if "json" in form:
                jsonschema.validate(json.loads(choice.text), form["json"])
            elif "regex" in form:
                assert re.fullmatch(form["regex"], choice.text)
            elif "choice" in form:
                assert choice.text in form["choice"]
            elif "grammar" in form:
                assert re.fullmatch(r"[(x-z]*o\)*", choice.text)
                assert choice.text.count("(") == choice.text.count(")")
            else:
                assert isinstance(json.loads(choice.text), dict)
        else:
            assert choice.finish_reason == "length"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_have_their_form_and_are_those_of_plain_decoding(
    shape: str, temperature: float, make: Make
) -> None:
    params = [
        replace(p, temperature=temperature) for p in forms_and_none(12)
    ]  # several grammars and none in a batch of four, at every depth of their texts
    llm, asked = make("mixed", SHAPES[shape]), prompts(12)
    outputs = llm.generate(asked, params)
    assert_idle(llm)
    expected = make("mixed", None, max_num_seqs=1).generate(asked, params)
    assert list(map(said, outputs)) == list(map(said, expected))
    guided = [i for i, one in enumerate(params) if one.structured_outputs is not None]
    for i in guided:
        assert_has_form(outputs[i], FORMS[i % len(FORMS)])
    assert any(outputs[i].outputs[0].finish_reason == "stop" for i in guided)
    if shape != "plain":
        rounds = sum(o.speculation.rounds for o in outputs)
        assert rounds < sum(o.speculation.rounds for o in expected)


@pytest.mark.parametrize("shape", ["tree", "retrieving"])
def test_forms_beside_one_that_declines_speculation(shape: str, make: Make) -> None:
    """Rounds with forms change between the tree and a root alone; the texts stay."""
    llm, asked, params = make("mixed", SHAPES[shape]), prompts(6), forms_and_none(6, 30)
    declining = [replace(one, speculation=i != 1) for i, one in enumerate(params)]
    expected, outputs = llm.generate(asked, params), llm.generate(asked, declining)
    assert_idle(llm)
    assert list(map(said, outputs)) == list(map(said, expected))
    assert outputs[1].speculation.drafted == 0 < expected[1].speculation.drafted
    assert sum(one.speculation.drafted for one in outputs) > 0


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_the_end_of_a_form_inside_an_accepted_run_ends_the_text(shape: str, make: Make) -> None:
    """The clean target recites the alphabet and its draft is perfect."""
    llm = make("clean", SHAPES[shape])
    for last in "ijklm":
        params = SamplingParams(
            temperature=0, max_tokens=30, structured_outputs={"regex": f"d[d-z]*{last}"}
        )
        (output,) = llm.generate("abc", params)
        assert output.outputs[0].finish_reason in ("stop", "length")
        text = "".join(chr(c) for c in range(ord("d"), ord(last) + 1))
        params = replace(params, structured_outputs={"choice": [text]})
        (output,) = llm.generate("abc", params)
        assert said(output)[1:] == (text, "stop")
        assert output.outputs[0].token_ids[-1] == IM_END
        (cut,) = llm.generate("abc", replace(params, max_tokens=len(text)))
        assert said(cut)[1:] == (text, "length")  # the end itself was not said
    assert_idle(llm)


@pytest.mark.parametrize("shape", ["plain", "chain", "tree"])
def test_preempted_texts_keep_their_form(
    shape: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make("mixed", SHAPES[shape], max_model_len=64, kv_cache_tokens=80, page_size=4)
    asked = [{"prompt_token_ids": CYCLE[n : n + 9]} for n in range(6)]
    params = [replace(p, max_tokens=40, n=1 + i % 3) for i, p in enumerate(forms_and_none(6))]
    preempted = count_preemptions(llm, monkeypatch)
    outputs = llm.generate(asked, params)
    assert preempted, "the pool was large enough; the test tests nothing"
    assert_idle(llm)
    expected = make("mixed", None).generate(asked, params)
    for output, other in zip(outputs, expected, strict=True):
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in other.outputs]


@pytest.mark.parametrize("shape", ["plain", "retrieving"])
def test_forms_begin_where_prompts_end(shape: str, make: Make) -> None:
    """Prompts run in stretches, and asked again, from the prefix cache: all but the last token."""
    llm = make("mixed", SHAPES[shape], page_size=4, max_num_batched_tokens=7)
    asked, params = prompts(8), forms_and_none(8, 30)
    expected = make("mixed", None, max_num_seqs=1).generate(asked, params)
    for known in (0, 1):
        outputs = llm.generate(asked, params)
        assert list(map(said, outputs)) == list(map(said, expected))
        for output in outputs:
            cached = len(output.prompt_token_ids) - 1
            assert output.num_cached_tokens == cached or not known
    assert_idle(llm)


def test_choices_have_matchers_of_their_own(make: Make) -> None:
    params = replace(WARM, n=5, seed=4, structured_outputs={"regex": LETTERS})
    (output,) = make("mixed", TREE).generate("abc", params)
    (expected,) = make("mixed", None, max_num_seqs=1).generate("abc", params)
    assert [c.token_ids for c in output.outputs] == [c.token_ids for c in expected.outputs]
    assert len({c.token_ids for c in output.outputs}) == 5
    assert_has_form(output, {"regex": LETTERS})


@pytest.mark.parametrize("shape", ["plain", "chain"])
def test_max_tokens_cuts_a_form(shape: str, make: Make) -> None:
    params = replace(WARM, structured_outputs={"json": SCHEMA}, seed=1)
    for limit in (1, 2, 3, 7):
        (output,) = make("mixed", SHAPES[shape]).generate("abc", replace(params, max_tokens=limit))
        assert len(output.outputs[0].token_ids) == limit
        assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("shape", ["plain", "chain", "tree"])
def test_a_form_that_leads_nowhere_is_given_up(shape: str, make: Make) -> None:
    params = replace(WARM, seed=1, structured_outputs={"grammar": 'root ::= "ab" x\nx ::= x "c"'})
    llm = make("clean", SHAPES[shape])
    (output, other) = llm.generate(["abc", "abc"], [params, replace(WARM, seed=1)])
    assert said(output)[1:] == ("ab", "abort")
    assert other.outputs[0].finish_reason != "abort"
    assert_idle(llm)


@pytest.mark.parametrize("rule", ["multi-round", "target-only", "independent", "block"])
def test_every_rule_keeps_to_the_form(rule: str, make: Make) -> None:
    shape = CHAIN if rule == "block" else TREE
    llm = make("mixed", {**shape, "verification": rule})
    for form in FORMS:
        outputs = llm.generate(prompts(6), replace(WARM, structured_outputs=form, seed=9))
        for output in outputs:
            assert_has_form(output, form)
    greedy = SamplingParams(temperature=0, max_tokens=40, structured_outputs=FORMS[1])
    expected = make("mixed", None).generate(prompts(6), greedy)
    assert list(map(said, llm.generate(prompts(6), greedy))) == list(map(said, expected))


@pytest.mark.parametrize("shape", ["plain", "chain"])
def test_scores_are_of_the_raw_logits(shape: str, make: Make) -> None:
    params = replace(WARM, seed=2, logprobs=3, structured_outputs={"choice": ["xyzzy"]})
    (output,) = make("mixed", SHAPES[shape]).generate("abc", params)
    choice = output.outputs[0]
    assert choice.text == "xyzzy"
    free = replace(params, structured_outputs=None, max_tokens=1)
    (plain,) = make("mixed", None).generate("abc", free)
    assert choice.logprobs is not None
    assert plain.outputs[0].logprobs is not None
    likeliest = {token for token, score in plain.outputs[0].logprobs[0].items() if score.rank <= 3}
    assert likeliest <= set(choice.logprobs[0])
    assert max(score.rank for scores in choice.logprobs for score in scores.values()) > 3


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json": {"type": "object", "not": {}}}, "json: .*not"),
        (
            {"json": {"type": "object", "properties": {"a": {"type": "odd"}}}},
            "json: #/properties/a",
        ),
        ({"regex": "(?=a)b"}, "regex: .*at 0"),
        ({"grammar": "root ::= other"}, "grammar: .*other"),
    ],
)
def test_what_does_not_compile_is_refused_with_its_place(
    form: dict[str, Any], message: str, make: Make
) -> None:
    llm = make("mixed", CHAIN)
    with pytest.raises(AquilineError, match=message) as caught:
        llm.generate("abc", replace(WARM, structured_outputs=form))
    assert "\n" not in str(caught.value)
    assert not llm.engine.has_work


def test_a_form_is_compiled_once(make: Make) -> None:
    grammars = make("mixed", CHAIN).engine.grammars
    forms = [StructuredOutput(json=SCHEMA), StructuredOutput(json=json.dumps(SCHEMA))]
    assert grammars.compile(forms[0]) is grammars.compile(forms[1])
