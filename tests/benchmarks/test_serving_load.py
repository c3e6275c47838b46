"""The load benchmark, very short, on a tiny model; and what it counts as an answer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import serving_load
from benchmarks.serving_load import has_form, memory, request
from tests.tiny_checkpoint import write_draft, write_target


def test_a_short_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(serving_load, "SAMPLE_SECONDS", 0.05)
    target = write_target(tmp_path / "target", mix=0.15, context=1024)
    draft = write_draft(tmp_path / "draft", context=1024)
    out = tmp_path / "serving.json"
    out.write_text('{"other": {"kept": 1}}')
    speculation = json.dumps({"model": str(draft)})
    serving_load.main(
        ["--model", str(target), "--speculative-config", speculation, "--out", str(out),
         "--requests", "30", "--minutes", "0", "--clients", "6", "--longest", "60",
         "--max-num-seqs", "4", "--max-model-len", "1024", "--kv-cache-tokens", "4096",
         "--alone", "6"]
    )  # fmt: skip
    sections = json.loads(out.read_text())
    assert sections["other"] == {"kept": 1}
    found = sections["load"]
    assert found["ok"], found
    assert found["outcomes"] == {"complete": 24, "aborted": 6, "failed": 0}
    assert (found["requests"], found["forms"]) == (30, 3)
    assert (found["alone"]["asked_again"], found["alone"]["equal"]) == (6, 6)
    assert set(found["left"].values()) == set(found["left_after_alone"].values()) == {0}
    assert found["memory"]["engine"]["mb"][-1] > 50
    assert "serve" in found["server"]


def test_the_mixture() -> None:
    requests = [request(number, "m", 192) for number in range(1000)]
    assert Counter(one.kind for one in requests) == {"plain": 700, "aborted": 200, "form": 100}
    assert 400 < sum(one.seeded for one in requests) < 600
    lengths = [len(one.body["messages"][0]["content"].split()) for one in requests]
    assert min(lengths) < 15
    assert max(lengths) > 150
    assert requests[7] == request(7, "m", 192)


@pytest.mark.parametrize(
    ("body", "text", "good"),
    [
        ({"structured_outputs": {"regex": "[a-z]+"}}, "abc", True),
        ({"structured_outputs": {"regex": "[a-z]+"}}, "abc1", False),
        ({"structured_outputs": {"choice": ["yes"]}}, "yes", True),
        ({"structured_outputs": {"choice": ["yes"]}}, "ye", False),
        ({"response_format": {}}, '{"name": "ab", "age": 7, "ok": true}', True),
        ({"response_format": {}}, '{"name": "ab", "age": 700, "ok": true}', False),
        ({"response_format": {}}, '{"name": "ab", "age": 7', False),
        ({"response_format": {}}, "[]", False),
    ],
)
def test_forms(body: dict[str, object], text: str, good: bool) -> None:
    assert has_form(body, text) is good


def test_memory_that_grows_is_told() -> None:
    samples = [(float(i), {"engine": 100.0 + i, "server": 50.0}) for i in range(101)]
    found = memory(samples)
    assert found["engine"]["mb"] == pytest.approx([110, 150, 200], abs=3)
    assert found["engine"]["drift_percent"] > 70
    assert found["server"]["drift_percent"] == 0
