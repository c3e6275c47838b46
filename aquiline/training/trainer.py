"""The trainer: online distillation of a draft against the live, frozen target.

Every step the target runs over a packed batch and supplies its features; the draft learns to
predict the next feature from [embedding of the next token ; this feature], scored where the
predicted token is the assistant's. Nothing is dumped to disk. Data order and noise are functions
of the step, so a resumed run is the run that was never stopped.

    i:            0     1     2      ...       inputs of the draft at i:  embed(t_{i+1}), h_i
    predicts:    h_1   h_2   h_3     ...       and through the head the law of t_{i+2}
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from aquiline.core.errors import AquilineError
from aquiline.decoding.models import DecoderModels, Drafter
from aquiline.models.llama import Llama
from aquiline.speculation.tree import TreeShape
from aquiline.text.tokenizer import Tokenizer
from aquiline.training.acceptance import Acceptance, measure_acceptance
from aquiline.training.checkpoint import TrainingState, load_state, save_state
from aquiline.training.config import TrainConfig
from aquiline.training.objectives import Loss
from aquiline.training.optimizer import MasterAdamW
from aquiline.training.packing import PackedBatch, Packer
from aquiline.training.student import Student, scored_positions
from aquiline.training.teacher import LlamaTeacher


@dataclass(frozen=True)
class Progress:
    """One step, as the progress bar and the log see it."""

    step: int
    tokens: int
    epoch: float
    learning_rate: float
    loss: float
    regression: float
    cross_entropy: float
    top1: float
    tokens_per_second: float
    acceptance: Acceptance | None


LOG_EVERY = 10  # steps between readings of the loss; reading it waits for the device
Report = Callable[[Progress], None]


class Trainer:
    """One run. ``target`` is frozen; ``packer`` supplies batches by step number."""

    def __init__(
        self, config: TrainConfig, target: Llama, tokenizer: Tokenizer, packer: Packer
    ) -> None:
        self.config, self.target, self.tokenizer, self.packer = config, target, tokenizer, packer
        self.teacher = LlamaTeacher(target)
        self.token_ids: Tensor | None = None
        if config.draft_vocab_size is not None:
            counts = torch.from_numpy(packer.corpus.token_counts(target.config.vocab_size))
            self.token_ids = frequent_tokens(counts, config.draft_vocab_size)
        own = self.token_ids if config.method == "eagle3" else None
        self.student = Student(config, self.teacher, own)
        self.optimizer = MasterAdamW(self.student, config.weight_decay, config.gradient_clip)
        self.prompts = packer.held_out_prompts(
            config.eval_prompts, config.max_length - config.eval_tokens
        )
        if not self.prompts:
            raise AquilineError(
                f"eval_tokens={config.eval_tokens}: no held-out prompt fits beside it in "
                f"max_length={config.max_length}; lower it or raise holdout={config.holdout}"
            )
        self.step = 0

    def run(self, out: Path, report: Report) -> Acceptance:
        """Train to the end, resuming from ``out`` if it holds a checkpoint; export the draft.

        Raises AquilineError on a loss that is not finite; the last checkpoint stays whole.
        """
        state = load_state(out, self.config)
        if state is not None:
            self.optimizer.restore(state.tensors)
            self.step = state.step
        acceptance: Acceptance | None = None
        logged, started = self.step, time.perf_counter()
        worst = torch.zeros((), device=self.target.embed_tokens.weight.device)
        while self.step < self.config.steps:
            rate = self.config.learning_rate_at(self.step)
            batch = self.packer.batch(self.step)
            loss, norm = self._update(batch, rate)
            self.step += 1
            worst = torch.maximum(worst, norm)
            due = self.step % self.config.eval_every == 0 or self.step == self.config.steps
            if not due and self.step % LOG_EVERY:
                continue
            values = self._finite(loss, worst)
            elapsed = time.perf_counter() - started
            speed = (self.step - logged) * self.config.tokens_per_batch / elapsed
            if due:
                acceptance = self.measure()
                save_state(out, self.config, TrainingState(self.step, self.optimizer.state()))
            tokens = self.step * self.config.tokens_per_batch
            shown = acceptance if due else None
            report(Progress(self.step, tokens, batch.epoch, rate, *values, speed, shown))
            logged, started = self.step, time.perf_counter()
        acceptance = acceptance or self.measure()
        self.export(out)
        return acceptance

    def _update(self, batch: PackedBatch, rate: float) -> tuple[Loss, Tensor]:
        """One optimiser step: the loss before it and the gradient's norm."""
        loss = self.loss(batch)
        loss.total.backward()  # type: ignore[no-untyped-call]
        return loss, self.optimizer.step(rate)

    def _finite(self, loss: Loss, norm: Tensor) -> tuple[float, float, float, float]:
        """total, regression, cross_entropy and top1 on the host.

        ``norm`` is the largest gradient norm since the last check: a loss may be finite and its
        gradient not.
        """
        total = float(loss.total.detach())
        names = ("regression", "cross_entropy", "top1")
        others = [float(loss.terms[name][0]) if name in loss.terms else 0.0 for name in names]
        for name, value in (("loss", total), ("gradient norm", float(norm))):
            if not math.isfinite(value):
                raise AquilineError(
                    f"{name} is {value} at step {self.step}, batch {self.step - 1} or one of "
                    f"the {LOG_EVERY} before it; the last checkpoint is whole, lower "
                    "learning_rate and resume"
                )
        return total, others[0], others[1], others[2]

    def loss(self, batch: PackedBatch) -> Loss:
        """The objective on one packed batch."""
        index = scored_positions(batch)
        if len(index) == 0:
            raise AquilineError(f"batch {self.step}: no assistant token in it; check the data")
        device = self.teacher.device
        batch = replace(
            batch, tokens=batch.tokens.to(device), positions=batch.positions.to(device),
            cu_seqlens=batch.cu_seqlens.to(device), loss_mask=batch.loss_mask.to(device),
        )  # fmt: skip
        torch.manual_seed(self.step)  # of the noise
        known = self.teacher(batch, self.student.draft.taps)
        count = torch.tensor(len(index), device=device)
        loss: Loss = self.student(batch, known, count, index.to(device))
        return loss

    @torch.no_grad()
    def measure(self) -> Acceptance:
        """TPC of a chain of 3 on held-out prompts, greedy, with the real decoder."""
        models = DecoderModels(self.target, Drafter(self.student.draft, self.student.head))
        return measure_acceptance(
            models, self.prompts, TreeShape.chain(3), self.config.eval_tokens,
            frozenset(self.tokenizer.eos_token_ids),
        )  # fmt: skip

    def export(self, out: Path) -> None:
        """Write the draft as ``out/draft``: the public layout, embedding included."""
        self.student.export(out / "draft", self.token_ids)


def frequent_tokens(counts: Tensor, size: int) -> Tensor:
    """Ids [size] of the most frequent tokens by counts [V], ascending."""
    return counts.topk(min(size, len(counts))).indices.sort().values
