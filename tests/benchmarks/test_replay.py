"""A trace of three requests, played and drawn; the one that is stored in the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aquiline.evaluation import load
from benchmarks import replay
from tests.tiny_checkpoint import write_target


def test_three_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    trace, out = tmp_path / "trace.jsonl", tmp_path / "serving.json"
    rows = [(0, 9, 6), (0.2, 4, 8), (0.2, 5, 1)]
    names = "at", "prompt_tokens", "output_tokens"
    trace.write_text("".join(json.dumps(dict(zip(names, r, strict=True))) + "\n" for r in rows))
    # Any token id that a trace's random prompts may hold is in the vocabulary.
    target = write_target(tmp_path / "target", vocab_size=load.RANDOM_IDS[1], context=1024)
    replay.main(["--trace", str(trace), "--out", str(out), "--model", str(target)])
    found = json.loads(out.read_text())["replay"]
    (row,) = found["rows"]
    assert [one["tokens"] for one in row["each"]] == [6, 8, 1]
    assert [one["start"] for one in row["each"]] == pytest.approx([0, 0.2, 0.2], abs=0.01)
    assert all(one["ttft_ms"] > 0 for one in row["each"])
    assert "bench serve" in found["client"]
    assert "--trace" in found["client"]
    assert (tmp_path / "replay.png").read_bytes().startswith(b"\x89PNG")


def test_the_stored_trace_has_its_burst() -> None:
    times = [one.at or 0.0 for one in load.trace(replay.TRACE, 0)]
    assert times[-1] > 100
    assert sum(40 <= at < 42 for at in times) >= 20
    assert sum(at < 40 for at in times) < 20
