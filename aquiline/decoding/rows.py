"""DeviceRows: what the device holds of the running requests, one row each.

A round reads and writes rows through their indices, so that one captured graph serves any batch of
its size. The last row is padding's: it owns no page, so what it writes goes to the dustbin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.core.params import SamplingParams
from aquiline.decoding.models import DecoderModels, Planes
from aquiline.decoding.round import decode_round
from aquiline.decoding.state import DecodeState
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.tree import TreeTables
from aquiline.speculation.verification.rules import RuleFactory


@dataclass(frozen=True)
class DeviceRows:
    """R requests and a padding row.

    Attributes:
        state: [R + 1, ...], see DecodeState.
        sampling: [R + 1, ...], see SamplingBatch.
        page_table: [R + 1, M] page ids.
    """

    state: DecodeState
    sampling: SamplingBatch
    page_table: Tensor

    @classmethod
    def empty(cls, rows: int, columns: int, pending: int, models: DecoderModels) -> DeviceRows:
        """``rows`` requests of ``columns`` pages, with ``pending`` pairs at most."""
        device = models.device
        count = rows + 1
        state = DecodeState.empty(count, pending, models.feature_size, models.dtype, device)
        sampling = SamplingBatch.of([SamplingParams(temperature=0)] * count, [0] * count, device)
        state.lengths[rows].fill_(state.room)
        pages = torch.zeros(count, columns, dtype=torch.int64, device=device)
        return cls(state, sampling, pages)

    @property
    def padding(self) -> int:
        """Index of the padding row. Its length is the room for pending pairs, always: what it
        feeds lies at positions from 0."""
        return self.page_table.shape[0] - 1


def advance(
    models: DecoderModels,
    planes: Planes,
    tree: TreeTables,
    rule: RuleFactory,
    all_rows: DeviceRows,
    rows: Tensor,
    sampling: SamplingBatch,
) -> Tensor:
    """One round of the given rows [B] -> emitted [B, 1 + D + 1]: how many draft tokens were
    accepted, then the tokens, that many and one more of them valid.

    ``sampling`` is that of the rows.
    """
    result = decode_round(
        models, planes, tree, rule, all_rows.page_table.index_select(0, rows),
        all_rows.state.select(rows), sampling,
    )  # fmt: skip
    all_rows.state.store(rows, result.state)
    all_rows.state.lengths[all_rows.padding].fill_(all_rows.state.room)
    verdict = result.verdict
    return torch.cat((verdict.accepted[:, None], verdict.tokens), dim=1)
