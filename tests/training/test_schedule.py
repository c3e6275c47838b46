"""The learning rate over a trunk, its cool-downs and its extensions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aquiline.training.config import TrainConfig
from aquiline.training.schedule import Schedule

CONFIG = TrainConfig(
    "t", "d", max_length=10, tokens_per_batch=10, tokens=1000, warmup_tokens=100,
    decay_tokens=300, rewarm_tokens=50, learning_rate=2.0,
)  # fmt: skip


def test_learning_rate_warms_up_stays_and_decays() -> None:
    schedule = Schedule.of(CONFIG, 1)
    assert schedule.steps == 100
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:71] == [2.0] * 61
    assert rates[70:] == pytest.approx([2.0 * (30 - i) / 30 for i in range(30)])
    flat = Schedule.of(replace(CONFIG, warmup_tokens=0, decay_tokens=0), 1)
    assert [flat.rate(step) for step in range(100)] == [2.0] * 100


def test_decay_ends_at_the_final_rate() -> None:
    schedule = Schedule.of(replace(CONFIG, final_rate=0.1), 1)
    assert schedule.rate(70) == 2.0
    assert schedule.rate(99) == pytest.approx(2.0 * (0.1 + 0.9 / 30))


def test_lengths_are_tokens_whatever_a_step_holds() -> None:
    """Four ranks or four batches in turn: a quarter of the steps, the same curve over tokens."""
    one, four = Schedule.of(CONFIG, 1), Schedule.of(CONFIG, 4)
    assert four.steps == 25
    assert [four.rate(step) for step in (5, 20)] == [one.rate(20), one.rate(80)]


def test_moments_left_behind_are_warmed_again() -> None:
    schedule = Schedule.of(CONFIG, 1)
    rates = [schedule.rate(step, restarted=40) for step in range(40, 50)]
    assert rates == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
