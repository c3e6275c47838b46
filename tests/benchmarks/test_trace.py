"""Shares of a trace: replays from first to last kernel, overlapping kernels once."""

from __future__ import annotations

import json

import pytest

from benchmarks import trace


def kernel(name: str, start: float, end: float, launch: int) -> dict[str, object]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": end - start,
            "args": {"correlation": launch}}  # fmt: skip


def replays(count: int) -> list[dict[str, object]]:
    """Of 90 us every 100: two kernels that overlap, a gap of 10, a third; then a copy by itself."""
    events: list[dict[str, object]] = [{"ph": "M", "name": "process_name"}]
    for i in range(count):
        at = 100.0 * i
        events += [
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": at - 50, "dur": 5,
             "args": {"correlation": i}},
            kernel("a", at, at + 50, i), kernel("b", at + 40, at + 70, i),
            kernel("c", at + 80, at + 90, i),
            {**kernel("Memcpy", at + 92, at + 94, 1000 + i), "cat": "gpu_memcpy"},
        ]  # fmt: skip
    return events


@pytest.mark.parametrize("with_launches", [True, False])
def test_coverage(tmp_path, with_launches, monkeypatch):
    events = replays(10)
    if not with_launches:
        events = [event for event in events if event.get("cat") != "cuda_runtime"]
        for event in list(events):
            if event["name"] == "a":
                events += [{**event, "name": "tiny", "dur": 0.0}] * 20
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = trace.coverage(*trace.read_trace(path), skip=2)
    assert found is not None
    assert found.rounds == 8
    assert found.round_ms == pytest.approx(0.1)
    assert found.replays == pytest.approx(8 * 90 / 790)
    assert found.kernels == pytest.approx((8 * 80 + 7 * 2) / 790)
    assert found.gaps[0][0] == pytest.approx(10)
    assert found.gaps[0][1] == "c"
    assert found.inner_gaps[0] == (10, "b", "c")


def test_no_replay_no_coverage():
    assert trace.coverage([], set()) is None
