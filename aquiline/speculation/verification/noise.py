"""RoundNoise: what keys the randomness of one round."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aquiline.kernels import ops
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

    def key(self, stream: ops.Stream) -> ops.NoiseKey:
        """The noise of a stream at every depth."""
        sampling = self.sampling
        return ops.NoiseKey(sampling.seeds, sampling.choices, self.positions, stream, self.vocab)
