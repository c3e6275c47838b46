"""The benchmarks of the prefix cache and of long prompts, very small, on SmolLM2."""

from __future__ import annotations

import json

import pytest

from benchmarks import long_prompt, turns


@pytest.fixture(autouse=True)
def _questions(monkeypatch):
    """Of our own: the benchmark's package may not be here."""
    for module in (turns, long_prompt):
        monkeypatch.setattr(
            module, "prompt_texts", lambda count, _: [f"What is {i} and {i}?" for i in range(count)]
        )


def test_turns(tmp_path):
    path = tmp_path / "turns.json"
    turns.main(
        f"--out {path} --device cpu --conversations 1 --turns 2 --tokens 4 --kv-tokens 8448".split()
    )
    found = json.loads(path.read_text())
    assert found["identical"] == 1.0
    assert found["tpc_ratio"] == 1.0
    assert found["cache"]["shared"] > found["cache"]["cached"] > 20
    assert found["cache"]["short"] == 0
    assert found["no_cache"]["cached"] == 0


def test_long_prompt(tmp_path):
    path = tmp_path / "long.json"
    long_prompt.main(
        f"--out {path} --device cpu --streams 2 --tokens 300 --margin 2 --budgets 64".split()
    )
    rows = json.loads(path.read_text())["rows"]
    assert [row["budget"] for row in rows] == [[512, 128], [64, 64], [300, 300]]
    assert rows[1]["gaps"] > rows[2]["gaps"] >= 2 * 3
    assert rows[1]["max_ms"] < rows[2]["max_ms"]
