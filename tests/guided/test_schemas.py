"""Whatever a supported schema's grammar allows is valid; what it would not enforce is refused."""

from __future__ import annotations

import json
import random
from contextlib import suppress

import jsonschema
import pytest

from aquiline.core.errors import AquilineError
from aquiline.core.guided_params import StructuredOutput
from aquiline.guided.schema import _ASSERTIONS, _KNOWN
from tests.guided.forms import accepts, compiled, grammars, random_text

STORE = grammars()
_LINKED = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/n"},
{"type": "null"}]}},
           "required": ["next"]}  # fmt: skip


def tagged(name: str, **value: object) -> dict:
    properties = {"kind": {"const": name}, "value": value}
    return {"type": "object", "properties": properties, "required": ["kind", "value"]}


# (schema, texts it admits, texts it does not)
SUPPORTED = [
    ({}, ["1", "[]"], ["", "x"]),
    ({"type": "object"}, ["{}", '{"a": [1, {"b": null}]}'], ["[]", "{a: 1}"]),
    ({"type": "object", "properties": {}}, ["{}"], ['{"a": 1}']),
    ({"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}},
      "required": ["b"]}, ['{"b": 1}', '{"a":"x","b":-2}'], ['{"a": "x"}', '{"b": 1, "c": 2}',
      "{}"]),
    ({"type": "object", "properties": {'é"/': {"type": "null"}}, "required": ['é"/']},
     ['{"é\\"/": null}'], ['{"é": null}']),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, ['{"x": 1}'], ['{"x": "s"}']),
    ({"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2,
      "required": ["c"]}, ['{"a": 1, "c": 1}'], ['{"c": 1}']),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1}, ['{"b": 1}'],
     ['{"a": 1, "b": 1}']),
    ({"type": "integer", "minimum": -17, "maximum": 205}, ["-17", "205", "0"], ["-18", "206",
     "1.5"]),
    ({"type": "integer", "exclusiveMinimum": 9}, ["10", "123"], ["9", "-10"]),
    ({"type": "integer", "multipleOf": 7}, ["14", "-7"], ["15"]),
    ({"type": "number"}, ["1", "-0.5", "1e9"], ["NaN", ".5", "01"]),
    ({"type": "number", "minimum": -1.25, "exclusiveMaximum": 3.5}, ["-1.25", "3.49"], ["3.5",
     "-1.3"]),
    ({"type": "number", "exclusiveMinimum": 0}, ["0.001", "7"], ["0", "-1", "0.0"]),
    ({"type": "string"}, ['"\\n é"'], ['"\n"', "x", '"\\q"']),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"éab"'], ['"a"', '"abcd"',
     '"a\x01"']),
    ({"type": "string", "minLength": 200}, [f'"{"a" * 200}"'], [f'"{"a" * 199}"']),
    ({"type": "string", "pattern": "^[a-c]+\\d{2}$"}, ['"ab12"'], ['"ab1"', '"xab12"']),
    ({"type": "string", "pattern": "x|y"}, ['"x"', '"aayb"'], ['"ab"']),
    ({"type": "string", "pattern": "^a"}, ['"a"', '"ab"'], ['"ba"']),
    ({"type": "string", "pattern": '^[^"\\\\]{1,3}$'}, ['"é"'], ['"\\n"', '"\n"', '""']),
    ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2024-2-9"']),
    ({"type": "string", "format": "uuid"}, [], ['"x"']),
    ({"type": ["string", "null"], "minLength": 2}, ["null", '"ab"'], ['"a"', "1"]),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
     ["[true]", "[true, false]"], ["[]", "[1]", "[true,true,true]"]),
    ({"type": "array", "prefixItems": [{"type": "null"}], "items": False}, ["[null]"],
     ["[null, 1]"]),
    ({"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "integer"},
     "minItems": 2},
     ["[null, 1]"], ["[null]", "[null, null]"]),
    ({"enum": ['a"b', 1.5, None, {"k": [1]}, "\n"]},
     ['"a\\"b"', "1.5", "null", '"\\n"'], ["1", '"\n"']),
    ({"type": "string", "const": "é"}, ['"é"'], ['"e"']),
    ({"anyOf": [{"type": "integer"}, tagged("a")]}, ["1", '{"kind": "a", "value": []}'], ["1.5"]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, ["1", '"a"'], ["null"]),
    ({"oneOf": [tagged("a", type="integer"), tagged("b", type="string")]},
     ['{"kind": "b", "value": "1"}'], ['{"kind": "b", "value": 1}']),
    ({"allOf": [{"type": "integer", "minimum": 3}]}, ["3"], ["2"]),
    ({"$ref": "#/$defs/n", "$defs": {"n": _LINKED}}, ['{"next": {"next": null}}'],
     ['{"next": {}}']),
    ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}},
     ['{"b": 1}'], ['{"b": "s"}']),
]  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "good", "bad"), SUPPORTED, ids=lambda part: json.dumps(part)[:60]
)
def test_a_supported_schema_is_enforced(schema, good, bad):
    grammar = compiled(json=schema)
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []
    chance, finished = random.Random(0), 0
    for _ in range(12):
        text = random_text(grammar, chance)
        if text is not None and "\ufffd" not in text:  # bytes that are no UTF-8 count otherwise
            jsonschema.validate(json.loads(text), schema)
            finished += 1
    assert finished or "minLength" in schema


