"""``aquiline data``: every step leaves out what it must, says so, and the result trains a draft."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aquiline.cli import data as command
from aquiline.cli.main import main
from aquiline.training.conversations import CUT, read_conversations
from aquiline.training.corpus import Corpus
from tests.tiny_checkpoint import write_draft, write_target

Run = Callable[..., dict[str, Any]]
STORY = "once upon a time there was an eagle that could not read but wanted to learn how to do so "


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_target(root / "target", mix=0.15, context=320)
    write_draft(root / "draft", context=320)
    return root


@pytest.fixture
def run(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command on the tiny target, no benchmark installed; its report, or its error."""
    monkeypatch.setattr(command, "TASKS", ())

    def run(*args: object) -> dict[str, Any]:
        options = ("--target", root / "target", "--dtype", "float32", "--json")
        monkeypatch.setattr(sys, "argv", ["aquiline", "data", *map(str, (*args, *options))])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        if stop.value.code == 2:
            return {"error": printed.err}
        report: dict[str, Any] = json.loads(printed.out)
        return report

    return run


def chat(question: str, answer: str = "yes") -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_step_is_in_the_report(run: Run, tmp_path: Path) -> None:
    question = "how many feathers has a young golden eagle on its left wing in spring"
    share = [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "me"}]
    source = write(
        tmp_path / "in.jsonl", chat("one"), chat("ONE"), {"conversations": share},
        {"prompt": "no answer"}, chat(STORY * 2), chat(STORY * 2 + "!"), chat(f"Hm, {question}?"),
        chat("ten megabytes", "lorem ipsum dolor sit amet " * 400_000),
    )  # fmt: skip
    bench = write(tmp_path / "birds.jsonl", {"id": "a", "question": question})
    out, file = tmp_path / "out.jsonl", tmp_path / "report.json"
    args = "--source", source, "--out", out, "--against", bench, "--report", file
    report = run(*args)
    assert json.loads(file.read_text()) == report
    assert report["read"] == 8
    assert report["skipped"] == {"no assistant turn to learn from": 1}
    assert (report["duplicates"]["exact"], report["duplicates"]["near"]) == (1, 1)
    (copy,) = report["duplicates"]["examples"]
    assert (copy["number"], copy["of"]) == (6, 5)
    assert report["decontamination"]["benchmarks"] == {"birds.jsonl": 1}
    (dropped,) = report["decontamination"]["dropped"]
    assert dropped["number"] == 7
    assert dropped["ngram"] == "how many feathers has a young golden eagle"
    assert report["conversations"] == 4
    firsts = [conversation[0]["content"] for conversation in read_conversations(out)]
    assert firsts == ["one", "who?", STORY * 2, "ten megabytes"]


