"""Train the drafts that the quality table compares, one after another on one card.

    aquiline data --out runs/original.jsonl
    aquiline data --source runs/original.jsonl --out runs/original --tokenize
    aquiline data --out runs/regenerated --regenerate --tokenize
    cat runs/original.jsonl runs/regenerated.jsonl > runs/both.jsonl
    aquiline data --source runs/both.jsonl --out runs/mixed --near 1 --tokenize
    python -m benchmarks.training_curves --original runs/original --regenerated runs/regenerated \\
        --mixed runs/mixed --out runs/curves [--only NAME ...]
    python -m benchmarks.draft_quality runs/curves/*/draft --out R.json

Each run is the baseline with a change or two. The trunk reads the original and the regenerated
answers; it keeps a constant rate and leaves checkpoints all along the token curve, from which short
cool-downs make drafts. A run that has a summary is not run again, one that was stopped goes on.
Prints a line a check; the limit is in benchmarks.trainer_speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from aquiline.cli.options import BUILT_IN
from aquiline.decoding.models import DecoderModels, Drafter
from aquiline.engine.loader import choose_device
from aquiline.models.checkpoint import open_checkpoint
from aquiline.models.draft import DraftHead
from aquiline.models.draft_checkpoint import load_draft
from aquiline.models.llama import load_llama
from aquiline.models.registry import resolve, shipped_draft
from aquiline.speculation.tree import TreeShape
from aquiline.text.tokenizer import load_tokenizer
from aquiline.training.acceptance import measure_acceptance
from aquiline.training.config import TrainConfig
from aquiline.training.corpus import Corpus
from aquiline.training.packing import Packer
from aquiline.training.progress import Progress
from aquiline.training.teacher import LlamaTeacher
from aquiline.training.trainer import SUMMARY, Trainer
from benchmarks.common import fingerprint

M = 1_000_000
TOKENS = 20 * M  # of a run that is no point of the token curve
POINTS = (4 * M, 8 * M, 16 * M, 32 * M, 64 * M, 128 * M, 192 * M)
COOL = 0.25  # of a point's tokens
Source = Literal["original", "regenerated", "mixed"]


@dataclass(frozen=True)
class Run:
    """Changes to the baseline; ``origin`` is the run and the tokens that it starts from, and
    ``source`` who gave the answers that it reads."""

    changes: dict[str, Any] = field(default_factory=dict)
    origin: tuple[str, int] | None = None
    source: Source = "original"


UNROLL = {"unroll": 3, "step_decay": 0.8}
RUNS: dict[str, Run] = {
    "baseline": Run(),
    "baseline-seed-1": Run({"seed": 1}),
    "regenerated": Run(source="regenerated"),
    "mixed": Run(source="mixed"),
    "layers-1": Run({"layers": 1}),
    "layers-2": Run({"layers": 2}),
    "layers-5": Run({"layers": 5}),
    "kl": Run({"objective": "kl"}),
    "kl-regression": Run({"objective": "kl", "regression_weight": 1.0}),
    "lk": Run({"objective": "lk"}),
    "tv": Run({"objective": "tv"}),
    "eagle-unroll-3": Run(UNROLL),
    "kl-unroll-3": Run({"objective": "kl", **UNROLL}),
    "lk-unroll-3": Run({"objective": "lk", **UNROLL}),
    "eagle3-kl": Run({"method": "eagle3", "objective": "kl", "layers": 1}),
    "eagle3-kl-unroll-3": Run({"method": "eagle3", "objective": "kl", "layers": 1, **UNROLL}),
    "trunk": Run({"tokens": int((1 - COOL) * max(POINTS)), "decay_tokens": 0, "keep": 100,
                  "eval_every": 183, "eval_prompts": 32, "eval_tokens": 64}, source="mixed"),
} | {
    f"tokens-{point // M}M": Run({"tokens": point, "decay_tokens": int(COOL * point)},
                                 ("trunk", point - int(COOL * point)), "mixed")
    for point in POINTS
}  # fmt: skip


def config_of(run: Run, options: argparse.Namespace) -> TrainConfig:
    base = TrainConfig(
        target=BUILT_IN, data=str(getattr(options, run.source)),
        tokens=options.tokens, decay_tokens=int(0.3 * options.tokens), warmup_tokens=M,
        tokens_per_batch=16384, learning_rate=2e-3, eval_every=10**6, eval_prompts=64,
        patience=None, device=options.device,
    )  # fmt: skip
    return dataclasses.replace(base, **run.changes)


class Sweep:
    """Target, corpora and tokenizer, loaded once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        path = resolve(BUILT_IN)
        self.tokenizer = load_tokenizer(path)
        given = (getattr(options, source) for source in get_args(Source))
        folders = {str(folder) for folder in given if folder}
        self.corpora = {one: Corpus.open(Path(one), self.tokenizer.vocab_size) for one in folders}
        device = choose_device(options.device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        positions = max(corpus.info.max_length for corpus in self.corpora.values()) + 256
        self.teacher = LlamaTeacher(load_llama(open_checkpoint(path), dtype, device, positions))

    def yardstick(self, run: Run) -> None:
        """The shipped draft on the held-out prompts of ``run``, whole vocabulary."""
        target, config = self.teacher.target, config_of(run, self.options)
        packer = self.packer(config)
        prompts = packer.held_out_prompts(
            config.eval_prompts, config.max_length - config.eval_tokens
        )
        folder = shipped_draft(BUILT_IN)
        assert folder is not None
        draft = load_draft(folder, target, len(target.rotary.table)).draft
        found = measure_acceptance(
            DecoderModels(target, Drafter(draft, DraftHead(target, None))), prompts,
            TreeShape.chain(3), config.eval_tokens, frozenset(self.tokenizer.eos_token_ids),
        )  # fmt: skip
        print(f"{'shipped':20} TPC {found.tokens_per_call:.3f}", flush=True)

    def packer(self, config: TrainConfig) -> Packer:
        corpus = self.corpora[config.data]
        return Packer(corpus, config.tokens_per_batch, config.seed, config.holdout)

    def train(self, name: str, run: Run) -> None:
        out, config = self.options.out / name, config_of(run, self.options)
        if (out / SUMMARY).exists():
            return
        trainer = Trainer(config, self.teacher, self.tokenizer, self.packer(config))
        started = time.perf_counter()
        speeds: list[float] = []

        def report(reading: Progress) -> None:
            speeds.append(reading.tokens_per_second)
            if reading.acceptance is not None:
                depths = " ".join(f"{share:.3f}" for share in reading.acceptance.by_depth)
                print(
                    f"{name:20} {reading.tokens / M:7.1f}M epoch {reading.epoch:.2f} "
                    f"TPC {reading.acceptance.tokens_per_call:.3f} ({depths}) "
                    f"{sorted(speeds)[len(speeds) // 2] / 1e3:.0f}k tok/s "
                    f"{time.perf_counter() - started:.0f} s", flush=True,
                )  # fmt: skip

        trainer.run(out, report, self._origin(run, config))
        if name != "trunk":  # moments are of no use any more
            for folder in out.glob("step-*"):
                shutil.rmtree(folder)

    def _origin(self, run: Run, config: TrainConfig) -> Path | None:
        if run.origin is None:
            return None
        name, tokens = run.origin
        steps = {
            int(p.name.removeprefix("step-")): p for p in (self.options.out / name).glob("step-*")
        }
        wanted = tokens // config.tokens_per_batch
        return steps[min(steps, key=lambda step: abs(step - wanted))]


def main() -> None:
    parser = argparse.ArgumentParser()
    for source in get_args(Source):
        parser.add_argument(f"--{source}", type=Path, help="a corpus folder of aquiline data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    options.only = [name for name in options.only if getattr(options, RUNS[name].source)]
    print(fingerprint(choose_device(options.device)), flush=True)
    sweep = Sweep(options)
    sweep.yardstick(RUNS[options.only[0]])
    for name in options.only:
        sweep.train(name, RUNS[name])


if __name__ == "__main__":
    main()
