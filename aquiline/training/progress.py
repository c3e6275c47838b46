"""Progress: a reading of the loss, and the window of steps that it is the mean of."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.core.errors import AquilineError
from aquiline.training.acceptance import Acceptance
from aquiline.training.config import TrainConfig
from aquiline.training.feed import Feed
from aquiline.training.parallel import World


@dataclass(frozen=True)
class Progress:
    """A reading of the loss; means over the steps since the one before.

    Attributes:
        terms: by name and unrolled step; see objectives.Loss.
        acceptance: of the chain of 3, where it was measured; ``tree``: of ``eval_tree``.
    """

    step: int
    tokens: int
    epoch: float
    learning_rate: float
    loss: float
    gradient_norm: float
    terms: dict[str, list[float]]
    tokens_per_second: float
    acceptance: Acceptance | None = None
    tree: Acceptance | None = None


class Window:
    """Sums since the last reading, on the device."""

    def __init__(self, world: World, feed: Feed, first: int) -> None:
        self.world, self.feed, self.first = world, feed, first
        self.started = time.perf_counter()
        self.sums: dict[str, Tensor] = {}
        self.bad = torch.full((), -1.0, device=feed.device)  # the first step that was not finite
        self.norm = torch.zeros((), device=feed.device)

    def add(self, total: Tensor, terms: dict[str, Tensor]) -> None:
        """One batch's share of a step's means."""
        for name, term in {"loss": total, **terms}.items():
            self.sums[name] = self.sums[name] + term if name in self.sums else term

    def end_step(self, norm: Tensor, step: int) -> None:
        """``norm`` of the step's gradient, the same on all ranks."""
        self.norm = norm
        self.bad = torch.where((self.bad < 0) & ~norm.isfinite(), float(step), self.bad)

    def read(self, config: TrainConfig, step: int, epoch: float, rate: float) -> Progress:
        """Wait for the device. AquilineError if something was not finite, with the batch's name."""
        steps = step - self.first
        sums = torch.cat([term.reshape(-1).float() for term in self.sums.values()])
        values = iter((self.world.sum(sums) / steps).tolist())
        terms = {
            name: [next(values) for _ in range(term.numel())] for name, term in self.sums.items()
        }
        (loss,) = terms.pop("loss")
        bad, norm = int(self.bad), float(self.norm)
        if bad >= 0 or not math.isfinite(loss):
            self._refuse(bad, loss, step)
        elapsed = time.perf_counter() - self.started
        size = config.tokens_per_batch * self.feed.size
        return Progress(step, step * size, epoch, rate, loss, norm, terms, steps * size / elapsed)

    def _refuse(self, bad: int, loss: float, step: int) -> None:
        if bad < 0:
            where = f"the loss is {loss} between steps {self.first} and {step}"
        else:
            numbers = self.feed.numbers(bad)
            documents = sorted(
                index for number in numbers for index in self.feed.packer.documents(number)
            )
            where = (
                f"the gradient of step {bad} is not finite (loss {loss}): batch {numbers[0]}"
                + (f" to {numbers[-1]}" if len(numbers) > 1 else "")
                + f", documents {', '.join(map(str, documents))} of the corpus"
            )
        raise AquilineError(
            f"{where}; the last checkpoint is whole, lower learning_rate or drop them, and resume"
        )
