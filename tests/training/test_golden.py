"""Golden losses: thirty steps of two tiny runs, to notice any change of the arithmetic.

A change that is meant is recorded by running this file as a script, which prints the new lists.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from aquiline.training.config import TrainConfig
from aquiline.training.student import Student, scored_positions
from aquiline.training.teacher import LlamaTeacher
from tests.laws.tiny import CONFIG, VOCAB, tiny_target
from tests.training.packed import packed

RUNS: dict[str, dict[str, Any]] = {
    "eagle": {"method": "eagle", "objective": "eagle"},
    "eagle3 unrolled": {
        "method": "eagle3", "objective": "lk", "unroll": 3, "step_decay": 0.8,
        "draft_vocab_size": 25,
    },
}  # fmt: skip
GOLDEN: dict[str, list[float]] = {
    "eagle": [
        0.837872, 0.829621, 0.810419, 0.812377, 0.816833, 0.765054, 0.785913, 0.762903,
        0.769531, 0.785288, 0.707552, 0.752529, 0.71918, 0.732904, 0.760264, 0.672534,
        0.721907, 0.6891, 0.711446, 0.738132, 0.651244, 0.699724, 0.664682, 0.694874,
        0.719954, 0.639248, 0.68067, 0.644342, 0.678508, 0.699365,
    ],
    "eagle3 unrolled": [
        1.51495, 1.60508, 1.12906, 1.08124, 1.25419, 0.788691, 1.04675, 0.870123,
        0.747529, 0.859093, 0.672354, 0.829006, 0.77877, 0.683885, 0.743711, 0.630473,
        0.727365, 0.717232, 0.6409, 0.673791, 0.609377, 0.670198, 0.683971, 0.609118,
        0.638996, 0.59365, 0.634962, 0.659212, 0.586687, 0.620177,
    ],
}  # fmt: skip


def losses(changes: dict[str, Any]) -> list[float]:
    """In float64, so that no machine's way of adding shows."""
    teacher = LlamaTeacher(tiny_target(0, replace(CONFIG, num_layers=7)))
    config = TrainConfig("t", "d", max_length=64, tokens_per_batch=64, layers=2, seed=1, **changes)
    ids = torch.arange(VOCAB)[:: VOCAB // 25] if "draft_vocab_size" in changes else None
    student = Student(config, teacher, ids)
    adam = torch.optim.AdamW(student.parameters(), lr=3e-3, betas=(0.9, 0.95))
    found = []
    for step in range(30):
        batch = packed([23, 9, 17, 5], seed=step % 5, padding=3)
        count = torch.tensor(len(scored_positions(batch)))
        loss = student(batch, teacher(batch, student.draft.taps), count)
        loss.total.backward()
        adam.step()
        adam.zero_grad()
        found.append(float(loss.total.detach()))
    return found


@pytest.mark.parametrize("name", RUNS)
def test_thirty_steps_are_what_they_were(name: str) -> None:
    assert losses(RUNS[name]) == pytest.approx(GOLDEN[name], rel=1e-4)
    assert GOLDEN[name][-1] < 0.9 * GOLDEN[name][0]


if __name__ == "__main__":
    for name, changes in RUNS.items():
        print(f'    "{name}": {[float(f"{loss:.6g}") for loss in losses(changes)]},')
