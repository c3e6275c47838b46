"""The trainer: it learns, it stops in time, it keeps the best draft, it measures acceptance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aquiline.core.errors import AquilineError, DataError
from aquiline.core.params import SamplingParams
from aquiline.decoding.models import DecoderModels, Drafter
from aquiline.engine.llm import LLM
from aquiline.models.checkpoint import open_checkpoint
from aquiline.models.draft import DraftHead
from aquiline.models.draft_checkpoint import load_draft
from aquiline.models.llama import load_llama
from aquiline.speculation.tree import TreeShape
from aquiline.training.acceptance import Acceptance, measure_acceptance
from aquiline.training.config import TrainConfig
from aquiline.training.feed import Fed, Feed
from aquiline.training.objectives import Loss
from aquiline.training.packing import Packer
from aquiline.training.parallel import World
from aquiline.training.progress import Progress
from aquiline.training.teacher import LlamaTeacher
from aquiline.training.trainer import Trainer, frequent_tokens
from tests.tiny_checkpoint import CYCLE, IM_END, make_draft, token, write_draft, write_target
from tests.training.tiny_run import BATCH, CPU, LENGTH, Setting, assert_same, ignore, weights


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("trainer"))


# --------------------------------------------------------------------------------------- running


def test_a_short_run_lowers_the_loss_and_exports_its_best_draft(
    setting: Setting, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    run = setting.trainer(learning_rate=1e-2, eval_tree="tree-8")
    finished = run.run(tmp_path, seen.append)
    assert seen[-1].loss < 0.8 * seen[0].loss
    assert seen[-1].terms["cross_entropy"][0] < 0.9 * seen[0].terms["cross_entropy"][0]
    assert [progress.step for progress in seen] == [5, 10, 15, 20]
    assert seen[-1].tokens == 20 * BATCH
    chains = [one.acceptance for one in seen]
    trees = [one.tree for one in seen]
    for chain, tree in zip(chains, trees, strict=True):
        assert chain is not None
        assert tree is not None
        assert 1 <= chain.tokens_per_call <= tree.tokens_per_call + 0.5
    assert finished.acceptance == chains[-1]
    scores = {one.step: one.acceptance.tokens_per_call for one in seen if one.acceptance}
    best = max(scores, key=lambda step: (scores[step], step))
    assert finished.best == (best, scores[best])
    target = setting.target()
    exported = load_draft(tmp_path / "draft", target, 200).draft.state_dict()
    assert exported.keys() >= {"fc.weight"}
    assert {path.name for path in tmp_path.glob("step-*")} == {
        "step-15", "step-20", f"step-{best}",
    }  # fmt: skip


def test_the_draft_of_the_last_step_is_exported_if_it_is_best(
    setting: Setting, tmp_path: Path
) -> None:
    run = setting.trainer(tokens=5 * BATCH)
    run.run(tmp_path, ignore)
    loaded = load_draft(tmp_path / "draft", setting.target(), 200).draft.state_dict()
    for name, tensor in weights(run).items():
        if not name.startswith("rotary"):
            assert loaded[name].equal(tensor.bfloat16().float()), name


def test_eagle3_runs_export_and_unrolling_pays(setting: Setting, tmp_path: Path) -> None:
    """A reduced vocabulary, on a target deep enough to be tapped.

    Trained on the target's features alone, the draft fails on its own hidden states: most of what
    it drafts second is wrong.
    """
    folder = write_target(tmp_path / "target", mix=0.03, num_layers=7)
    target = load_llama(open_checkpoint(folder), torch.float32, CPU, 400)
    found = []
    for unroll in (1, 3):
        config = replace(
            setting.config, method="eagle3", objective="lk", unroll=unroll, draft_vocab_size=30,
            learning_rate=1e-2, tokens=60 * BATCH, decay_tokens=18 * BATCH, eval_every=60,
            eval_prompts=6, eval_tokens=24,
        )  # fmt: skip
        packer = Packer(setting.corpus, BATCH, config.seed, config.holdout)
        out = tmp_path / str(unroll)
        run = Trainer(config, LlamaTeacher(target), setting.tokenizer, packer)
        acceptance = run.run(out, ignore).acceptance
        assert acceptance is not None
        found.append(acceptance.by_depth)
        loaded = load_draft(out / "draft", target, 400, "eagle3")
        models = DecoderModels(target, Drafter(loaded.draft, loaded.head))
        prompts = packer.held_out_prompts(6, LENGTH - 24)
        ends = frozenset(setting.tokenizer.eos_token_ids)
        exported = measure_acceptance(models, prompts, TreeShape.chain(3), 24, ends)
        assert exported.tokens_per_call == pytest.approx(acceptance.tokens_per_call, rel=0.1)
    plain, unrolled = found
    assert unrolled[0] > 0.5
    assert unrolled[1] > plain[1] + 0.2, found


def test_two_runs_of_one_configuration_are_equal(setting: Setting, tmp_path: Path) -> None:
    runs = [setting.trainer(tokens=6 * BATCH, feature_noise=0.2) for _ in range(2)]
    for index, run in enumerate(runs):
        run.run(tmp_path / str(index), ignore)
    assert_same(weights(runs[0]), weights(runs[1]))
    other = setting.trainer(tokens=6 * BATCH, feature_noise=0.2, seed=4)
    other.run(tmp_path / "other", ignore)
    assert not weights(other)["fc.weight"].equal(weights(runs[0])["fc.weight"])


def test_accumulated_batches_are_one_step(setting: Setting, tmp_path: Path) -> None:
    """The gradient of two batches in turn is that of both: sums over one count."""
    run = setting.trainer(accumulate=2)
    with Feed(run.packer, World(), 2, CPU) as feed:
        batches, count = feed.take(0)
        assert int(count) == sum(len(fed.scored) for fed in batches)
        for fed in batches:
            run.loss(fed, count).total.backward()  # type: ignore[no-untyped-call]
            run.optimizer.accumulate()
        both = run.optimizer.gradient.clone()
        run.optimizer.gradient.zero_()
        sum(run.loss(fed, count).total for fed in batches).backward()  # type: ignore[union-attr]
        run.optimizer.accumulate()
    torch.testing.assert_close(run.optimizer.gradient, both)
    assert both.abs().sum() > 0


def test_recomputed_activations_change_nothing(setting: Setting, tmp_path: Path) -> None:
    runs = [setting.trainer(tokens=3 * BATCH, layers=2, recompute=on) for on in (False, True)]
    for index, run in enumerate(runs):
        run.run(tmp_path / str(index), ignore)
    assert_same(weights(runs[0]), weights(runs[1]))


def test_only_the_draft_learns(setting: Setting) -> None:
    run = setting.trainer()
    with Feed(run.packer, World(), 1, CPU) as feed:
        batches, count = feed.take(0)
    run.loss(batches[0], count).total.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in run.teacher.model.parameters())
    for name, parameter in run.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


# ------------------------------------------------------------------------------ stopping in time


def poison(monkeypatch: pytest.MonkeyPatch, number: int, what: str) -> None:
    """From batch ``number`` comes a loss that is ``what``, or a gradient that is (``inf``)."""
    good = Trainer.loss

    def poisoned(self: Trainer, fed: Fed, count: Tensor) -> Loss:
        loss = good(self, fed, count)
        if fed.number == number and what == "nan":
            return replace(loss, total=loss.total * float("nan"))
        if fed.number == number:
            loss.total.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(Trainer, "loss", poisoned)


@pytest.mark.parametrize("what", ["nan", "inf"])
def test_loss_or_gradient_that_is_not_finite_stops_with_the_batch_named(
    what: str, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = setting.trainer(feature_noise=0.1)
    with monkeypatch.context() as patch:
        poison(patch, 7, what)
        with pytest.raises(AquilineError, match=r"step 7 is not finite .*batch 7, doc") as caught:
            run.run(tmp_path, ignore)
    assert "\n" not in str(caught.value)
    documents = str(caught.value).split("documents ")[1].split(" of")[0].split(", ")
    assert [int(one) for one in documents] == sorted(run.packer.documents(7))
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-5"]
    resumed, whole = (setting.trainer(feature_noise=0.1) for _ in range(2))
    resumed.run(tmp_path, ignore)
    whole.run(tmp_path / "whole", ignore)
    assert_same(weights(resumed), weights(whole))


def test_a_bad_step_just_before_a_checkpoint_is_never_saved(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 4, "inf")
    with pytest.raises(AquilineError, match="step 4 is not finite"):
        setting.trainer().run(tmp_path, ignore)
    assert not list(tmp_path.glob("step-*"))


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Acceptance as written down, one check after another."""
    left = iter(scores)
    monkeypatch.setattr(
        Trainer, "measure", lambda self: (Acceptance(next(left), (0.0, 0.0, 0.0)), None)
    )


