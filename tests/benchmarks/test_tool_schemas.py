"""The tool-call data's types become JSON Schema; every failure is named."""

from __future__ import annotations

import json
import random
from argparse import Namespace

import pytest
import torch

from aquiline.core.errors import DataError
from aquiline.core.outputs import CompletionOutput
from benchmarks.common import write_section
from benchmarks.tool_schemas import (
    FILES,
    compile_all,
    json_schema,
    mask_microseconds,
    quantiles,
    through_engine,
    tool_calls,
    under_the_form,
    verdict,
)  # fmt: skip
from tests.guided.forms import END, VOCAB, accepts, compiled, grammars
from tests.tiny_checkpoint import write_draft, write_target

PARAMETERS = {
    "type": "dict",
    "properties": {
        "size": {"type": "float", "default": 1.0, "optional": True},
        "where": {"type": "tuple", "items": {"type": "long"}},
        "tags": {"type": "ArrayList", "items": {"type": "String"}, "enum": ["a", "b"]},
        "extra": {"type": "any"},
        "table": {"type": "HashMap"},
    },
    "required": ["size"],
}


def write(folder, *records):
    for name in FILES:
        lines = [json.dumps(record) for record in records if name == FILES[0]]
        (folder / f"BFCL_v4_{name}.json").write_text("\n".join(lines))
    return folder


def record(**parameters):
    function = {"name": "f.g", "description": "d", "parameters": PARAMETERS | parameters}
    question = [[{"role": "user", "content": "Call it."}]]
    return {"id": "one", "question": question, "function": [function]}


def test_types_are_mapped():
    assert json_schema(PARAMETERS) == {
        "type": "object",
        "properties": {
            "size": {"type": "number"},
            "where": {"type": "array", "items": {"type": "integer"}},
            "tags": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}},
            "extra": {},
            "table": {"type": "object"},
        },
        "required": ["size"],
    }


def test_calls_are_read_compiled_and_timed(tmp_path):
    bad = record(required=["missing"]) | {"id": "two"}
    calls = list(tool_calls(write(tmp_path, record(), bad)))
    assert [message["role"] for message in calls[0].messages] == ["system", "user"]
    done = compile_all(grammars(), calls)
    assert list(done.grammars) == ["one"]
    assert list(done.failures) == ["two"]
    assert "'missing'" in done.failures["two"]
    grammar = done.grammars["one"]
    assert accepts(grammar, '{"name": "f.g", "arguments": {"size": 2, "tags": ["b"]}}')
    assert not accepts(grammar, '{"name": "f", "arguments": {"size": 2}}')
    times = mask_microseconds(grammar, random.Random(0), 40)
    assert len(times) == 40
    assert quantiles(times)["median"] > 0


def test_what_is_not_the_package_is_refused(tmp_path):
    with pytest.raises(DataError, match="not found; pip install"):
        list(tool_calls(tmp_path))
    write(tmp_path, record(), record(type="Unheard"))
    with pytest.raises(DataError, match="line 2"):
        list(tool_calls(tmp_path))


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ('{"size": 2}', "stop", "valid"),
        ('{"size": ', "length", "cut"),
        ('{"size": "2"}', "stop", "'2' is not of type 'number'"),
        ('{"size": ', "stop", "Expecting value: line 1 column 10 (char 9)"),
        ("", "abort", "abort"),
    ],
)
def test_answers_are_judged(text, reason, expected):
    schema = {"type": "object", "properties": {"size": {"type": "number"}}}
    assert verdict(CompletionOutput(0, text, (), reason), schema) == expected


def test_answers_of_an_engine_are_compared_with_plain_decoding(tmp_path):
    narrow = {"properties": {"size": {"type": "integer", "enum": [1, 23]}}, "required": ["size"]}
    bad = record(required=["missing"]) | {"id": "two"}
    calls = list(tool_calls(write(tmp_path, record(**narrow), bad, record(**narrow))))
    options = Namespace(
        model=str(write_target(tmp_path / "target", mix=0.15, context=2048)), trees=["chain-3"],
        draft=str(write_draft(tmp_path / "draft", context=2048)), temperatures=[0.0, 0.8],
        max_tokens=80, dtype="float64", device="cpu", batch=2, context=1024, prefill=1024,
        threads=2,
    )  # fmt: skip
    result = through_engine(calls, options)
    assert list(result["refused"]) == ["two"]
    assert result["ok"]
    rows = result["rows"]
    assert [row["tree"] for row in rows] == ["none", "none", "chain-3", "chain-3"]
    for row in rows:
        assert row["same_as_plain"] == row["answers"] == 2
        assert set(row["verdicts"]) <= {"valid", "cut"}
        assert row["verdicts"]["valid"] >= 1
    assert all(row["tpc"] == 1 for row in rows[:2])
    assert all(row["tpc"] > row["tpc_without_foresight"] >= 1 for row in rows[2:])
    write_section(tmp_path / "out.json", "schemas", {"a": 1})
    write_section(tmp_path / "out.json", "engine", {"b": 2})
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "schemas": {"a": 1}, "engine": {"b": 2},
    }  # fmt: skip


def test_a_difference_is_priced_among_what_the_form_allows():
    grammar = compiled(choice=["ab", "ac"])
    logits = torch.zeros(VOCAB)
    logits[[ord("x"), ord("b"), ord("c")]] = torch.tensor([9.0, 2.0, 1.5])
    texts = [(ord("a"), ord("b"), END)]
    perturb = under_the_form(lambda number, position, logits: logits, [grammar], [[5, 5]], texts)
    assert perturb(0, 2, logits).isfinite().nonzero().flatten().tolist() == [ord("a")]
    top = perturb(0, 3, logits).topk(3)
    assert top.indices[:2].tolist() == [ord("b"), ord("c")]
    assert top.values.tolist() == [2.0, 1.5, float("-inf")]
