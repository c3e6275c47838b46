"""The trainer: online distillation of a draft against the live, frozen target.

Every optimiser step each rank runs the target over its packed batches and the draft learns from
what it says (student.py); nothing is dumped to disk. Data order and noise are functions of the
batch's number, so a resumed run is the run that was never stopped, and the ranks of a step can be
traded for batches in turn.

The host never waits for the device between two readings of the loss. What must not be missed in
between, the first step whose gradient is not finite, is kept on the device.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._composable.checkpoint_activation import checkpoint as recompute

from aquiline.core.errors import AquilineError
from aquiline.decoding.models import DecoderModels, Drafter
from aquiline.layers.decoder import DecoderLayer
from aquiline.layers.eagle3 import Eagle3Layer
from aquiline.layers.mlp import MLP
from aquiline.speculation.tree import TreeShape
from aquiline.text.tokenizer import Tokenizer
from aquiline.training.acceptance import Acceptance, measure_acceptance
from aquiline.training.checkpoint import Checkpoints, Mark, save_masters, start_from
from aquiline.training.config import TrainConfig
from aquiline.training.feed import Fed, Feed
from aquiline.training.objectives import Loss
from aquiline.training.optimizer import MasterAdamW
from aquiline.training.packing import Packer
from aquiline.training.parallel import World, gathered
from aquiline.training.progress import Progress, Window
from aquiline.training.schedule import Schedule
from aquiline.training.student import Student
from aquiline.training.teacher import LlamaTeacher, Teacher

CHAIN = TreeShape.chain(3)
SUMMARY = "summary.json"  # in the run's folder


@dataclass(frozen=True)
class Finished:
    """How a run ended: its best check (None if none was made), and whether it stopped early."""

    best: tuple[int, float] | None
    acceptance: Acceptance | None
    stopped: bool


class Trainer:
    """One run. ``teacher`` is frozen; ``packer`` supplies batches by number."""

    def __init__(
        self,
        config: TrainConfig,
        teacher: Teacher,
        tokenizer: Tokenizer,
        packer: Packer,
        world: World | None = None,
    ) -> None:
        self.config, self.teacher, self.tokenizer, self.packer = config, teacher, tokenizer, packer
        self.world = world = world or World(device=teacher.device)
        if config.shard == "full" and world.mesh is not None:
            world.shard(teacher.model, teacher.layers, rest=False)
            teacher.to(world.device)  # a teacher too large for one device comes on the host
        self.prompts = self._prompts()
        self.token_ids: Tensor | None = None
        if config.draft_vocab_size is not None:
            counts = torch.from_numpy(packer.corpus.token_counts(teacher.config.vocab_size))
            self.token_ids = frequent_tokens(counts, config.draft_vocab_size)
        own = self.token_ids if config.method == "eagle3" else None
        self.student = Student(config, teacher, own)
        modules = list(self.student.modules())
        if config.recompute:
            for module in modules:
                if isinstance(module, MLP):
                    recompute(module, preserve_rng_state=False)
        if config.shard != "none":
            layers = [one for one in modules if isinstance(one, DecoderLayer | Eagle3Layer)]
            world.shard(self.student, layers, rest=True)
        self.optimizer = MasterAdamW(self.student, config.weight_decay, config.gradient_clip, world)
        self.batches = config.accumulate * world.size
        self.schedule = Schedule.of(config, self.batches)
        self.mark = Mark(batches=self.batches)
        self._epoch = 0.0

    def run(
        self, out: Path, report: Callable[[Progress], None], origin: Path | None = None
    ) -> Finished:
        """Train to the end, and leave the draft of the best check in ``out/draft``.

        Goes on from the newest checkpoint in ``out`` if there is one, else from ``origin``, a
        step folder or masters of another run. Raises AquilineError on a loss or gradient that is
        not finite; the last checkpoint stays whole.
        """
        config, device = self.config, self.teacher.device
        with (
            Checkpoints(out, config, self.world) as saved,
            Feed(self.packer, self.world, config.accumulate, device) as feed,
        ):
            self._resume(saved, origin)
            acceptance, losses = None, list[float]()  # losses since the last check
            stopped = self._overtrained()
            window = Window(self.world, feed, self.mark.step)
            while self.mark.step < self.schedule.steps and not stopped:
                rate = self.schedule.rate(self.mark.step, self.mark.restarted)
                self._epoch = epoch = self._update(feed, window, rate)
                step = self.mark.step
                due = step % config.eval_every == 0 or step == self.schedule.steps
                if not due and step % config.log_every:
                    continue
                progress = window.read(config, step, epoch, rate)
                losses.append(progress.loss)
                if due:
                    progress = self._check(out, saved, progress, sum(losses) / len(losses))
                    acceptance, losses = progress.acceptance, []
                    stopped = self._overtrained()
                report(progress)
                window = Window(self.world, feed, step)
        finished = Finished(self.mark.best, acceptance, stopped)
        if self.world.rank == 0:
            (out / SUMMARY).write_text(json.dumps(self.summary(finished), indent=1) + "\n")
        return finished

    def summary(self, finished: Finished) -> dict[str, Any]:
        """What the run came to; kept beside its draft."""
        config, best = self.config, finished.best
        return {
            "tokens": self.mark.step * self.batches * config.tokens_per_batch,
            "epochs": round(self._epoch, 3), "layers": config.layers,
            "objective": described(config), "best_step": best and best[0],
            "tokens_per_call": best and round(best[1], 4),
            "last": finished.acceptance and dataclasses.asdict(finished.acceptance),
            "stopped_early": finished.stopped, "config": dataclasses.asdict(config),
            "torch": torch.__version__, "device": str(self.teacher.device),
            "ranks": self.world.size,
        }  # fmt: skip

    def _resume(self, saved: Checkpoints, origin: Path | None) -> None:
        state = self.optimizer.state() | self._vocabulary()
        mark = saved.resume(state, self.batches)
        if mark is None and origin is not None:
            mark = start_from(origin, state, self.config, self.batches, self.world)
        if mark is not None:
            self.mark = mark
            self.optimizer.restored()

    def _update(self, feed: Feed, window: Window, rate: float) -> float:
        """One optimiser step; the epoch of its first batch."""
        batches, count = feed.take(self.mark.step)
        for fed in batches:
            loss = self.loss(fed, count)
            loss.total.backward()  # type: ignore[no-untyped-call]
            self.optimizer.accumulate()
            window.add(loss.total.detach(), loss.terms)
        norm = self.optimizer.step(rate)
        window.end_step(norm, self.mark.step)
        self.mark = replace(self.mark, step=self.mark.step + 1)
        return batches[0].batch.epoch

    def loss(self, fed: Fed, count: Tensor) -> Loss:
        """One batch's share of a step that scores ``count`` positions in all."""
        torch.manual_seed((self.config.seed << 32) + fed.number)  # of the noise
        known = self.teacher(fed.batch, self.student.draft.taps)
        loss: Loss = self.student(fed.batch, known, count, fed.scored)
        return loss

    def _check(self, out: Path, saved: Checkpoints, progress: Progress, loss: float) -> Progress:
        """Measure, export if it is the best so far, save."""
        acceptance, tree = self.measure()
        if acceptance is not None:
            found = acceptance.tokens_per_call
            checks = (*self.mark.checks, (found, loss))[-(self.config.patience or 0) - 1 :]
            self.mark = replace(self.mark, checks=checks)
            if self.mark.best is None or found >= self.mark.best[1]:
                self.mark = replace(self.mark, best=(progress.step, found))
        if self.mark.best is None or self.mark.best[0] == progress.step:
            self.export(out)
        copies = self.optimizer.copies()
        copies.tensors |= {name: ids.cpu() for name, ids in self._vocabulary().items()}
        saved.save(copies, self.mark)
        return replace(progress, acceptance=acceptance, tree=tree)

    def _overtrained(self) -> bool:
        """Tokens per call fell in each of the last ``patience`` checks, and so did the loss."""
        checks, patience = self.mark.checks, self.config.patience
        if patience is None or len(checks) <= patience:
            return False
        fell = all(after[0] < before[0] for before, after in itertools.pairwise(checks))
        return fell and checks[-1][1] < checks[0][1]

    @torch.no_grad()
    def measure(self) -> tuple[Acceptance | None, Acceptance | None]:
        """Greedy, on held-out prompts, with the real decoder: the chain of 3, and ``eval_tree``.

        Every rank decodes every prompt, in step with the others since layers may be sharded.
        None for a teacher that the decoder cannot run.
        """
        if not isinstance(self.teacher, LlamaTeacher):
            return None, None
        shapes = [CHAIN]
        if self.config.eval_tree is not None:
            shapes.append(TreeShape.named(self.config.eval_tree))
        with gathered(self.student):
            drafter = Drafter(self.student.draft, self.student.head)
            models = DecoderModels(self.teacher.target, drafter)
            ends = frozenset(self.tokenizer.eos_token_ids)
            found = [
                measure_acceptance(models, self.prompts, shape, self.config.eval_tokens, ends)
                for shape in shapes
            ]
        chain, *tree = self.world.agree(found)
        return chain, tree[0] if tree else None

    def export(self, out: Path) -> None:
        """Write the draft as ``out/draft``: the public layout, embedding included."""
        partial = out / "draft.partial"
        with gathered(self.student):
            if self.world.rank == 0:
                self.student.export(partial, self.token_ids)
                shutil.rmtree(out / "draft", ignore_errors=True)
                partial.rename(out / "draft")

    def _vocabulary(self) -> dict[str, Tensor]:
        """Goes with every checkpoint: rows of an EAGLE-3 head stay with their token ids."""
        ids = self.student.head.token_ids
        return {} if ids is None else {"token_ids": ids}

    def save_masters(self, path: Path) -> None:
        """Write the fp32 weights alone, from which another run can start."""
        weights = self.optimizer.weights() | self._vocabulary()
        save_masters(path, weights, self.config, self.mark, self.world)

    def _prompts(self) -> list[list[int]]:
        config = self.config
        prompts = self.packer.held_out_prompts(
            config.eval_prompts, config.max_length - config.eval_tokens
        )
        if not prompts and isinstance(self.teacher, LlamaTeacher):
            raise AquilineError(
                f"eval_tokens={config.eval_tokens}: no held-out prompt fits beside it in "
                f"max_length={config.max_length}; lower it or raise holdout={config.holdout}"
            )
        return prompts


def described(config: TrainConfig) -> str:
    """The objective in a few words: "eagle", "eagle3 lk, unroll 3"."""
    words = f"eagle3 {config.objective}" if config.method == "eagle3" else config.objective
    if config.method == "eagle" and config.objective != "eagle" and config.weight_of_regression:
        words += f" + {config.weight_of_regression:g} {config.regression}"
    return words if config.unroll == 1 else f"{words}, unroll {config.unroll}"


def frequent_tokens(counts: Tensor, size: int) -> Tensor:
    """Ids [size] of the most frequent tokens by counts [V], ascending."""
    return counts.topk(min(size, len(counts))).indices.sort().values
