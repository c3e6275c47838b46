"""Models and cache of one decoder: the target, its draft, and the planes they write to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.kvcache.pool import KVPlane
from aquiline.layers.linear import pack_linears
from aquiline.models.draft import DraftHead, EagleDraft
from aquiline.models.llama import Llama


@dataclass(frozen=True)
class Drafter:
    """A draft bound to its target's head."""

    draft: EagleDraft
    head: DraftHead

    def logits(self, features: Tensor) -> Tensor:
        """Draft features [..., d] -> draft logits [..., Vd]."""
        out: Tensor = self.head(features)
        return out


@dataclass(frozen=True)
class Planes:
    """The KV planes; both are addressed by the same page tables."""

    target: KVPlane
    draft: KVPlane | None


@dataclass(frozen=True)
class DecoderModels:
    """What a round runs: the target, and the drafter unless decoding is plain."""

    target: Llama
    drafter: Drafter | None

    @property
    def dtype(self) -> torch.dtype:
        return self.target.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.target.embed_tokens.weight.device

    def pack(self) -> None:
        """Prepare every weight for inference on this device."""
        pack_linears(self.target)
        if self.drafter is not None:
            pack_linears(self.drafter.draft)
            self.drafter.head.pack()

    def bytes_per_token(self) -> int:
        """KV cache bytes of one token, target and draft together."""
        size = self.target.plane_shape().bytes_per_token(self.dtype)
        if self.drafter is not None:
            size += self.drafter.draft.plane_shape().bytes_per_token(self.dtype)
        return size

    def planes(self, pages: int, page_size: int) -> Planes:
        """A cache of ``pages`` pages for both models."""
        slots, dtype, device = pages * page_size, self.dtype, self.device
        target = KVPlane(self.target.plane_shape(), slots, page_size, dtype, device)
        draft = None
        if self.drafter is not None:
            draft = KVPlane(self.drafter.draft.plane_shape(), slots, page_size, dtype, device)
        return Planes(target, draft)
