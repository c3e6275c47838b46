"""The tool-call data's types become JSON Schema; every failure is named."""

from __future__ import annotations

import json
import random

import pytest

from aquiline.core.errors import DataError
from aquiline.core.outputs import CompletionOutput
from benchmarks.tool_schemas import (
    FILES,
    compile_all,
    json_schema,
    mask_microseconds,
    quantiles,
    tool_calls,
    verdict,
)  # fmt: skip
from tests.guided.forms import accepts, grammars

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
    compiled = compile_all(grammars(), calls)
    assert list(compiled.grammars) == ["one"]
    assert list(compiled.failures) == ["two"]
    assert "'missing'" in compiled.failures["two"]
    grammar = compiled.grammars["one"]
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
