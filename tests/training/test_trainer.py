"""The trainer: it learns, it resumes bit for bit, it scores what it should, it stops in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from aquiline.core.errors import AquilineError, CheckpointError
from aquiline.core.params import SamplingParams
from aquiline.decoding.models import DecoderModels, Drafter
from aquiline.engine.llm import LLM
from aquiline.models.checkpoint import open_checkpoint
from aquiline.models.draft import DraftHead
from aquiline.models.draft_checkpoint import load_draft
from aquiline.models.llama import Llama, load_llama
from aquiline.speculation.tree import TreeShape
from aquiline.text.tokenizer import Tokenizer, load_tokenizer
from aquiline.training.acceptance import measure_acceptance
from aquiline.training.config import TrainConfig
from aquiline.training.corpus import Corpus, build_corpus
from aquiline.training.objectives import Loss
from aquiline.training.packing import Packer
from aquiline.training.trainer import Progress, Trainer, frequent_tokens
from tests.tiny_checkpoint import CYCLE, IM_END, make_draft, token, write_draft, write_target

CPU = torch.device("cpu")
BATCH, LENGTH = 256, 128


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Setting:
    """A tiny target that recites the alphabet, more or less, and conversations about it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = write_target(root / "target", mix=0.15)
        self.tokenizer: Tokenizer = load_tokenizer(self.folder)
        letters = "abcdefghijklmnopqrstuvwxyz"
        conversations = [
            [
                {"role": "user", "content": f"go {i}"},
                {"role": "assistant", "content": (letters * 2)[i % 26 :][: 5 + i % 20]},
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": letters[i % 7 :][: i % 9]},
            ]
            for i in range(60)
        ]
        build_corpus(self.tokenizer, conversations, root / "corpus", LENGTH)
        self.corpus = Corpus.open(root / "corpus")
        self.config = TrainConfig(
            str(self.folder), str(root / "corpus"), layers=1, max_length=LENGTH,
            tokens_per_batch=BATCH, tokens=20 * BATCH, learning_rate=3e-3, warmup_tokens=2 * BATCH,
            holdout=6, eval_every=5, eval_prompts=3, eval_tokens=8, seed=3, device="cpu",
        )  # fmt: skip

    def target(self, dtype: torch.dtype = torch.float32) -> Llama:
        return load_llama(open_checkpoint(self.folder), dtype, CPU, 400)

    def trainer(self, dtype: torch.dtype = torch.float32, **changes: Any) -> Trainer:
        config = replace(self.config, **changes)
        packer = Packer(self.corpus, config.tokens_per_batch, config.seed, config.holdout)
        return Trainer(config, self.target(dtype), self.tokenizer, packer)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("trainer"))


def ignore(progress: Progress) -> None:
    """A report nobody reads."""


class Stopped(Exception):
    """The power cut of these tests."""


def stop_at(step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.step == step:
            raise Stopped

    return report


def weights(run: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.student.draft.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].equal(b[name]), name


# --------------------------------------------------------------------------------------- running


def test_a_short_run_lowers_the_loss_and_exports_a_draft(setting: Setting, tmp_path: Path) -> None:
    run, seen = setting.trainer(learning_rate=1e-2), []
    batches = [run.packer.batch(step) for step in range(4)]

    def losses_now() -> tuple[float, float]:
        with torch.no_grad():
            found = [run.loss(batch) for batch in batches]
        return (
            sum(float(loss.terms["regression"]) for loss in found),
            sum(float(loss.terms["cross_entropy"]) for loss in found),
        )

    before = losses_now()
    acceptance = run.run(tmp_path, seen.append)
    after = losses_now()
    assert after[0] < 0.8 * before[0]
    assert after[1] < 0.9 * before[1]
    assert [progress.step for progress in seen] == [5, 10, 15, 20]
    assert all(progress.acceptance is not None for progress in seen)
    assert seen[-1].acceptance == acceptance
    assert seen[-1].tokens == 20 * BATCH
    assert 1.0 <= acceptance.tokens_per_call <= 4.0
    loaded = load_draft(tmp_path / "draft", run.target, 200).draft
    for name, tensor in weights(run).items():
        if not name.startswith("rotary"):
            assert loaded.state_dict()[name].equal(tensor.bfloat16().float()), name


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
            learning_rate=1e-2, tokens=60 * BATCH, eval_every=60, eval_prompts=6, eval_tokens=24,
        )  # fmt: skip
        packer = Packer(setting.corpus, BATCH, config.seed, config.holdout)
        out = tmp_path / str(unroll)
        acceptance = Trainer(config, target, setting.tokenizer, packer).run(out, ignore)
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
    assert not other.student.draft.fc.weight.equal(runs[0].student.draft.fc.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [5, 10])
def test_resumed_run_is_the_run_that_never_stopped(
    stop: int, dtype: torch.dtype, setting: Setting, tmp_path: Path
) -> None:
    whole = setting.trainer(dtype, feature_noise=0.2, tokens=12 * BATCH)
    expected = whole.run(tmp_path / "whole", ignore)
    cut = setting.trainer(dtype, feature_noise=0.2, tokens=12 * BATCH)
    with pytest.raises(Stopped):
        cut.run(tmp_path / "cut", stop_at(stop))
    torch.manual_seed(99)  # nothing may hang on the global state
    resumed = setting.trainer(dtype, feature_noise=0.2, tokens=12 * BATCH)
    steps: list[int] = []
    acceptance = resumed.run(tmp_path / "cut", lambda progress: steps.append(progress.step))
    assert steps[0] > stop
    assert acceptance == expected
    assert_same(weights(resumed), weights(whole))
    assert_same(resumed.optimizer.state(), whole.optimizer.state())
    drafts = [
        (tmp_path / name / "draft/model.safetensors").read_bytes() for name in ("whole", "cut")
    ]
    assert drafts[0] == drafts[1]


