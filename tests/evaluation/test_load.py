"""Loads: arrival times, traces and prompt files; a bad line is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from aquiline.core.errors import AquilineError, DataError
from aquiline.evaluation.load import (
    RANDOM_IDS,
    Planned,
    arriving,
    file_prompts,
    random_prompts,
    task_prompts,
    trace,
)
from aquiline.evaluation.tasks import TaskPrompt


def written(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_fixed_arrivals_are_evenly_spaced() -> None:
    times = [one.at for one in arriving([Planned("x")] * 5, 4.0, "fixed", 0)]
    assert times == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_poisson_arrivals_have_exponential_gaps() -> None:
    """Mean and deviation of the gaps are 1 / rate, within 4 standard errors of each."""
    many = [Planned("x")] * 20_001
    times = np.array([one.at for one in arriving(many, 5.0, "poisson", 3)])
    gaps = np.diff(times)
    assert times[0] == 0
    assert abs(gaps.mean() - 0.2) < 4 * 0.2 / 20_000**0.5
    assert abs(gaps.std() - 0.2) < 4 * 0.2 * (2 / 20_000) ** 0.5
    assert [one.at for one in arriving(many, 5.0, "poisson", 3)] == times.tolist()
    assert [one.at for one in arriving(many, 5.0, "poisson", 4)] != times.tolist()


def test_bad_arrivals_are_refused_by_name() -> None:
    for rate in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(AquilineError, match="rate="):
            arriving([Planned("x")], rate, "poisson", 0)
    with pytest.raises(AquilineError, match="arrivals='bursts'"):
        arriving([Planned("x")], 1.0, "bursts", 0)  # type: ignore[arg-type]


def test_a_trace_is_in_order_of_time_and_starts_at_0(tmp_path: Path) -> None:
    path = written(
        tmp_path / "trace.jsonl",
        {"at": 12.5, "prompt_tokens": 3, "output_tokens": 9, "user": "ignored"},
        {"at": 10, "prompt_tokens": 5, "output_tokens": 2}, "",
    )  # fmt: skip
    requests = trace(path, 0)
    assert [one.at for one in requests] == [0.0, 2.5]
    assert [len(one.prompt) for one in requests] == [5, 3]
    assert [one.max_tokens for one in requests] == [2, 9]
    assert trace(path, 0) == requests != trace(path, 1)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"at": "soon", "prompt_tokens": 1, "output_tokens": 1}, "at must"),
        ({"at": 1, "prompt_tokens": 0, "output_tokens": 1}, "prompt_tokens"),
        ({"at": 1, "prompt_tokens": 1}, "output_tokens"),
        ("[1, 2]", "not a JSON object"),
        ("{", "correct the line"),
    ],
)
def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, row: object, named: str) -> None:
    good = {"at": 0, "prompt_tokens": 1, "output_tokens": 1}
    path = written(tmp_path / "trace.jsonl", good, row)
    with pytest.raises(DataError, match=rf"trace.jsonl:2: .*{named}"):
        trace(path, 0)


def test_prompt_files_hold_chats_and_texts(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Why?"}]
    path = written(
        tmp_path / "p.jsonl", {"messages": chat}, {"prompt": "Once", "max_tokens": 5}
    )  # fmt: skip
    first, second = file_prompts(path)
    assert (first.prompt, first.max_tokens, first.is_chat) == (tuple(chat), None, True)
    assert (second.prompt, second.max_tokens, second.is_chat) == ("Once", 5, False)
    for bad in ({"messages": []}, {"prompt": ""}, {"prompt": "x", "max_tokens": 0}):
        with pytest.raises(DataError, match=r"q.jsonl:1"):
            file_prompts(written(tmp_path / "q.jsonl", bad))
    with pytest.raises(DataError, match="empty"):
        file_prompts(written(tmp_path / "none.jsonl", ""))
    with pytest.raises(DataError, match="absent"):
        file_prompts(tmp_path / "absent.jsonl")


def test_random_and_benchmark_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts(3, 40, seed=1)
    assert [len(one.prompt) for one in prompts] == [40] * 3
    assert not prompts[0].is_chat
    ids = {token for one in prompts for token in one.prompt}
    assert RANDOM_IDS[0] <= min(ids) <= max(ids) < RANDOM_IDS[1]  # type: ignore[type-var]
    asked = TaskPrompt("mt-bench", "81", "writing", ("first", "second"))
    monkeypatch.setattr("aquiline.evaluation.load.load_task", lambda name: [asked])
    (planned,) = task_prompts("mt-bench")
    assert planned.is_chat
    assert planned.prompt == ({"role": "user", "content": "first"},)
