"""Budget: what a run will take, from its settings and the target's shape alone.

Parameters are counted exactly, on modules without storage. FLOPs are those of the matrix products,
2 per weight and token forward and 4 backward, and of attention at half the longest document; time
is FLOPs over peak times utilisation. Activations are what the draft's layers keep for the backward
pass, the teacher's working set of one layer, and one chunk of logits: an estimate, within a third
or so. Both are upper bounds in that every document counts as ``max_length`` long.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from aquiline.models.config import LlamaConfig
from aquiline.models.draft import Draft, EagleDraft, draft_config
from aquiline.models.eagle3 import Eagle3Draft, default_taps
from aquiline.models.llama import Llama
from aquiline.training.config import TrainConfig
from aquiline.training.schedule import Schedule
from aquiline.training.vocabulary_loss import LOGITS

HALF = 2  # bytes of bf16
OPTIMISER = 16  # bytes a parameter: fp32 master, gradient and two moments


@dataclass(frozen=True)
class Card:
    """A GPU: dense bf16 FLOP/s and memory in bytes, as its maker states them."""

    flops: float
    memory: float


CARDS = {
    "A100": Card(312e12, 80e9),
    "H100": Card(989e12, 80e9),
    "H200": Card(989e12, 141e9),
    "B200": Card(2250e12, 180e9),
}


@dataclass(frozen=True)
class Budget:
    """Counts of parameters; FLOPs a token; bytes a rank.

    Attributes:
        teacher, draft, head: parameters; of the head those that are trained.
        flops: by "teacher", "student" and "head" (both models' laws and their loss).
        memory: by what takes it; of what is sharded, one rank's share.
    """

    teacher: int
    draft: int
    head: int
    steps: int
    tokens: int
    flops: dict[str, float]
    memory: dict[str, float]

    @property
    def flops_per_token(self) -> float:
        return sum(self.flops.values())

    @property
    def bytes_per_rank(self) -> float:
        return sum(self.memory.values())

    def hours(self, card: Card, ranks: int, utilisation: float) -> float:
        """Of ``ranks`` cards that reach ``utilisation`` of their peak."""
        return self.tokens * self.flops_per_token / (ranks * card.flops * utilisation) / 3600


def plan(config: TrainConfig, target: LlamaConfig, ranks: int, scored: float = 1.0) -> Budget:
    """``scored``: the share of tokens that are the assistant's, at which laws are compared."""
    schedule = Schedule.of(config, config.accumulate * ranks)
    shape = draft_config(target, config.layers, config.intermediate_size)
    with torch.device("meta"):
        teacher, draft = Llama(target, 1), _draft(config, target, shape)
    layers, weights = _matrices(teacher.layers), _matrices(draft)
    vocabulary = config.draft_vocab_size or target.vocab_size
    trained = config.method == "eagle3"
    head = (vocabulary + 1) * target.hidden_size if trained else 0
    full, reduced = target.vocab_size, vocabulary if trained else target.vocab_size
    mlp = 3 * shape.hidden_size * shape.intermediate_size * shape.num_layers
    context = config.max_length / 2
    flops = {
        "teacher": 2 * layers + _attention(target) * context,
        "student": config.unroll
        * (6 * weights + 2 * mlp * config.recompute + 3 * _attention(shape) * context),
        "head": scored
        * target.hidden_size
        * (2 * full + config.unroll * (6 if trained else 4) * reduced),
    }
    size = schedule.steps * config.tokens_per_batch * config.accumulate * ranks
    return Budget(
        _count(teacher), _count(draft), head, schedule.steps, size, flops,
        _memory(config, target, shape, layers, _count(teacher), _count(draft) + head, ranks),
    )  # fmt: skip


def _memory(
    config: TrainConfig,
    target: LlamaConfig,
    shape: LlamaConfig,
    layers: int,
    teacher: int,
    student: int,
    ranks: int,
) -> dict[str, float]:
    held = layers / ranks if config.shard == "full" else layers
    share = student / ranks if config.shard != "none" else student
    width, heads = shape.hidden_size, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    attention = 6 * width + 2 * heads
    mlp = 2 * width + (0 if config.recompute else 3 * shape.intermediate_size)
    kept = config.unroll * shape.num_layers * (attention + mlp) + 6 * target.hidden_size
    passing = 4 * target.hidden_size + 3 * target.intermediate_size
    return {
        "teacher": HALF * (held + teacher - layers),
        "student": HALF * 2 * share,
        "optimiser": OPTIMISER * share,
        "activations": HALF * config.tokens_per_batch * (kept + passing),
        "logits": 2.0 * HALF * LOGITS["cuda"],  # the target's and the draft's, later their slope
    }


def _draft(config: TrainConfig, target: LlamaConfig, shape: LlamaConfig) -> Draft:
    if config.method == "eagle":
        return EagleDraft(shape, 1)
    return Eagle3Draft(shape, default_taps(target), 1)


def _attention(shape: LlamaConfig) -> float:
    """FLOPs of scores and weighted sums, forward, per token and token of context."""
    return 4.0 * shape.num_layers * shape.num_heads * shape.head_dim


def _matrices(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters() if one.dim() > 1)


def _count(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())
