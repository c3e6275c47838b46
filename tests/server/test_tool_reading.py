"""Tools: how they are told, and calls read from texts in the forms that models write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from aquiline.core.errors import AquilineError
from aquiline.server.protocol.chat import ChatRequest
from aquiline.server.tools.formats import FORMATS, told_in_words
from aquiline.server.tools.reading import CallReader
from aquiline.server.tools.request import ToolUse
from aquiline.text.tokenizer import load_tokenizer
from tests.tiny_checkpoint import CHATML, write_tokenizer

RECORDED = json.loads(Path(__file__).with_name("recorded_calls.json").read_text())["answers"]
NAMES = ("get_weather", "add")
# As Llama 3.1 (JSON alone) and Qwen2.5 (tags) are taught to write them.
TEXTS = [
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Oslo"}}', "",
     [("get_weather", {"city": "Oslo"})]),
    ("llama3_json", '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}', "",
     [("add", {"a": 1, "b": 2})]),
    ("llama3_json", '{"name": "add", "parameters": {"a": 1, "b": 2}}; {"name": "add", "parameters":'
     ' {"a": 3, "b": 4}}', "", [("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4})]),
    ("llama3_json", '\n\n{"type": "function", "name": "add", "parameters": {"a": "1"}}', "",
     [("add", {"a": "1"})]),
    ("llama3_json", "The sum is 3.", "The sum is 3.", []),
    ("llama3_json", '{"answer": 3}', '{"answer": 3}', []),
    ("llama3_json", '{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}', []),
    ("llama3_json", '{"name": "add", "parameters": {"a"', '{"name": "add", "parameters": {"a"', []),
    ("llama3_json", "", "", []),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n'
     "</tool_call>", "", [("get_weather", {"city": "Zürich"})]),
    ("hermes", 'Let me look.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n'
     '</tool_call>\n<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": "</x>"}}\n</tool_call>',
     "Let me look.\n", [("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": "</x>"})]),
    ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}', "", [("add", {"a": 1})]),
    ("hermes", "1 < 2 and <tool is no tag <tool_", "1 < 2 and <tool is no tag <tool_", []),
    ("hermes", "<tool_call>\nadd(1)\n</tool_call>", "<tool_call>\nadd(1)\n</tool_call>", []),
    ("hermes", "<tool_call>" + "[" * 5000, "<tool_call>" + "[" * 5000, []),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 7, 10000])
@pytest.mark.parametrize(("form", "text", "shown", "calls"), TEXTS)
def test_calls_are_read_however_they_arrive(
    form: str, text: str, shown: str, calls: list[Any], size: int
) -> None:
    reader = CallReader(FORMATS[form], NAMES)
    told = "".join(reader.feed(text[at : at + size]) for at in range(0, len(text), size))
    rest, found = reader.finish()
    assert told + rest == shown
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls


@pytest.mark.parametrize("answer", RECORDED)
def test_calls_that_a_model_made(answer: dict[str, Any]) -> None:
    """What SmolLM2 really said, a character at a time."""
    reader = CallReader(FORMATS[answer["form"]], NAMES)
    told = "".join(map(reader.feed, answer["text"]))
    rest, calls = reader.finish()
    assert [[call.name, json.loads(call.arguments)] for call in calls] == answer["calls"]
    assert told + rest == ("" if calls else answer["text"])


def test_text_streams_until_a_call_may_begin() -> None:
    reader = CallReader(FORMATS["hermes"], NAMES)
    assert [reader.feed(part) for part in ("Hi ", "<", "b> <tool", "_cal", "m")] == [
        "Hi ", "", "<b> ", "", "<tool_calm",
    ]  # fmt: skip
    llama = CallReader(FORMATS["llama3_json"], NAMES)
    assert [llama.feed(part) for part in ("\n", "Hi", " {")] == ["", "\nHi", " {"]


def test_one_call_where_parallel_ones_are_off() -> None:
    reader = CallReader(FORMATS["llama3_json"], NAMES, most=1)
    reader.feed('{"name": "add", "parameters": {}};{"name": "add", "parameters": {}}')
    assert len(reader.finish()[1]) == 1


def request(**fields: Any) -> ChatRequest:
    tools = [
        {"type": "function", "function": {
            "name": name, "description": f"Does {name}.",
            "parameters": {"type": "object", "properties": {"x": {"type": kind}},
                           "required": ["x"]},
        }}
        for name, kind in (("get_weather", "string"), ("add", "integer"))
    ]  # fmt: skip
    talk = [{"role": "user", "content": "abc"}]
    return ChatRequest.model_validate({"messages": talk, "tools": tools, **fields})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def with_template(folder: Path, template: str) -> Any:
    saved = {"eos_token": "<|im_end|>", "chat_template": template, "tokenizer_class": "Any"}
    (folder / "tokenizer_config.json").write_text(json.dumps(saved))
    return load_tokenizer(folder)


def test_a_template_without_tools_gets_a_system_prompt(folder: Path) -> None:
    tokenizer = with_template(folder, CHATML)
    use = ToolUse.of(request(), tokenizer, "auto")
    text = tokenizer.decode(use.encode([{"role": "user", "content": "abc"}], tokenizer), False)
    assert text.startswith("<|im_start|>system\nYou can call functions.")
    assert '{"name": "add", "description": "Does add."' in text
    told = told_in_words(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "assistant", "content": "", "tool_calls": [
                {"function": {"name": "add", "arguments": {"x": 1}}}]},
            {"role": "tool", "content": "3"},
        ],
        use.shown,
    )  # fmt: skip
    assert told[0]["content"].startswith("Be brief.\n\nYou can call")
    assert told[1]["content"] == (
        '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
    )
    assert told[2] == {"role": "user", "content": "<tool_response>\n3\n</tool_response>"}
    none = ToolUse.of(request(tool_choice="none"), tokenizer, "auto")
    assert "functions" not in tokenizer.decode(
        none.encode([{"role": "user", "content": "abc"}], tokenizer), False
    )


def test_a_template_with_tools_is_given_them(folder: Path) -> None:
    llama = "<|start_header_id|>{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    tokenizer = with_template(folder, llama)
    use = ToolUse.of(request(), tokenizer, "auto")
    assert use.form is FORMATS["llama3_json"]
    text = tokenizer.decode(use.encode([{"role": "user", "content": "abc"}], tokenizer), False)
    assert text == "<|start_header_id|>[get_weather][add]"


def test_a_forced_call_goes_through_the_grammar(folder: Path) -> None:
    tokenizer = with_template(folder, CHATML)
    named = {"type": "function", "function": {"name": "add"}}
    use = ToolUse.of(request(tool_choice=named), tokenizer, "auto")
    prompt = use.encode([{"role": "user", "content": "abc"}], tokenizer)
    assert tokenizer.decode(prompt, False).endswith("assistant\n<tool_call>\n")
    given: dict[str, Any] = {}
    use.apply(given)
    schema = json.loads(given["structured_outputs"].json)
    jsonschema.validate({"name": "add", "arguments": {"x": 1}}, schema)
    for wrong in ({"name": "get_weather", "arguments": {"x": "a"}}, {"name": "add"}, {}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    reader = use.reader()
    assert reader.feed('{"name": "add", "arguments": {"x": 1}}') == ""
    assert [call.name for call in reader.finish()[1]] == ["add"]
    required = ToolUse.of(request(tool_choice="required"), tokenizer, "auto")
    required.apply(given := {})
    schema = json.loads(given["structured_outputs"].json)
    for call in ("add", 1), ("get_weather", "a"):
        jsonschema.validate({"name": call[0], "arguments": {"x": call[1]}}, schema)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "no"}}}, "there is no tool"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]}, "strict"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "the same name"),
    ],
)
def test_tools_that_do_not_fit(folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(AquilineError, match=message):
        ToolUse.of(request(**fields), with_template(folder, CHATML), "auto")
