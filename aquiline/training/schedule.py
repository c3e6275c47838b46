"""The learning rate: warm-up, stable, decay, counted in optimiser steps.

    rate(step) = peak * min(up, down) * rewarm

``up`` rises over the warm-up, ``down`` falls linearly to ``final`` over the last ``decay`` steps of
the run. A trunk is a run without decay: any of its checkpoints can begin a cool-down, which is a
run that ends when its decay does, and the trunk can go on. ``rewarm`` rises from where a run
started from masters alone, whose moments were left behind.
"""

from __future__ import annotations

from dataclasses import dataclass

from aquiline.training.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """All lengths in steps; ``warmup``, ``decay`` and ``rewarm`` may be fractions."""

    peak: float
    steps: int
    warmup: float
    decay: float
    final: float
    rewarm: float

    @classmethod
    def of(cls, config: TrainConfig, batches_per_step: int) -> Schedule:
        """``batches_per_step``: packed batches of one optimiser step over all ranks."""
        size = config.tokens_per_batch * batches_per_step
        return cls(
            config.learning_rate,
            max(1, round(config.tokens / size)),
            config.warmup_tokens / size,
            config.decay_tokens / size,
            config.final_rate,
            config.rewarm_tokens / size,
        )

    def rate(self, step: int, restarted: int | None = None) -> float:
        """The rate of step number ``step`` (from 0).

        ``restarted``: the step at which the moments began anew, if they did.
        """
        up = (step + 1) / max(1.0, self.warmup)
        down = (self.steps - step) / max(1.0, self.decay)
        rate = self.peak * min(1.0, up, self.final + (1 - self.final) * down)
        if restarted is not None:
            rate *= min(1.0, (step + 1 - restarted) / max(1.0, self.rewarm))
        return rate