def test_bad_lines_stop_or_are_counted(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", chat("one"), {"text": "?"}, chat("two"))
    with source.open("ab") as file:
        file.write(b"\xff\n\n")
    assert (
        "in.jsonl:2: expected an object"
        in run("--source", source, "--out", tmp_path / "o")["error"]
    )
    report = run("--source", source, "--out", tmp_path / "o", "--skip-malformed")
    assert report["skipped"] == {"malformed": 2}
    assert [line[:2] for line in report["malformed"]] == ["2:", "4:"]
    assert report["conversations"] == 2


def test_tokens_in_shards_open_as_a_corpus(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *(chat(f"go {i}", "abc" * i) for i in range(1, 20)))
    out = tmp_path / "corpus"
    args = "--source", source, "--out", out, "--tokenize", "--max-length", 64, "--shard-tokens", 200
    report = run(*args)
    corpus = Corpus.open(out)
    assert report["corpus"]["documents"] == len(corpus) == 19
    assert report["corpus"]["shards"] > 2
    assert "exists" in run(*args)["error"]


def test_missing_benchmarks_are_reported(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "TASKS", ("gsm8k",))
    monkeypatch.setattr("aquiline.evaluation.tasks.find_spec", lambda name: None)
    source = write(tmp_path / "in.jsonl", chat("one"))
    report = run("--source", source, "--out", tmp_path / "o")
    (missing,) = report["not_checked"]
    assert missing.startswith("gsm8k: ")
    assert "pip install" in missing


PROMPTS = [
    {"prompt": "abc"}, {"prompt": ["xyz", "go on", "and on"]}, chat("who", "old"), ["p", "q"],
    {"prompt": "z" * 400}, *({"prompt": f"say {i}"} for i in range(20)),
]  # fmt: skip


def test_answers_are_the_targets_with_a_draft_or_without(
    run: Run, root: Path, tmp_path: Path
) -> None:
    source, out = write(tmp_path / "in.jsonl", *PROMPTS), tmp_path / "out.jsonl"
    args = [
        "--source", source, "--out", out, "--regenerate", "--max-tokens", 40, "--near", 1,
        "--temperatures", "0,0.8",
    ]  # fmt: skip
    report = run(*args, "--no-speculate", "--batch", 3)
    plain = out.read_text()
    done = report["regeneration"]
    assert done["empty"] == 1  # 400 characters do not fit in the context of 320
    assert report["conversations"] == done["conversations"] == 24
    assert done["temperatures"].keys() == {"0.0", "0.8"}
    conversations = list(read_conversations(out))
    assert [c[0]["content"] for c in conversations[:5]] == ["abc", "xyz", "who", "p", "say 0"]
    assert "old" not in plain
    answers = [t for c in conversations for t in c if t["role"] == "assistant"]
    assert done["answers"] == len(answers)
    cut = [turn for turn in answers if CUT.items() <= turn.items()]
    assert done["cut"] == len(cut)
    assert 0 < len(cut) < len(answers)
    assert run(*args, "--draft", root / "draft")["regeneration"]["tokens"] == done["tokens"]
    assert out.read_text() == plain
    short = run(*args, "--no-speculate", "--max-length", 60)["regeneration"]
    assert short["tokens"] < done["tokens"]
    assert short["refused"] > done["refused"]
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []


def test_stopped_regeneration_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", *PROMPTS)
    args = ["--source", source, "--regenerate", "--max-tokens", 20, "--batch", 4, "--no-speculate"]
    run(*args, "--out", tmp_path / "whole.jsonl")
    real = command.engine_answers

    def dies(*options: Any) -> Any:
        def answers(asks: Any, /) -> Any:
            for number, answer in enumerate(real(*options)(asks)):
                if number == 9:
                    raise KeyboardInterrupt
                yield answer

        return answers

    out = tmp_path / "corpus"
    again = [*args, "--out", out, "--tokenize", "--max-length", 128]
    with monkeypatch.context() as patch:
        patch.setattr(command, "engine_answers", dies)
        patch.setattr(sys, "exit", lambda code: (_ for _ in ()).throw(RuntimeError(code)))
        with pytest.raises(RuntimeError, match="130"):
            run(*again)
    partial = tmp_path / "corpus.jsonl.partial"
    finished = len(partial.read_text().splitlines()) - 1
    assert 0 < finished < 20
    refused = run(*again, "--top-p", 0.5)["error"]
    assert "other settings" in refused
    assert run(*again)["regeneration"]["resumed"] == finished
    assert (tmp_path / "corpus.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert len(Corpus.open(out)) == 24
    assert not partial.exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--near", 0), ("--ngram", 0), ("--temperatures", "hot"), ("--temperatures", "-1"),
     ("--limit", 0), ("--max-length", 0), ("--shard-tokens", 0), ("--top-p", 2),
     ("--max-tokens", 0), ("--against", "no.jsonl")],
)  # fmt: skip
def test_bad_options_are_named(run: Run, tmp_path: Path, option: str, value: object) -> None:
    source = write(tmp_path / "in.jsonl", chat("one"))
    error = run("--source", source, "--out", tmp_path / "o", option, value)["error"]
    assert option.strip("-").replace("-", "_") in error.replace("-", "_") or str(value) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_nothing_left_is_an_error(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "a"})
    error = run("--source", source, "--out", tmp_path / "o")["error"]
    assert "none is left" in error
    assert "no assistant turn" in error
