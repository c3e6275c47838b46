"""What the draft benchmark reads beside a draft, and which draft it calls the fastest."""

from __future__ import annotations

import json

import pytest

from benchmarks.draft_quality import Candidate, Costs, fastest


def test_a_draft_is_known_by_its_run_and_what_that_tells(tmp_path):
    folder = tmp_path / "run-a" / "draft"
    folder.mkdir(parents=True)
    nothing = {"tokens": None, "objective": None, "epochs": None}
    assert Candidate.of(folder) == Candidate(folder, "run-a", nothing)
    assert Candidate.of(folder.parent).name == "run-a"
    told = {"tokens": 10**6, "objective": "kl", "epochs": 0.5}
    (folder.parent / "summary.json").write_text(json.dumps({**told, "seed": 3}))
    assert Candidate.of(folder) == Candidate(folder, "run-a", told)
    (folder / "summary.json").write_text(json.dumps({"name": "nearest"}))
    assert Candidate.of(folder) == Candidate(folder, "nearest", nothing)


def test_the_fastest_is_best_over_all_that_was_measured():
    speeds = {("a", 3): (1.5, 1.5), ("a", 7): (1.9, 1.0), ("b", 3): (1.6, 1.2)}
    rows = [
        {"draft": draft, "chain": chain, "predicted_speedup": speed}
        for (draft, chain), both in speeds.items()
        for speed in both
    ]
    assert fastest(rows) == ("a", 3)


def test_the_cost_of_a_step_is_what_a_longer_chain_adds():
    assert Costs(1.0, {3: 2.0, 7: 3.0}).step_ms == pytest.approx(0.25)