def test_falling_tokens_per_call_under_a_falling_loss_stop_the_run(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [1.2, 1.6, 1.5, 1.4, 9.9])
    run = setting.trainer(eval_every=2, patience=2, keep=1)
    finished = run.run(tmp_path, ignore)
    assert finished.stopped
    assert finished.best == (4, 1.6)
    assert run.mark.step == 8
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-4", "step-8"}
    again = setting.trainer(eval_every=2, patience=2, keep=1)
    assert again.run(tmp_path, ignore).stopped, "a resumed run remembers"
    assert again.mark.step == 8


def test_a_run_that_recovers_goes_on(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [1.6, 1.5, 1.55, 1.5])
    finished = setting.trainer(patience=2).run(tmp_path, ignore)
    assert not finished.stopped
    assert finished.best == (5, 1.6)


# --------------------------------------------------------------------------- settings, bad input


def test_held_out_prompts_that_are_all_too_long_are_refused(setting: Setting) -> None:
    with pytest.raises(AquilineError, match="eval_tokens"):
        setting.trainer(eval_tokens=LENGTH)


def test_batch_without_an_assistant_token_is_named(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = setting.trainer()
    good = type(run.packer).batch

    def silent(self: Any, step: int) -> Any:
        batch = good(self, step)
        return replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))

    monkeypatch.setattr(type(run.packer), "batch", silent)
    with (
        Feed(run.packer, World(), 1, CPU) as feed,
        pytest.raises(DataError, match="batch 0: no assistant token"),
    ):
        feed.take(0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0), ("tokens", 0), ("learning_rate", 0.0), ("learning_rate", -1.0),
        ("final_rate", 1.5), ("decay_tokens", -1), ("accumulate", 0), ("shard", "all"),
        ("teacher", "theirs"), ("recompute", 1),
        ("keep", 0), ("patience", 0), ("seed", 0.5), ("eval_every", 0), ("max_length", 10**6),
        ("holdout", 0),
        ("learning_rate", float("nan")), ("draft_vocab_size", 0), ("intermediate_size", -4),
        ("gradient_clip", -1.0), ("warmup_tokens", -5), ("feature_noise", -0.1),
    ],
)  # fmt: skip
def test_bad_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(AquilineError, match=f"^{field}="):
        TrainConfig("t", "d", **{field: value})


