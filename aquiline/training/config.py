"""TrainConfig: everything that determines a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from aquiline.core.errors import AquilineError
from aquiline.core.params import DraftMethod
from aquiline.speculation.tree import TreeShape

Objective = Literal["eagle", "kl", "tv", "lk"]
Regression = Literal["l1", "smooth_l1"]
Initialisation = Literal["random", "target"]
TeacherKind = Literal["ours", "transformers"]
Sharding = Literal["none", "student", "full"]
MAX_UNROLL = 8  # steps; kernels are compiled for each length of the chain


@dataclass(frozen=True)
class TrainConfig:
    """One run of online distillation. Two runs of one configuration on one machine are equal.

    Attributes:
        target: a built-in name, a Hugging Face folder, or a GGUF file.
        data: conversations (JSONL) or a tokenised corpus folder.
        teacher: what runs the target, ``"ours"`` or, for architectures that only it knows,
            ``"transformers"``; our decoder cannot run those, so no acceptance is measured.
        method: the draft's wiring, ``"eagle"`` (EAGLE-1) or ``"eagle3"``.
        layers: dense decoder layers of the draft.
        intermediate_size: width of the draft's feed-forward layers; None is the target's.
        draft_vocab_size: the draft's tokens, the most frequent ones of the data; None is all. An
            EAGLE-3 draft is trained over them; EAGLE-1 is trained over the whole vocabulary and
            keeps these rows of the target's head for serving.
        init: ``"random"``, or ``"target"``: decoder layers after the first from the target's last.
        max_length: conversations are cut there.
        tokens_per_batch: tokens of one packed batch.
        accumulate: batches of each rank per optimiser step.
        tokens: tokens to train on in all, those of a checkpoint that it starts from included.
        warmup_tokens, decay_tokens, final_rate, rewarm_tokens: see schedule.py.
        objective: see objectives.py.
        regression: how predicted features are compared with the target's.
        regression_weight, distribution_weight: None is 1 and 0.1 for the objective ``"eagle"``, 0
            and 1 for the others and for EAGLE-3, whose hidden state is its own.
        lk_eta: how fast ``"lk"`` turns to total variation as acceptance grows.
        unroll: steps that the draft is run on its own predictions, the first included.
        step_decay: weight of a step relative to the one before it.
        feature_noise: uniform noise added to the features that the draft reads, relative to
            their standard deviation (EAGLE's augmentation against its own errors).
        shard: what the ranks hold in parts: ``"none"``, the ``"student"`` (weights and moments), or
            in ``"full"`` the teacher's layers too.
        recompute: feed-forward activations of the draft are computed again in the backward pass.
        log_every: steps between readings of the loss; a reading waits for the device.
        eval_every: steps between acceptance checks; also of checkpoints.
        eval_tree: measured beside the chain of 3, by name ("tree-8"); None for the chain alone.
        patience: stop when tokens per call fell in that many checks running while the loss still
            fell; None never stops.
        keep: how many of the newest checkpoints stay; the best one stays besides.
    """

    target: str
    data: str
    teacher: TeacherKind = "ours"
    method: DraftMethod = "eagle"
    layers: int = 3
    intermediate_size: int | None = None
    draft_vocab_size: int | None = None
    init: Initialisation = "random"
    max_length: int = 2048
    tokens_per_batch: int = 32768
    accumulate: int = 1
    tokens: int = 100_000_000
    learning_rate: float = 1e-3
    warmup_tokens: int = 2_000_000
    decay_tokens: int = 30_000_000
    final_rate: float = 0.0
    rewarm_tokens: int = 1_000_000
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    objective: Objective = "eagle"
    regression: Regression = "smooth_l1"
    regression_weight: float | None = None
    distribution_weight: float | None = None
    lk_eta: float = 3.0
    unroll: int = 1
    step_decay: float = 1.0
    feature_noise: float = 0.0
    seed: int = 0
    shard: Sharding = "none"
    recompute: bool = False
    holdout: int = 64
    log_every: int = 10
    eval_every: int = 500
    eval_prompts: int = 32
    eval_tokens: int = 128
    eval_tree: str | None = None
    patience: int | None = 5
    keep: int = 2
    device: str = "auto"

    def __post_init__(self) -> None:
        counts = {
            "layers", "max_length", "tokens_per_batch", "accumulate", "tokens", "holdout",
            "log_every", "eval_every", "eval_prompts", "eval_tokens", "keep", "intermediate_size",
            "draft_vocab_size", "unroll", "patience",
        }  # fmt: skip
        optional = {
            "intermediate_size", "draft_vocab_size", "regression_weight", "distribution_weight",
            "eval_tree", "patience",
        }  # fmt: skip
        names = {
            "teacher": TeacherKind, "method": DraftMethod, "init": Initialisation,
            "objective": Objective, "regression": Regression, "shard": Sharding,
        }  # fmt: skip
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in optional and value is None:
                continue
            if field.name in names:
                choices = get_args(names[field.name])
                ok, remedy = value in choices, f"give one of {', '.join(choices)}"
            elif field.name in counts:
                ok, remedy = _is(int, value) and value >= 1, "give a positive integer"
            elif field.name in ("target", "data", "device", "eval_tree"):
                ok, remedy = isinstance(value, str), "give a string"
            elif field.name == "recompute":
                ok, remedy = isinstance(value, bool), "give true or false"
            elif field.name == "seed" or field.name.endswith("_tokens"):
                ok, remedy = _is(int, value) and value >= 0, "give an integer from 0"
            elif field.name == "final_rate":
                ok, remedy = _is(float, value) and 0 <= value <= 1, "give a number in [0, 1]"
            elif field.name in ("learning_rate", "gradient_clip", "step_decay"):
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

        if self.eval_tree is not None:
            TreeShape.named(self.eval_tree)
        self._check_draft()

    def _check_draft(self) -> None:
        """What does not go together."""
        if self.method == "eagle3" and self.weight_of_regression:
            raise AquilineError(
                f"regression_weight={self.regression_weight!r}: an EAGLE-3 draft's hidden state is "
                "its own, there is nothing to compare it with; leave it out"
            )
        if self.unroll > MAX_UNROLL:
            raise AquilineError(f"unroll={self.unroll}: give at most {MAX_UNROLL}")
        if self.init == "target" and (self.layers < 2 or self.intermediate_size is not None):
            raise AquilineError(
                "init='target': copies layers after the first; give layers of 2 or more and no "
                "intermediate_size"
            )

    @property
    def weight_of_regression(self) -> float:
        """``regression_weight`` or its default."""
        paper = self.objective == "eagle" and self.method == "eagle"
        return float(paper) if self.regression_weight is None else self.regression_weight

    @property
    def weight_of_distribution(self) -> float:
        """``distribution_weight`` or its default."""
        paper = self.objective == "eagle" and self.method == "eagle"
        default = 0.1 if paper else 1.0
        return default if self.distribution_weight is None else self.distribution_weight


def _is(kind: type, value: Any) -> bool:
    """An int, or (kind float) an int or a float; a bool is neither."""
    return isinstance(value, (int, kind)) and not isinstance(value, bool)
