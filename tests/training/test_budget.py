"""The budget: parameters as they are, FLOPs by hand, and what each setting saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from aquiline.cli.recipe import Recipe
from aquiline.models.draft import draft_config
from aquiline.training.budget import CARDS, plan
from aquiline.training.config import TrainConfig
from aquiline.training.student import Student
from aquiline.training.teacher import LlamaTeacher
from tests.laws.tiny import tiny_target
from tests.tiny_checkpoint import tiny_config

RECIPE = Recipe.load(Path(__file__).parents[2] / "recipes/llama31_8b.py")


def test_the_8b_target_has_its_known_size() -> None:
    assert RECIPE.shape is not None
    assert plan(RECIPE.config, RECIPE.shape, 8).teacher == 8_030_261_248


@pytest.mark.parametrize(("method", "size"), [("eagle", None), ("eagle3", 20)])
def test_parameters_are_those_that_are_trained(method: str, size: int | None) -> None:
    target = tiny_target(0, tiny_config(layers=7))
    config = TrainConfig("t", "d", method=method, layers=2, draft_vocab_size=size)  # type: ignore[arg-type]
    ids = None if method == "eagle" else target.embed_tokens.weight[:, 0].topk(20).indices.sort()[0]
    student = Student(config, LlamaTeacher(target), ids)
    budget = plan(config, target.config, 1)
    assert budget.draft + budget.head == sum(one.numel() for one in student.parameters())
    assert budget.teacher == sum(one.numel() for one in target.parameters())


def test_flops_are_the_textbooks() -> None:
    target = tiny_config(layers=2)
    config = TrainConfig("t", "d", layers=1, max_length=64)
    shape = draft_config(target, 1, None)
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48
    attention = 4 * 32 * 32  # scores and sums, width 32, half of 64 tokens
    budget = plan(config, target, 1, scored=0.5)
    assert budget.flops["teacher"] == 2 * (2 * layer + attention)
    assert budget.flops["student"] == 6 * (layer + 2 * 32 * 32) + 3 * attention
    assert budget.flops["head"] == 0.5 * shape.hidden_size * target.vocab_size * 6


def test_shards_recomputation_and_ranks_save_what_they_should() -> None:
    assert RECIPE.shape is not None
    config = replace(RECIPE.config, shard="none")
    one = plan(config, RECIPE.shape, 1)
    student, full = (plan(replace(config, shard=s), RECIPE.shape, 8) for s in ("student", "full"))  # type: ignore[arg-type]
    assert student.memory["optimiser"] == one.memory["optimiser"] / 8
    assert student.memory["teacher"] == one.memory["teacher"]
    assert full.memory["teacher"] < 0.25 * one.memory["teacher"]
    lean = plan(replace(config, recompute=True), RECIPE.shape, 1)
    assert lean.memory["activations"] < one.memory["activations"]
    assert lean.flops["student"] > one.flops["student"]
    card = CARDS["H100"]
    assert student.hours(card, 8, 0.4) == pytest.approx(one.hours(card, 1, 0.4) / 8, rel=0.01)
    assert one.steps == pytest.approx(8 * student.steps, rel=0.01)
