"""Exactly one form, given well, and equal to another of the same content."""

from __future__ import annotations

import json
from types import MappingProxyType

import pytest

from aquiline.core.errors import AquilineError
from aquiline.core.guided_params import MAX_GRAMMAR, StructuredOutput

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {"const": "é"}}}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "nothing given"),
        ({"json_object": False}, "nothing given"),
        ({"regex": "a", "json": {}}, "json and regex given"),
        ({"json_object": True, "choice": ["a"]}, "json_object and choice given"),
        ({"json_object": 1}, "json_object=1"),
        ({"json": "{"}, "json: not valid JSON"),
        ({"json": "[1]"}, "json: give a JSON schema"),
        ({"json": 5}, "json: give a JSON schema"),
        ({"json": {"const": float("nan")}}, "json: not valid JSON"),
        ({"json": {"const": {1, 2}}}, "set is not JSON"),
        ({"json": "[" * 100_000}, "json: the schema is nested too deeply"),
        ({"regex": ""}, "regex=''"),
        ({"regex": 3}, "regex=3"),
        ({"grammar": ""}, "grammar=''"),
        ({"choice": []}, r"choice=\[\]"),
        ({"choice": "yes"}, "choice='yes'"),
        ({"choice": ["a", 1]}, "choice="),
        ({"choice": 5}, "choice=5"),
        ({"regex": "a" * (MAX_GRAMMAR + 1)}, "regex: 1048577 characters"),
    ],
)  # fmt: skip
def test_a_bad_form_is_refused_by_name(fields, named):
    with pytest.raises(AquilineError, match=named):
        StructuredOutput(**fields)


def test_the_same_content_is_the_same_form():
    forms = [
        StructuredOutput(json=schema)
        for schema in (SCHEMA, json.dumps(SCHEMA, indent=2), MappingProxyType(SCHEMA))
    ]
    assert len(set(forms)) == 1
    assert json.loads(forms[0].json) == SCHEMA
    assert list(json.loads(forms[0].json)["properties"]) == ["b", "a"]
    assert StructuredOutput(choice=["a", "b"]) == StructuredOutput(choice=("a", "b"))
    assert StructuredOutput(regex="a") != StructuredOutput(grammar="a")


def test_the_field_that_is_given():
    assert StructuredOutput(json={}).field == "json"
    assert StructuredOutput(json_object=True).field == "json_object"
    assert StructuredOutput(choice=("",)).field == "choice"
