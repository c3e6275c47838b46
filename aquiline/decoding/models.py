"""Models and cache of one decoder: the target, its draft, and the planes they write to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.kvcache.pool import KVPlane
from aquiline.layers.linear import pack_linears
from aquiline.models.draft import Draft, Head
from aquiline.models.llama import Llama, TargetOutput


@dataclass(frozen=True)
class Drafter:
    """A draft and the head that joins it to the target's vocabulary."""

    draft: Draft
    head: Head

    def embed(self, tokens: Tensor) -> Tensor:
        """Target token ids [...] -> what the draft reads of them [..., d]."""
        return self.head.embed(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Draft hidden states [..., d] -> draft logits [..., Vd]."""
        out: Tensor = self.head(hidden)
        return out


@dataclass(frozen=True)
class Planes:
    """The KV planes; both are addressed by the same page tables."""

    target: KVPlane
    draft: KVPlane | None

    def copy_page(self, source: int, target: int) -> None:
        """Copy what a page holds of both models."""
        for plane in (self.target, self.draft):
            if plane is not None:
                plane.copy_page(source, target)


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

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's layers whose inputs the draft reads; () for none."""
        return () if self.drafter is None else self.drafter.draft.taps

    @property
    def feature_size(self) -> int:
        """Width of the features that pending pairs carry."""
        if self.drafter is None:
            return self.target.config.hidden_size
        return self.drafter.draft.feature_size

    def draft_features(self, output: TargetOutput) -> Tensor:
        """What the draft reads of a target pass run with ``taps``: [..., feature_size]."""
        return torch.cat(output.taps, dim=-1) if self.taps else output.features

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