def test_finished_run_is_not_trained_further(setting: Setting, tmp_path: Path) -> None:
    first = setting.trainer(tokens=5 * BATCH)
    first.run(tmp_path, ignore)
    again = setting.trainer(tokens=5 * BATCH)
    again.run(tmp_path, ignore)
    assert_same(weights(again), weights(first))


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-4}, {"layers": 2}, {"seed": 9}, {"feature_noise": 0.1},
        {"data": "elsewhere"}, {"intermediate_size": 16}, {"holdout": 7},
    ],
)  # fmt: skip
def test_checkpoint_of_another_configuration_is_refused(
    change: dict[str, Any], setting: Setting, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        setting.trainer().run(tmp_path, stop_at(5))
    with pytest.raises(CheckpointError, match=f"written with {next(iter(change))}="):
        setting.trainer(**change).run(tmp_path, ignore)


def test_damaged_checkpoint_is_refused(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        setting.trainer().run(tmp_path, stop_at(5))
    path = tmp_path / "training.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-64], whole[:100], b"", b"{}" + whole[2:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"training\.safetensors.*damaged") as caught:
            setting.trainer().run(tmp_path, ignore)
        assert "\n" not in str(caught.value)


def test_checkpoint_without_a_tensor_is_refused(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        setting.trainer().run(tmp_path, stop_at(5))
    path = tmp_path / "training.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["exp_avg.draft.fc.weight"]
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=r"exp_avg\.draft\.fc\.weight"):
        setting.trainer().run(tmp_path, ignore)


def test_nan_loss_stops_with_the_batch_named_and_the_checkpoint_whole(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, good = setting.trainer(feature_noise=0.1), Trainer.loss

    def poisoned(self: Trainer, batch: Any) -> Loss:
        loss = good(self, batch)
        return replace(loss, total=loss.total * float("nan")) if self.step == 7 else loss

    monkeypatch.setattr(Trainer, "loss", poisoned)
    with pytest.raises(AquilineError, match="loss is nan at step 10, batch 9 ") as caught:
        run.run(tmp_path, ignore)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "draft").exists()
    monkeypatch.setattr(Trainer, "loss", good)
    resumed = setting.trainer(feature_noise=0.1)
    resumed.run(tmp_path, ignore)
    whole = setting.trainer(feature_noise=0.1)
    whole.run(tmp_path / "whole", ignore)
    assert_same(weights(resumed), weights(whole))


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of step 5 is finite, its gradient is not: what step 5 saves must be sound."""
    run, good = setting.trainer(), Trainer.loss

    def poisoned(self: Trainer, batch: Any) -> Loss:
        loss = good(self, batch)
        if self.step == 4:
            loss.total.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(Trainer, "loss", poisoned)
    with pytest.raises(AquilineError, match=r"not finite|is nan|is inf"):
        run.run(tmp_path, ignore)
    monkeypatch.setattr(Trainer, "loss", good)
    setting.trainer().run(tmp_path, ignore)


def test_held_out_prompts_that_are_all_too_long_are_refused(
    setting: Setting, tmp_path: Path
) -> None:
    with pytest.raises(AquilineError, match="eval_tokens"):
        setting.trainer(eval_tokens=LENGTH).run(tmp_path, ignore)


# ------------------------------------------------------------------------------------------ loss


def test_batch_without_an_assistant_token_is_named(setting: Setting) -> None:
    run = setting.trainer()
    batch = run.packer.batch(0)
    with pytest.raises(AquilineError, match="batch 0: no assistant token"):
        run.loss(replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)))


def test_only_the_draft_learns(setting: Setting) -> None:
    run = setting.trainer()
    run.loss(run.packer.batch(0)).total.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in run.target.parameters())
    for name, parameter in run.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


# ------------------------------------------------------------------------- schedule and settings


def test_learning_rate_warms_up_stays_and_decays() -> None:
    config = TrainConfig(
        "t", "d", max_length=10, tokens_per_batch=10, tokens=1000, warmup_tokens=100,
        decay_fraction=0.3, learning_rate=2.0,
    )  # fmt: skip
    assert config.steps == 100
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:71] == [2.0] * 61
    assert rates[70:] == pytest.approx([2.0 * (30 - i) / 30 for i in range(30)])
    flat = replace(config, warmup_tokens=0, decay_fraction=0.0)
    assert [flat.learning_rate_at(step) for step in range(100)] == [2.0] * 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0), ("tokens", 0), ("learning_rate", 0.0), ("learning_rate", -1.0),
        ("decay_fraction", 1.5), ("eval_every", 0), ("max_length", 10**6), ("holdout", 0),
        ("learning_rate", float("nan")), ("draft_vocab_size", 0), ("intermediate_size", -4),
        ("gradient_clip", -1.0), ("warmup_tokens", -5), ("feature_noise", -0.1),
    ],
)  # fmt: skip
def test_bad_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(AquilineError, match=f"^{field}="):
        TrainConfig("t", "d", **{field: value})


def test_frequent_tokens() -> None:
    assert frequent_tokens(torch.tensor([5, 0, 9, 7, 1]), 3).tolist() == [0, 2, 3]
    assert frequent_tokens(torch.tensor([5, 0]), 9).tolist() == [0, 1]


def test_reduced_vocabulary_is_exported(setting: Setting, tmp_path: Path) -> None:
    run = setting.trainer(draft_vocab_size=30, tokens=BATCH)
    run.run(tmp_path, ignore)
    token_ids = load_draft(tmp_path / "draft", run.target, 200).token_ids
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
