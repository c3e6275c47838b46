"""RoundNoise: what keys the randomness of one round, seen through the draft's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.tree import TreeTables


@dataclass(frozen=True)
class RoundNoise:
    """The context of one round that both rules draw their noise from.

    Attributes:
        tree: static tables.
        sampling: one row per request.
        positions: [B, D + 1] absolute position of the token emitted after a node of each depth.
        vocab: the target's vocabulary size.
        draft_ids: [Vd] target ids of a reduced draft vocabulary, or None.
    """

    tree: TreeTables
    sampling: SamplingBatch
    positions: Tensor
    vocab: int
    draft_ids: Tensor | None

    def of_draft(self, noise: Tensor) -> Tensor:
        """Noise [..., V] at the draft's tokens, [..., Vd]."""
        return noise if self.draft_ids is None else noise[..., self.draft_ids]

    def to_vocab(self, draft_probs: Tensor) -> Tensor:
        """Draft probabilities [..., Vd] over the target's vocabulary, [..., V]."""
        if self.draft_ids is None:
            return draft_probs
        full = draft_probs.new_zeros(*draft_probs.shape[:-1], self.vocab)
        full[..., self.draft_ids] = draft_probs
        return full
