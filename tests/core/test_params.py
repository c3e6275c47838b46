"""Every bad value is refused with the field's name; every good one is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from aquiline.core.errors import AquilineError
from aquiline.core.guided_params import StructuredOutput
from aquiline.core.params import MAX_SEED, SamplingParams, SpeculationParams

NAN, INF = float("nan"), float("inf")
BAD_SAMPLING = [
    ("max_tokens", 0), ("max_tokens", -1), ("temperature", -0.1), ("temperature", NAN),
    ("temperature", INF), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("top_p", NAN),
    ("top_p", -0.5), ("min_p", -0.1), ("min_p", 1.5), ("min_p", NAN), ("seed", -1),
    ("seed", MAX_SEED + 1), ("stop", ""), ("stop", ("a", "")), ("n", 0), ("n", 129),
    ("min_tokens", -1), ("min_tokens", 17), ("presence_penalty", 2.1), ("presence_penalty", NAN),
    ("frequency_penalty", -2.1), ("repetition_penalty", 0), ("repetition_penalty", INF),
    ("logit_bias", {1: 100.5}), ("logit_bias", {1: NAN}), ("logit_bias", {-1: 1.0}),
    ("logit_bias", dict.fromkeys(range(1025), 1.0)), ("allowed_token_ids", ()),
    ("allowed_token_ids", (-1,)), ("banned_token_ids", (-1,)), ("bad_words", ("a", "")),
    ("logprobs", -1), ("logprobs", 21), ("prompt_logprobs", 21),
]  # fmt: skip
WRONG_TYPES = [
    ("max_tokens", 2.5), ("max_tokens", "5"), ("temperature", "hot"), ("top_k", 1.5),
    ("top_k", "1"), ("top_p", "all"), ("seed", 1.5), ("seed", "x"), ("stop", (1,)),
    ("stop_token_ids", (-1,)), ("stop_token_ids", (1.5,)), ("stop_token_ids", ("a",)),
    ("stop", 5), ("stop_token_ids", 5), ("allowed_token_ids", 5), ("allowed_token_ids", "a"),
    ("banned_token_ids", None), ("bad_words", (3,)), ("n", 1.0), ("n", True), ("min_tokens", "3"),
    ("presence_penalty", "1"), ("logit_bias", [(1, 2.0)]), ("logit_bias", {"1": 2.0}),
    ("logit_bias", {1: "2"}), ("logprobs", True), ("prompt_logprobs", 1.5), ("ignore_eos", 1),
    ("skip_special_tokens", "no"),
    ("speculation", 1),
]  # fmt: skip
BAD_SPECULATION = [
    ("method", "medusa"), ("method", "eagle2"), ("method", 3),
    ("verification", "typical"), ("num_speculative_tokens", 0),
    ("num_speculative_tokens", 65), ("retrieval", -1),
    ("retrieval", 65), ("retrieval", True), ("num_speculative_tokens", -3), ("tree", 5),
    ("tree", [["a"]]), ("tree", [0, 1]), ("dispatch_table", 3), ("dispatch_table", ""),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_SAMPLING + WRONG_TYPES)
def test_bad_sampling_field_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(AquilineError, match=rf"^{field}=") as caught:
        SamplingParams(**{field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"), [*BAD_SPECULATION, ("num_speculative_tokens", "3"), ("model", 3)]
)
def test_bad_speculation_field_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(AquilineError, match=rf"^{field}=") as caught:
        SpeculationParams.from_config({field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rule", ["multi-round", "block"])
def test_rules_that_need_drawn_children_refuse_retrieval_by_name(rule: Any) -> None:
    with pytest.raises(AquilineError, match=rf"retrieval=4: verification='{rule}'.*'coupled'"):
        SpeculationParams(verification=rule, retrieval=4)
    assert SpeculationParams(verification=rule).retrieval == 0
    assert SpeculationParams(verification="target-only", retrieval=4).retrieval == 4


@pytest.mark.parametrize("tree", ["auto", "tree-8", [[0], [1]]])
def test_block_verification_refuses_trees_by_name(tree: Any) -> None:
    with pytest.raises(AquilineError, match=r"^tree=.*judges chains"):
        SpeculationParams(verification="block", tree=tree)
    for chain in (None, "chain-4", [[0], [0, 0]]):
        SpeculationParams(verification="block", tree=chain)  # type: ignore[arg-type]


def test_chain_and_tree_together_are_refused() -> None:
    with pytest.raises(AquilineError, match="not both"):
        SpeculationParams(num_speculative_tokens=3, tree="eagle-25")


def test_a_dispatch_table_goes_with_the_automatic_tree_alone() -> None:
    for tree in (None, "chain-3", [[0]]):
        with pytest.raises(AquilineError, match=r"^dispatch_table=.*tree='auto'"):
            SpeculationParams.from_config({"tree": tree, "dispatch_table": "table.json"})
    with pytest.raises(AquilineError, match="not both"):
        SpeculationParams(num_speculative_tokens=3, tree="auto")
    params = SpeculationParams.from_config({"tree": "auto", "dispatch_table": "table.json"})
    assert (params.tree, params.dispatch_table) == ("auto", "table.json")
    assert SpeculationParams(tree="auto").dispatch_table is None


def test_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(AquilineError, match=r"unknown field 'num_spec'.*num_speculative_tokens"):
        SpeculationParams.from_config({"method": "eagle", "num_spec": 3})


def test_fields_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(AquilineError, match=r"^min_tokens=4: .*max_tokens=3"):
        SamplingParams(min_tokens=4, max_tokens=3)
    assert SamplingParams(min_tokens=4, max_tokens=None).min_tokens == 4
    with pytest.raises(AquilineError, match=r"^allowed_token_ids=\(5, 6\): banned_token_ids"):
        SamplingParams(allowed_token_ids=(5, 6), banned_token_ids=(6, 7, 5))


def test_params_keep_their_own_copy_and_can_be_hashed() -> None:
    bias = {3: 1.5}
    params = SamplingParams(logit_bias=bias, allowed_token_ids=[1, 2], bad_words="no")  # type: ignore[arg-type]
    bias[3] = 9.0
    assert params.logit_bias == {3: 1.5}
    assert (params.allowed_token_ids, params.bad_words) == ((1, 2), ("no",))
    assert hash(params) == hash(replace(params))
    assert params != replace(params, logit_bias=bias)


def test_good_values_are_kept() -> None:
    params = SamplingParams(
        max_tokens=None, temperature=0, top_k=5, top_p=1.0, min_p=1.0, seed=MAX_SEED, stop="end",
        stop_token_ids=[3, 4],  # type: ignore[arg-type]
    )  # fmt: skip
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert (params.max_tokens, params.top_k, params.seed) == (None, 5, MAX_SEED)
    speculation = SpeculationParams.from_config({"tree": [[0], [1], [0, 0]]})
    assert speculation.tree == ((0,), (1,), (0, 0))
    assert SpeculationParams().method == "eagle"
    assert SpeculationParams.from_config({"method": "eagle3"}).method == "eagle3"
    assert SpeculationParams(num_speculative_tokens=64).num_speculative_tokens == 64
    with pytest.raises(AttributeError):
        params.seed = 1  # type: ignore[misc]


def test_a_form_is_taken_as_a_mapping_too():
    params = SamplingParams(structured_outputs={"choice": ["a", "b"]})
    assert params.structured_outputs == StructuredOutput(choice=("a", "b"))
    assert hash(params) == hash(
        SamplingParams(structured_outputs=StructuredOutput(choice=["a", "b"]))
    )


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("json", "structured_outputs='json': give a StructuredOutput"),
        ({"schema": {}}, "structured_outputs: unknown field 'schema'"),
        ({"json": {}, "regex": "a"}, "json and regex given"),
        ({}, "nothing given"),
    ],
)
def test_a_form_that_is_none_is_refused(form, message):
    with pytest.raises(AquilineError, match=message):
        SamplingParams(structured_outputs=form)


@pytest.mark.parametrize(
    "beside",
    [
        {"min_tokens": 1},
        {"ignore_eos": True},
        {"allowed_token_ids": (1,)},
        {"banned_token_ids": (1,)},
        {"bad_words": ("a",)},
    ],
)
def test_what_contradicts_a_form_is_refused_by_name(beside):
    with pytest.raises(AquilineError, match=next(iter(beside))):
        SamplingParams(structured_outputs={"regex": "a"}, **beside)
