"""The student: what is optimised, how it starts, that it learns, what it exports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aquiline.core.errors import AquilineError
from aquiline.models.draft_checkpoint import load_draft
from aquiline.models.eagle3 import Eagle3Draft, Eagle3Head
from aquiline.training.config import TrainConfig
from aquiline.training.objectives import Loss
from aquiline.training.packing import PackedBatch
from aquiline.training.student import Student, scored_positions
from aquiline.training.teacher import LlamaTeacher
from tests.laws.tiny import CONFIG, VOCAB, memoryless_models, tiny_target
from tests.training.packed import packed

IDS = torch.arange(0, VOCAB, 2)


@pytest.fixture(scope="module")
def teacher() -> LlamaTeacher:
    return LlamaTeacher(tiny_target(0, replace(CONFIG, num_layers=7)))


def made(teacher: LlamaTeacher, token_ids: Tensor | None = None, **changes: Any) -> Student:
    settings = {"max_length": 64, "tokens_per_batch": 64, "layers": 2, "seed": 1} | changes
    return Student(TrainConfig("t", "d", **settings), teacher, token_ids)


def loss_of(student: Student, teacher: LlamaTeacher, batch: PackedBatch) -> Loss:
    count = torch.tensor(len(scored_positions(batch)))
    loss: Loss = student(batch, teacher(batch, student.draft.taps), count)
    return loss


# ------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_every_parameter_and_only_the_drafts_learns(method: str, teacher: LlamaTeacher) -> None:
    student = made(teacher, method=method, unroll=2)
    loss_of(student, teacher, packed([9, 12])).total.backward()
    names = {name.split(".")[0] for name, _ in student.named_parameters()}
    assert names == ({"draft"} if method == "eagle" else {"draft", "head"})
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in teacher.target.parameters())


def test_shares_of_two_batches_add_up_to_the_step(teacher: LlamaTeacher) -> None:
    """Accumulation and ranks: one batch of four documents, or two of two."""
    student = made(teacher, objective="lk", unroll=2, regression_weight=0.3)
    halves = [packed([9, 12], seed=1), packed([6, 15], seed=2)]
    tokens, mask, positions = (
        torch.cat([getattr(half, name) for half in halves])
        for name in ("tokens", "loss_mask", "positions")
    )
    cu = torch.tensor([0, 9, 21, 27, 42], dtype=torch.int32)
    whole = PackedBatch(tokens, mask, positions, cu, 15, 0.0)
    count = torch.tensor(len(scored_positions(whole)))
    found = []
    for batches in ([whole], halves):
        student.zero_grad()
        losses = [student(b, teacher(b, ()), count) for b in batches]
        for loss in losses:
            loss.total.backward()
        gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        terms = {name: sum(loss.terms[name] for loss in losses) for name in losses[0].terms}
        found.append((gradients, terms))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other)
    for name in found[0][1]:
        torch.testing.assert_close(found[0][1][name], found[1][1][name])


def test_start_is_a_function_of_the_seed(teacher: LlamaTeacher) -> None:
    one, same, other = (made(teacher, seed=seed).draft.fc.weight for seed in (1, 1, 2))
    assert one.equal(same)
    assert not one.equal(other)


def test_eagle3_head_starts_as_the_targets_rows(teacher: LlamaTeacher) -> None:
    head = made(teacher, IDS, method="eagle3").head
    assert isinstance(head, Eagle3Head)
    assert head.lm_head.weight.equal(teacher.head_weight[IDS])


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_later_layers_start_as_the_targets_last(method: str, teacher: LlamaTeacher) -> None:
    student = made(teacher, method=method, layers=3, init="target")
    plain = made(teacher, method=method, layers=3)
    layers, last = list(student.draft.layers)[-2:], list(teacher.target.layers)[-2:]
    for own, theirs in zip(layers, last, strict=True):
        for name, parameter in own.named_parameters():
            assert parameter.equal(theirs.get_parameter(name)), name
    first = "midlayer" if method == "eagle3" else "layers.0"
    name = f"{first}.self_attn.qkv_proj.weight"
    assert student.draft.get_parameter(name).equal(plain.draft.get_parameter(name))


def test_more_layers_than_the_target_has_cannot_be_copied(teacher: LlamaTeacher) -> None:
    with pytest.raises(AquilineError, match=r"^init='target'"):
        made(teacher, layers=9, init="target")


# --------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize(
    ("token_ids", "changes"),
    [
        (None, {"objective": "tv"}),
        (None, {"objective": "lk", "unroll": 3}),
        (None, {"method": "eagle3", "objective": "lk"}),
        (IDS, {"method": "eagle3", "objective": "kl", "unroll": 3, "step_decay": 0.8}),
    ],
    ids=str,
)
def test_acceptance_grows(token_ids: Tensor | None, changes: dict[str, Any]) -> None:
    """On fresh text of a target whose next token hangs on the last alone."""
    target = memoryless_models().target
    if changes.get("method") == "eagle3":  # the same function with layers enough to tap
        target = _deepened(target)
    teacher = LlamaTeacher(target)
    student = made(teacher, token_ids, **changes)
    adam = torch.optim.AdamW(student.parameters(), lr=1e-2)
    unseen = packed([20, 20, 20], seed=999)
    before = loss_of(student, teacher, unseen).terms["acceptance"]
    for step in range(25):
        loss_of(student, teacher, packed([20, 20, 20], seed=step)).total.backward()
        adam.step()
        adam.zero_grad()
    after = loss_of(student, teacher, unseen).terms["acceptance"]
    assert (after > 1.3 * before).all(), (before, after)


def _deepened(target: Any) -> Any:
    """The target with seven layers, none of which adds anything."""
    deep = tiny_target(3, replace(target.config, num_layers=7))
    deep.embed_tokens.weight.copy_(target.embed_tokens.weight)
    deep.lm_head.weight.copy_(target.lm_head.weight)
    for layer in deep.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return deep


# ----------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("token_ids", [None, IDS], ids=["full", "reduced"])
def test_eagle3_export_loads_back(
    token_ids: Tensor | None, layers: int, teacher: LlamaTeacher, tmp_path: Path
) -> None:
    student = made(teacher, token_ids, method="eagle3", layers=layers)
    student.export(tmp_path)
    loaded = load_draft(tmp_path, teacher.target, 200, "eagle3")
    assert isinstance(loaded.draft, Eagle3Draft)
    assert loaded.draft.taps == (2, 3, 4)
    assert loaded.head.embed_tokens is None, "the embedding is the target's"
    pairs = {"draft": loaded.draft, "head": loaded.head}
    for name, parameter in student.named_parameters():
        part, rest = name.split(".", 1)
        assert pairs[part].get_parameter(rest).equal(parameter.bfloat16().double()), name
    if token_ids is None:
        assert loaded.token_ids is None
    else:
        assert loaded.token_ids is not None
        assert loaded.token_ids.equal(token_ids)


def test_eagle1_export_keeps_the_chosen_rows_in_its_side_file(
    teacher: LlamaTeacher, tmp_path: Path
) -> None:
    made(teacher).export(tmp_path, IDS)
    loaded = load_draft(tmp_path, teacher.target, 200, "eagle")
    assert loaded.token_ids is not None
    assert loaded.token_ids.equal(IDS)
