"""Feed: a rank's batches on its device, made one step ahead in a thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from aquiline.core.errors import DataError
from aquiline.training.packing import PackedBatch, Packer
from aquiline.training.parallel import World
from aquiline.training.student import scored_positions


@dataclass(frozen=True)
class Fed:
    """One batch: its number in the packer's order, and ``scored_positions`` of it [P]."""

    number: int
    batch: PackedBatch
    scored: Tensor


class Feed:
    """The batches of every step, in order; a context manager that ends the thread."""

    def __init__(self, packer: Packer, world: World, accumulate: int, device: torch.device) -> None:
        self.packer, self.world, self.device = packer, world, device
        self.size = accumulate * world.size
        self._worker = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[list[Fed]]] | None = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def numbers(self, step: int) -> range:
        """The batches of a step, all ranks' together."""
        return range(step * self.size, (step + 1) * self.size)

    def take(self, step: int) -> tuple[list[Fed], Tensor]:
        """This rank's batches of ``step``, and the scored positions [] of all ranks' together."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self._worker.submit(self._assemble, step))
        batches = self._ahead[1].result()
        self._ahead = (step + 1, self._worker.submit(self._assemble, step + 1))
        count = torch.tensor(float(sum(len(fed.scored) for fed in batches)))
        total = self.world.sum(count.to(self.device, non_blocking=True))
        placed = [
            Fed(fed.number, _mapped(fed.batch, self._place), self._place(fed.scored))
            for fed in batches
        ]
        return placed, total

    def _assemble(self, step: int) -> list[Fed]:
        """Finding the scored positions here costs the device no wait."""
        made = []
        for number in self.numbers(step)[self.world.rank :: self.world.size]:
            batch = self.packer.batch(number)
            scored = scored_positions(batch)
            if len(scored) == 0:
                raise DataError(f"batch {number}: no assistant token in it; check the data")
            made.append(Fed(number, _mapped(batch, self._pinned), self._pinned(scored)))
        return made

    def _pinned(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor
        torch.cuda.set_device(self.device)  # of this thread
        return tensor.pin_memory()

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def _mapped(batch: PackedBatch, change: Callable[[Tensor], Tensor]) -> PackedBatch:
    """The batch with ``change`` applied to every tensor."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    changed: Any = {k: change(v) for k, v in tensors.items() if isinstance(v, Tensor)}
    return replace(batch, **changed)
