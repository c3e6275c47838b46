"""The teacher: the frozen target, as training sees it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aquiline.attention.packed import PackedAttention
from aquiline.models.config import LlamaConfig
from aquiline.models.llama import Llama
from aquiline.training.packing import PackedBatch


@dataclass(frozen=True)
class TeacherOutput:
    """What the target knew at the N positions of a packed batch.

    Attributes:
        features: [1, N, d], the final features, after the final norm.
        taps: [1, N, d] each, the inputs of the tapped layers.
    """

    features: Tensor
    taps: tuple[Tensor, ...]


class Teacher(Protocol):
    """A frozen target. Batches and tokens that it is given are on its device."""

    @property
    def config(self) -> LlamaConfig:
        """Shape of a draft for it: width, heads, rope, vocabulary, layers that can be tapped."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def head_weight(self) -> Tensor:
        """The LM head, [V, d]."""
        ...

    @property
    def model(self) -> nn.Module:
        """What runs, for sharding."""
        ...

    @property
    def layers(self) -> Iterable[nn.Module]:
        """The decoder layers of ``model``."""
        ...

    def __call__(self, batch: PackedBatch, taps: Sequence[int]) -> TeacherOutput:
        """One forward pass, outside autograd; ``taps`` are ascending layers."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [...] -> [..., d]."""
        ...

    def to(self, device: torch.device) -> None:
        """Move what is not sharded."""
        ...

    def logits(self, features: Tensor) -> Tensor:
        """[..., d] -> [..., V]."""
        return F.linear(features, self.head_weight)


class LlamaTeacher(Teacher):
    """This package's Llama, with the attention of packed documents."""

    def __init__(self, target: Llama) -> None:
        self.target = target

    @property
    def config(self) -> LlamaConfig:
        return self.target.config

    @property
    def device(self) -> torch.device:
        return self.target.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.target.embed_tokens.weight.dtype

    @property
    def head_weight(self) -> Tensor:
        return self.target.head_weight

    @property
    def model(self) -> Llama:
        return self.target

    @property
    def layers(self) -> nn.ModuleList:
        return self.target.layers

    @torch.no_grad()
    def __call__(self, batch: PackedBatch, taps: Sequence[int]) -> TeacherOutput:
        attention = PackedAttention(batch.cu_seqlens, batch.max_seqlen)
        output = self.target(batch.tokens[None], batch.positions[None], attention, taps)
        return TeacherOutput(output.features, output.taps)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        return self.target.embed(tokens)

    def to(self, device: torch.device) -> None:
        self.target.to(device)
