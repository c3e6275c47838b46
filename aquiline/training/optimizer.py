"""MasterAdamW: AdamW on fp32 master weights of a module that computes in bf16.

The moments and masters are fp32, the module's own parameters are rounded copies; in fp32 the copies
are exact and nothing changes. Gradients of several batches and ranks add up in fp32. Masters and
gradients are each one flat tensor, so that norm, clipping and the sum over ranks are one operation
each, whatever the number of parameters:

    flat:  [ vectors, whole | matrices, whole | matrices, this rank's shards ]
           |<-- no decay -->|<------------------ decayed ------------------->|
           |<-------- summed over ranks here -------->|<-- summed by FSDP -->|
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aquiline.training.parallel import World


@dataclass(frozen=True)
class _Slot:
    """A parameter and its place in the flat tensors."""

    name: str
    parameter: nn.Parameter
    place: slice

    @property
    def local(self) -> Tensor:
        """What this rank holds of the parameter."""
        return _local(self.parameter.detach())

    def view(self, flat: Tensor) -> Tensor:
        """This parameter's part of a flat tensor, in its (local) shape."""
        return flat[self.place].view(self.local.shape)

    def shard(self, flat: Tensor, world: World) -> Tensor:
        """The same as part of the whole, where the ranks hold shards; shares its memory."""
        part, like = self.view(flat), self.parameter
        mesh = world.mesh if part.device == self.local.device else world.host
        if not isinstance(like, DTensor) or mesh is None:
            return part
        return DTensor.from_local(
            part, mesh, like.placements, shape=like.shape, stride=like.stride()
        )


class HostCopies:
    """Tensors on the host that a device may still be writing; ``wait`` before reading them."""

    def __init__(self, tensors: dict[str, Tensor], pending: bool) -> None:
        self.tensors = tensors
        self._written = torch.Event("cuda") if pending else None
        if self._written is not None:
            self._written.record()

    def wait(self) -> None:
        if self._written is not None:
            self._written.synchronize()


class MasterAdamW:
    """AdamW (Adam with decoupled weight decay; norms and biases are not decayed)."""

    def __init__(self, module: nn.Module, weight_decay: float, clip: float, world: World) -> None:
        self.world, self.clip = world, clip
        named = sorted(module.named_parameters(), key=lambda one: _region(one[1]))
        self.slots: list[_Slot] = []
        ends = [0, 0, 0]
        for name, parameter in named:
            start = max(ends)
            end = start + _local(parameter).numel()
            self.slots.append(_Slot(name, parameter, slice(start, end)))
            ends[_region(parameter) :] = [end] * (3 - _region(parameter))
        self.whole = ends[1]  # where the shards begin
        device = _local(named[0][1]).device
        self.masters, self.gradient, self._mean, self._square = (
            torch.zeros(ends[2], device=device) for _ in range(4)
        )
        for slot in self.slots:
            slot.view(self.masters).copy_(slot.local)
        fused = device.type == "cuda"
        self.steps = torch.zeros((), device=device if fused else "cpu")
        groups, states = [], {}
        for part, decay in ((slice(0, ends[0]), 0.0), (slice(ends[0], None), weight_decay)):
            master = self.masters[part].requires_grad_()
            master.grad = self.gradient[part]
            groups.append({"params": [master], "weight_decay": decay})
            moments = {"exp_avg": self._mean[part], "exp_avg_sq": self._square[part]}
            states[master] = {"step": self.steps.clone(), **moments}
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=fused)
        self.adam.state.update(states)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the module's gradients, one batch's share of the step's, and clear them."""
        gradients = []
        for slot in self.slots:
            assert slot.parameter.grad is not None, slot.name
            gradients.append(_local(slot.parameter.grad))
            slot.parameter.grad = None
        torch._foreach_add_([slot.view(self.gradient) for slot in self.slots], gradients)

    @torch.no_grad()
    def step(self, learning_rate: float) -> Tensor:
        """Apply what has accumulated; returns the gradient's norm over all ranks."""
        self.world.sum(self.gradient[: self.whole])
        shards = self.world.sum(self.gradient[self.whole :].square().sum())
        norm = (self.gradient[: self.whole].square().sum() + shards).sqrt()
        self.gradient.mul_((self.clip / (norm + 1e-6)).clamp(max=1.0))
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        self.gradient.zero_()
        self._publish()
        return norm

    def _publish(self) -> None:
        """Round the masters into the module."""
        rounded = [slot.local for slot in self.slots]
        torch._foreach_copy_(rounded, [slot.view(self.masters.detach()) for slot in self.slots])

    def state(self) -> dict[str, Tensor]:
        """Masters, moments and step count by name; they share this optimiser's memory."""
        return {**self._named(self._flats), "steps": self._steps()}

    def weights(self) -> dict[str, Tensor]:
        """The masters alone, as ``state`` names them."""
        return self._named({"master": self._flats["master"]})

    def copies(self) -> HostCopies:
        """``state`` as it is now, copied while the training goes on."""
        cuda = self.masters.is_cuda
        flats = {}
        for kind, flat in self._flats.items():
            flats[kind] = torch.empty_like(flat, device="cpu", pin_memory=cuda)
            flats[kind].copy_(flat, non_blocking=cuda)
        return HostCopies({**self._named(flats), "steps": self._steps().cpu().clone()}, cuda)

    @property
    def _flats(self) -> dict[str, Tensor]:
        return {"master": self.masters.detach(), "exp_avg": self._mean, "exp_avg_sq": self._square}

    def _named(self, flats: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"{kind}.{slot.name}": slot.shard(flat, self.world)
            for kind, flat in flats.items()
            for slot in self.slots
        }

    def _steps(self) -> Tensor:
        self.steps.copy_(next(iter(self.adam.state.values()))["step"])
        return self.steps

    @torch.no_grad()
    def restored(self) -> None:
        """To be called when the tensors of ``state`` or ``weights`` have been overwritten."""
        for moments in self.adam.state.values():
            moments["step"].copy_(self.steps)
        self._publish()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _region(parameter: Tensor) -> int:
    """0 for a vector, 1 for a matrix, 2 for a shard; see the diagram."""
    return 2 if isinstance(parameter, DTensor) else int(parameter.dim() > 1)
