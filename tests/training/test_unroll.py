"""Unrolled training against real decoding: the same hidden states, step by step."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aquiline.core.params import SamplingParams
from aquiline.decoding.models import DecoderModels, Drafter
from aquiline.decoding.prefill import prefill
from aquiline.decoding.round import Round
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.tree import TreeShape
from aquiline.speculation.verification.coupled import Coupled
from aquiline.training.config import TrainConfig
from aquiline.training.packing import PackedBatch
from aquiline.training.student import Student, scored_positions
from aquiline.training.teacher import LlamaTeacher
from tests.laws.tiny import CONFIG, CPU, tiny_target
from tests.training.packed import packed

DEPTH = 4


def student(teacher: LlamaTeacher, **changes: Any) -> Student:
    """Tiny, in float64, with norms that are not the identity and matrices that do something."""
    settings = {"max_length": 64, "tokens_per_batch": 64, "layers": 2, "seed": 1} | changes
    ids = torch.tensor([3, 7, 8, 20, 31, 49]) if changes.get("draft_vocab_size") else None
    made = Student(TrainConfig("t", "d", **settings), teacher, ids)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(std=0.3, generator=generator)
    return made


@pytest.fixture(scope="module")
def teacher() -> LlamaTeacher:
    return LlamaTeacher(tiny_target(0, replace(CONFIG, num_layers=7)))


def drafted_logits(models: DecoderModels, text: list[int], known: int) -> list[Tensor]:
    """[Vd] draft logits of each level of a chain below token ``known``, drafting the true text."""

    class Follow(Coupled):
        """Proposes what the text says, whatever the draft would."""

        def propose(self, logits: Tensor, depth: int, count: int) -> Tensor:
            seen.append(logits[0, 0].clone())
            return torch.tensor([[[text[known + depth]]]])

    drafter = models.drafter
    assert drafter is not None
    # A reduced vocabulary may lack what the text says: drafted ids are the target's here.
    drafter.head.to_target = lambda ids: ids  # type: ignore[method-assign]
    seen: list[Tensor] = []
    planes = models.planes(9, 8)
    pages = torch.randperm(8, generator=torch.Generator().manual_seed(3))[None] + 1
    sampling = SamplingBatch.of([SamplingParams(temperature=0)], [0], CPU)
    prompt = torch.tensor([text[:known]])
    state = prefill(models, planes, pages, prompt, torch.tensor([known]), sampling).state
    root = torch.tensor([text[known]])  # the text's, not the drawn one
    state = replace(state, roots=root, pending_tokens=root[:, None])
    tree = TreeShape.chain(DEPTH).tables(CPU)
    Round(models, planes, tree, Follow, pages, state, sampling).run()
    return seen


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "eagle", "layers": 1},
        {"method": "eagle", "layers": 3},
        {"method": "eagle3", "layers": 1},
        {"method": "eagle3", "layers": 2, "draft_vocab_size": 6},
    ],
    ids=str,
)
def test_every_step_is_what_decoding_drafts(changes: dict[str, Any], teacher: LlamaTeacher) -> None:
    made = student(teacher, unroll=DEPTH, **changes)
    lengths = [11, 3, 14]
    batch = packed(lengths, padding=4)
    with torch.no_grad():
        steps = made.unrolled(batch, teacher(batch, made.draft.taps))
        models = DecoderModels(teacher.target, Drafter(made.draft, made.head))
        compared = 0
        for start, end in itertools.pairwise(batch.cu_seqlens[:4].tolist()):
            text = batch.tokens[start:end].tolist()
            for known in range(1, len(text) - DEPTH):
                drafted = drafted_logits(models, text, known)
                for step, logits in enumerate(drafted):
                    ours = made.head(steps[step][0, start + known - 1])
                    torch.testing.assert_close(ours, logits, rtol=1e-9, atol=1e-9)
                    compared += 1
    assert compared == DEPTH * (6 + 9)


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_no_gradient_crosses_a_documents_edge(method: str, teacher: LlamaTeacher) -> None:
    """The loss of a batch is that of its documents alone, and so is its gradient."""
    made = student(teacher, unroll=3, method=method, objective="lk")
    lengths = [7, 2, 9, 12]
    whole = packed(lengths, seed=5, padding=3)
    count = torch.tensor(len(scored_positions(whole)))

    def gradient(batches: list[PackedBatch]) -> tuple[float, list[Tensor], dict[str, Tensor]]:
        made.zero_grad()
        losses = [made(b, teacher(b, made.draft.taps), count) for b in batches]
        total = sum(loss.total for loss in losses)
        total.backward()
        terms = {name: sum(loss.terms[name] for loss in losses) for name in losses[0].terms}
        return float(total.detach()), [p.grad.clone() for p in made.parameters()], terms

    alone = []
    for start, end in itertools.pairwise(whole.cu_seqlens[:-1].tolist()):
        part = slice(start, end)
        cu = torch.tensor([0, end - start], dtype=torch.int32)
        fields = (whole.tokens[part], whole.loss_mask[part], whole.positions[part])
        alone.append(PackedBatch(*fields, cu, end - start, 0.0))
    found, expected = gradient([whole]), gradient(alone)
    assert found[0] == pytest.approx(expected[0], rel=1e-9)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    for name, term in expected[2].items():
        torch.testing.assert_close(found[2][name], term)


def test_a_step_scores_what_step_0_scores_where_its_row_is_in_the_document(
    teacher: LlamaTeacher,
) -> None:
    """Brute force over positions, with the law of a draft that is run as in decoding."""
    made = student(teacher, unroll=3, objective="tv")
    batch = packed([6, 9, 2, 5], seed=8)
    index = scored_positions(batch)
    edges = batch.cu_seqlens.tolist()
    with torch.no_grad():
        known = teacher(batch, ())
        steps = made.unrolled(batch, known)
        loss = made(batch, known, torch.tensor(len(index)))
    head = teacher.head_weight
    expected = torch.zeros(3, dtype=torch.float64)
    seen = []
    for start, end in itertools.pairwise(edges):
        for i in range(start, end - 2):
            if not batch.loss_mask[i + 2]:
                continue
            seen.append(i)
            target_probs = (head @ known.features[0, i + 1]).softmax(dim=0)
            for step in range(3):
                if i - step >= start:
                    draft_probs = (head @ steps[step][0, i - step]).softmax(dim=0)
                    expected[step] += torch.minimum(target_probs, draft_probs).sum()
    assert seen == index.tolist()
    torch.testing.assert_close(loss.terms["acceptance"], expected / len(seen))
