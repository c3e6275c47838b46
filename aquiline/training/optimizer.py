"""MasterAdamW: AdamW on fp32 master weights of a module that computes in bf16.

The moments and masters are fp32, the module's own parameters are rounded copies; in fp32 the
copies are exact and nothing changes. The state is a flat dict of tensors, so that a checkpoint is
one file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aquiline.core.errors import CheckpointError


class MasterAdamW:
    """AdamW (Adam with decoupled weight decay; norms and biases are not decayed)."""

    def __init__(self, module: nn.Module, weight_decay: float, clip: float) -> None:
        self.names = [name for name, _ in module.named_parameters()]
        self.parameters = list(module.parameters())
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.parameters]
        decayed = [m for m in self.masters if m.dim() > 1]
        plain = [m for m in self.masters if m.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        fused = self.masters[0].is_cuda
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=fused)
        self.clip = clip

    def step(self, learning_rate: float) -> Tensor:
        """Apply the module's gradients and clear them; returns the gradient norm."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        self._publish()
        return norm

    @torch.no_grad()
    def _publish(self) -> None:
        """Round the masters into the module."""
        torch._foreach_copy_(list[Tensor](self.parameters), list[Tensor](self.masters))

    def state(self) -> dict[str, Tensor]:
        """Masters, moments and step counts by parameter name."""
        tensors = {}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"master.{name}"] = master.detach()
            for key, value in self.adam.state[master].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of ``state``; bit-identical. CheckpointError on tensors of another draft."""
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for key in ("master", "exp_avg", "exp_avg_sq", "step"):
                tensor = tensors.get(f"{key}.{name}")
                fits = tensor is not None and (key == "step" or tensor.shape == parameter.shape)
                if not fits:
                    raise CheckpointError(
                        f"training checkpoint: tensor '{key}.{name}' is missing or misshaped; "
                        "remove the checkpoint or choose another --out"
                    )
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(tensors[f"master.{name}"])
            self.adam.state[master] = {
                key: tensors[f"{key}.{name}"].to(master.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
            if master.is_cuda:  # the fused kernel wants its step count on the device
                self.adam.state[master]["step"] = tensors[f"step.{name}"].to(master.device)
        self._publish()
