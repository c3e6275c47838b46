"""A tiny target that recites the alphabet, more or less, conversations about it, and a trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquiline.models.checkpoint import open_checkpoint
from aquiline.models.llama import Llama, load_llama
from aquiline.text.tokenizer import Tokenizer, load_tokenizer
from aquiline.training.config import TrainConfig
from aquiline.training.corpus import Corpus, build_corpus
from aquiline.training.packing import Packer
from aquiline.training.parallel import World
from aquiline.training.progress import Progress
from aquiline.training.teacher import LlamaTeacher
from aquiline.training.trainer import Trainer
from tests.tiny_checkpoint import write_target

CPU = torch.device("cpu")
BATCH, LENGTH = 256, 128


class Setting:
    """Everything a run needs, in ``root``; written by the first process that asks."""

    def __init__(self, root: Path, **target: Any) -> None:
        self.root, self.folder = root, root / "target"
        if not self.folder.exists():
            write_target(self.folder, **{"mix": 0.15, **target})
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
        if not (root / "corpus").exists():
            build_corpus(self.tokenizer, conversations, root / "corpus", LENGTH)
        self.corpus = Corpus.open(root / "corpus")
        self.config = TrainConfig(
            str(self.folder), str(root / "corpus"), layers=1, max_length=LENGTH,
            tokens_per_batch=BATCH, tokens=20 * BATCH, learning_rate=3e-3, warmup_tokens=2 * BATCH,
            decay_tokens=6 * BATCH, rewarm_tokens=2 * BATCH, holdout=6, eval_every=5,
            eval_prompts=3, eval_tokens=8, seed=3, device="cpu",
        )  # fmt: skip

    def target(self, dtype: torch.dtype = torch.float32) -> Llama:
        return load_llama(open_checkpoint(self.folder), dtype, CPU, 400)

    def trainer(
        self, dtype: torch.dtype = torch.float32, world: World | None = None, **changes: Any
    ) -> Trainer:
        config = replace(self.config, **changes)
        packer = Packer(self.corpus, config.tokens_per_batch, config.seed, config.holdout)
        return Trainer(config, LlamaTeacher(self.target(dtype)), self.tokenizer, packer, world)


def weights(run: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.student.draft.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].equal(b[name]), name


def ignore(progress: Progress) -> None:
    """A report nobody reads."""