# What xgrammar 0.2.8 ignores, in whole or in part, and what it refuses itself: (schema,
# place, word)
REFUSED = [
    *(({keyword: value}, "#", keyword) for keyword, value in (
        ("not", {}), ("if", {}), ("dependentRequired", {}), ("dependentSchemas", {}),
        ("contains", {}),
        ("patternProperties", {}), ("propertyNames", {}), ("unevaluatedProperties", False),
        ("$dynamicRef", "#a"), ("nullable", True), ("contentEncoding", "base64"), ("zork", 1),
        ("minimum", 3), ("minLength", 3), ("pattern", "a"), ("properties", {}), ("required", ["a"]),
    )),
    ({"type": "number", "multipleOf": 0.5}, "#", "multipleOf"),
    ({"type": "integer", "multipleOf": 4, "minimum": 1}, "#", "multipleOf"),
    ({"type": "array", "uniqueItems": True}, "#", "uniqueItems"),
    ({"type": "array", "items": [{}]}, "#", "items"),
    ({"type": "array", "items": {"type": "dict"}}, "#/items", "dict"),
    ({"type": "string", "format": "idn-email"}, "#", "idn-email"),
    ({"type": "string", "format": "date", "maxLength": 3}, "#", "maxLength"),
    ({"type": "string", "pattern": "^a+$", "maxLength": 2}, "#", "maxLength"),
    ({"type": "string", "pattern": "^(?=a)"}, "#", "pattern"),
    ({"type": "string", "pattern": '^"$'}, "#", "pattern"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "#", "minLength"),
    ({"type": "string", "minLength": -1}, "#", "minLength"),
    ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "#", "'b'"),
    ({"type": "object", "properties": {"a": {}}, "additionalProperties": {}}, "#",
     "additionalProperties"),
    ({"type": "object", "minProperties": 1}, "#", "minProperties"),
    ({"type": "object", "properties": {"a/b": {"not": {}}}}, "#/properties/a~1b", "not"),
    ({"type": "object", "properties": {"a": False}}, "#/properties/a", "False"),
    ({"type": "object", "properties": {"a": {"type": "integer", "minimum": "x"}}},
     "#/properties/a", "number"),
    ({"enum": ["a"], "minLength": 3}, "#", "minLength"),
    ({"type": "string", "enum": ["a", 1]}, "#", "1"),
    ({"enum": []}, "#", "enum"),
    ({"anyOf": [{"type": "integer"}], "type": "string"}, "#", "type"),
    ({"anyOf": []}, "#", "anyOf"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf/1", "oneOf"),
    ({"oneOf": [{"const": "a"}, {"enum": ["b", "a"]}]}, "#/oneOf/1", "oneOf"),
    ({"oneOf": [tagged("a"), tagged("a")]}, "#/oneOf/1", "oneOf"),
    ({"allOf": [{"type": "integer"}, {"type": "integer"}]}, "#", "allOf"),
    ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": {"type": "integer"}}}, "#", "minimum"),
    ({"$ref": "http://x/y"}, "#", "http://x/y"),
    ({"$ref": "#/$defs/missing"}, "#", "missing"),
    ({"$ref": "#"}, "json", "no text"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "place", "word"), REFUSED, ids=lambda part: json.dumps(part)[:60]
)
def test_what_would_not_be_enforced_is_refused_with_its_place(schema, place, word):
    with pytest.raises(AquilineError) as caught:
        compiled(json=schema)
    message = str(caught.value)
    assert message.startswith("json: ")
    assert f"{place}:" in message
    assert word in message
    assert ";" in message  # the remedy


def test_a_schema_nested_too_deeply_is_refused():
    schema: dict = {"type": "null"}
    for _ in range(2000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(AquilineError, match="too deeply"):
        compiled(json=schema)


@pytest.mark.parametrize("junk", [None, 5, -1, 2.5, "x", [], [5], {}, {"x": 5}, True, [[]]])
def test_a_malformed_value_is_refused_and_nothing_worse(junk):
    for keyword in sorted(_KNOWN):
        owner = next((name for name, own in _ASSERTIONS.items() if keyword in own), "object")
        for schema in ({keyword: junk}, {"type": owner, keyword: junk}):
            with suppress(AquilineError):
                STORE.compile(StructuredOutput(json=schema))
