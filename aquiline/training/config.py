"""TrainConfig: everything that determines a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from aquiline.core.errors import AquilineError


@dataclass(frozen=True)
class TrainConfig:
    """One run of online distillation. Two runs of one configuration on one machine are equal.

    Attributes:
        target: a built-in name, a Hugging Face folder, or a GGUF file.
        data: conversations (JSONL) or a tokenised corpus folder.
        layers: dense decoder layers of the draft.
        intermediate_size: width of the draft's feed-forward layers; None is the target's.
        draft_vocab_size: LM-head rows kept for serving, those of the most frequent tokens of the
            data; None keeps all. Training always uses the whole vocabulary.
        max_length: conversations are cut there.
        tokens_per_batch: tokens of one packed batch (one optimiser step).
        tokens: tokens to train on in all.
        warmup_tokens, decay_fraction: linear warm-up, constant, linear decay to zero over the last
            fraction of the run.
        regression_weight, cross_entropy_weight: see losses.py.
        feature_noise: uniform noise added to the features that the draft reads, relative to
            their standard deviation (EAGLE's augmentation against its own errors).
        eval_every: steps between acceptance checks; also of checkpoints.
    """

    target: str
    data: str
    layers: int = 3
    intermediate_size: int | None = None
    draft_vocab_size: int | None = None
    max_length: int = 2048
    tokens_per_batch: int = 32768
    tokens: int = 100_000_000
    learning_rate: float = 1e-3
    warmup_tokens: int = 2_000_000
    decay_fraction: float = 0.3
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    regression_weight: float = 1.0
    cross_entropy_weight: float = 0.1
    feature_noise: float = 0.0
    seed: int = 0
    holdout: int = 64
    eval_every: int = 500
    eval_prompts: int = 32
    eval_tokens: int = 128
    device: str = "auto"

    def __post_init__(self) -> None:
        counts = {
            "layers", "max_length", "tokens_per_batch", "tokens", "holdout", "eval_every",
            "eval_prompts", "eval_tokens", "intermediate_size", "draft_vocab_size",
        }  # fmt: skip
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in counts:
                optional = field.default is None and value is None
                ok, remedy = optional or (_is(int, value) and value >= 1), "give a positive integer"
            elif field.name in ("target", "data", "device"):
                ok, remedy = isinstance(value, str), "give a string"
            elif field.name == "decay_fraction":
                ok, remedy = _is(float, value) and 0 <= value <= 1, "give a number in [0, 1]"
            elif field.name in ("learning_rate", "gradient_clip"):
                ok, remedy = _is(float, value) and 0 < value < math.inf, "give a positive number"
            else:
                ok, remedy = _is(float, value) and 0 <= value < math.inf, "give a number from 0"
            if not ok:
                raise AquilineError(f"{field.name}={value!r}: {remedy}")
        if self.max_length > self.tokens_per_batch:
            raise AquilineError(
                f"max_length={self.max_length}: a conversation must fit in tokens_per_batch="
                f"{self.tokens_per_batch}"
            )

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return max(1, round(self.tokens / self.tokens_per_batch))

    def learning_rate_at(self, step: int) -> float:
        """Warm-up, stable, decay."""
        warmup = max(1.0, self.warmup_tokens / self.tokens_per_batch)
        decay = max(1.0, self.decay_fraction * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / warmup, (self.steps - step) / decay)


def _is(kind: type, value: Any) -> bool:
    """An int, or (kind float) an int or a float; a bool is neither."""
    return isinstance(value, (int, kind)) and not isinstance(value, bool)