def test_unknown_tree_is_refused() -> None:
    with pytest.raises(AquilineError, match="tree-9"):
        TrainConfig("t", "d", eval_tree="tree-9")


def test_frequent_tokens() -> None:
    assert frequent_tokens(torch.tensor([5, 0, 9, 7, 1]), 3).tolist() == [0, 2, 3]
    assert frequent_tokens(torch.tensor([5, 0]), 9).tolist() == [0, 1]


def test_reduced_vocabulary_is_exported(setting: Setting, tmp_path: Path) -> None:
    run = setting.trainer(draft_vocab_size=30, tokens=BATCH)
    run.run(tmp_path, ignore)
    token_ids = load_draft(tmp_path / "draft", setting.target(), 200).token_ids
    assert token_ids is not None
    assert len(token_ids) == 30
    assert {IM_END, token("f"), token("h")} <= set(token_ids.tolist())


# ------------------------------------------------------------------------------------ acceptance


def test_perfect_draft_is_measured_as_four(tmp_path: Path) -> None:
    target = load_llama(open_checkpoint(write_target(tmp_path)), torch.float32, CPU, 200)
    models = DecoderModels(target, Drafter(make_draft(), DraftHead(target, None)))
    acceptance = measure_acceptance(
        models, [CYCLE[:3], CYCLE[:7], CYCLE[4:5]], TreeShape.chain(3), 21, frozenset()
    )
    assert acceptance.tokens_per_call == 4.0
    assert acceptance.by_depth == (1.0, 1.0, 1.0)
    useless = DecoderModels(
        target, Drafter(make_draft(), DraftHead(target, torch.tensor([0, 1, 2])))
    )
    acceptance = measure_acceptance(useless, [CYCLE[:3]], TreeShape.chain(3), 9, frozenset())
    assert acceptance.tokens_per_call == 1.0


@pytest.mark.parametrize("tree", [[[0], [0, 0], [0, 0, 0]], [[0], [1], [0, 0], [1, 0]]])
def test_acceptance_is_what_the_engine_gets(
    tree: list[list[int]], setting: Setting, tmp_path: Path
) -> None:
    draft = write_draft(tmp_path / "draft")
    prompts = [CYCLE[i : i + 2 + i] for i in range(8)]
    llm = LLM(str(setting.folder), "float64", {"model": str(draft), "tree": tree})
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=24),
    )
    rounds = sum(output.speculation.rounds for output in outputs)
    expected = sum(output.speculation.tokens for output in outputs) / rounds
    acceptance = measure_acceptance(
        llm.engine.runner.models, prompts, TreeShape.of(tree), 24, frozenset({IM_END})
    )
    assert 1.05 < expected < len(tree[-1]) + 0.95, "neither useless nor perfect"
    assert acceptance.tokens_per_call == pytest.approx(expected)
    by_depth = [
        sum((*o.speculation.accepted_by_depth, 0, 0, 0)[depth] for o in outputs) / rounds
        for depth in range(len(tree[-1]))
    ]
    assert acceptance.by_depth == pytest.approx(tuple(by_depth))
