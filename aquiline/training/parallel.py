"""World: the ranks of a training run, and what they hold in parts.

Every rank reads its own batches and runs the whole step; gradients are summed. Sharding is FSDP2's:
matrices lie in parts and are gathered layer by layer. Vectors (norms, biases) are small, and a norm
is read by the layer in front of its own, so they stay whole on every rank. Started without torchrun
there is one rank and no process group.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

_T = TypeVar("_T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """Rank ``rank`` of ``size``, on ``device``.

    Attributes:
        mesh: of all ranks' devices; None without a process group. ``host``: of their processors.
        saving: a group of its own for checkpoints, which are written beside the training.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    mesh: DeviceMesh | None = None
    host: DeviceMesh | None = None
    saving: dist.ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: _T) -> _T:
        """Rank 0's value (any object that pickles)."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=CPU)
        return box[0]

    def shard(self, module: nn.Module, layers: Iterable[nn.Module], rest: bool) -> None:
        """Lay the matrices of ``layers`` over the ranks, and (``rest``) those outside them."""
        if self.mesh is None:
            return
        inside = list(layers)
        whole = {parameter for parameter in module.parameters() if parameter.dim() < 2}
        if not rest:
            held = {parameter for layer in inside for parameter in layer.parameters()}
            whole |= set(module.parameters()) - held
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for part in (*inside, module):
            fully_shard(part, mesh=self.mesh, mp_policy=policy, ignored_params=whole)
            # Losses are divided by the count of the whole step already: gradients just add up.
            sharded = cast(FSDPModule, part)
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)


def join(device: torch.device) -> World:
    """The world that torchrun started; without it a single rank on ``device``."""
    if "WORLD_SIZE" not in os.environ:
        return World(device=device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    size = dist.get_world_size()
    mesh, host = (init_device_mesh(kind, (size,)) for kind in (device.type, "cpu"))
    saving = dist.new_group(backend="gloo")
    return World(dist.get_rank(), size, device, mesh, host, saving)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, every sharded parameter of ``module`` is whole on every rank, for reading."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
