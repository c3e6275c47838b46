"""DeviceRows: what the device holds of requests, one row each.

The engine keeps one set of rows for all its requests, and for each batch size a set that rounds
work on: while the same requests run, nothing moves; when that changes, rows are taken from the
first set and later put back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from aquiline.core.params import SamplingParams
from aquiline.decoding.models import DecoderModels, Planes
from aquiline.decoding.round import Round, RoundResult
from aquiline.decoding.state import DecodeState
from aquiline.sampling.adjust import Adjustments
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.tree import TreeShape, TreeTables
from aquiline.speculation.verification.rules import RuleFactory


@dataclass(frozen=True)
class DeviceRows:
    """R requests. A row that is not active is padding: it owns no page, so what it writes goes to
    the dustbin.

    Attributes:
        state: [R, ...], see DecodeState.
        sampling: [R, ...], see SamplingBatch.
        page_table: [R, M] page ids.
        active: [R] bool.
    """

    state: DecodeState
    sampling: SamplingBatch
    page_table: Tensor
    active: Tensor

    @classmethod
    def empty(
        cls,
        rows: int,
        columns: int,
        pending: int,
        models: DecoderModels,
        adjustments: Adjustments | None = None,
    ) -> DeviceRows:
        """``rows`` rows of padding, of ``columns`` pages and ``pending`` pairs at most."""
        device = models.device
        state = DecodeState.empty(rows, pending, models.feature_size, models.dtype, device)
        params = [SamplingParams(temperature=0)] * rows
        sampling = SamplingBatch.of(params, [0] * rows, device, adjustments=adjustments)
        pages = torch.zeros(rows, columns, dtype=torch.int64, device=device)
        active = torch.zeros(rows, dtype=torch.bool, device=device)
        return cls(state, sampling, pages, active)

    @torch.inference_mode()
    def take(self, source: DeviceRows, rows: Tensor) -> None:
        """Copy state and parameters of the given rows [n <= R] of ``source``; the rest is padding.

        Pages are the host's to send.
        """
        count = len(rows)
        self.state.copy(source.state.select(rows), count)
        self.sampling.copy(source.sampling.select(rows), count)
        self.active[:count].fill_(True)
        self.active[count:].fill_(False)
        self.sampling.slots[count:].fill_(-1)
        self.state.lengths[count:].fill_(self.state.room)


class Emitted(NamedTuple):
    """What a round says of R rows.

    Attributes:
        tokens: [R, 1 + D + 1] int64: how many draft tokens were accepted, then the tokens, that
            many and one more of them valid.
        logprobs: [R, D + 1, ...] of the tokens, see ops.token_logprobs; None if nobody wants them.
    """

    tokens: Tensor
    logprobs: Tensor | None


@torch.inference_mode()
def advance(
    models: DecoderModels, planes: Planes, tree: TreeTables, rule: RuleFactory, rows: DeviceRows
) -> Emitted:
    """One round of all rows, in place."""
    round_ = Round(models, planes, tree, rule, rows.page_table, rows.state, rows.sampling)
    return _emit(rows, round_.run())


@dataclass(frozen=True)
class Forms:
    """What the host says of R texts of a given form, at addresses that graphs know.

    Attributes:
        roots: [R, 1, words] int32 masks after the roots, see ops.adjust_logits; and
        foreseen: [R, D] int64, see grow: both are needed before drafting.
        nodes: [R, N, words] int32 masks after every node; needed before accepting.
    """

    roots: Tensor
    foreseen: Tensor
    nodes: Tensor

    @classmethod
    def empty(cls, rows: int, tree: TreeShape, vocab: int, device: torch.device) -> Forms:
        """All tokens allowed, none foreseen."""
        shape = rows, tree.size, -(-vocab // 32)
        nodes = torch.full(shape, -1, dtype=torch.int32, device=device)
        foreseen = torch.full((rows, tree.depth), -1, device=device)
        return cls(nodes[:, :1].clone(), foreseen, nodes)


class StagedRound:
    """``advance`` in three stages, for texts of a given form."""

    def __init__(
        self,
        models: DecoderModels,
        planes: Planes,
        tree: TreeTables,
        rule: RuleFactory,
        rows: DeviceRows,
        forms: Forms,
    ) -> None:
        self.models, self.planes, self.tree, self.rule = models, planes, tree, rule
        self.rows, self.forms = rows, forms
        self._round: Round | None = None

    @torch.inference_mode()
    def draft(self) -> Tensor:
        """Tokens [R, N] of the trees."""
        rows = self.rows
        self._round = Round(
            self.models, self.planes, self.tree, self.rule, rows.page_table, rows.state,
            rows.sampling,
        )  # fmt: skip
        return self._round.draft(self.forms.roots, self.forms.foreseen)

    @torch.inference_mode()
    def verify(self) -> None:
        assert self._round is not None, "draft comes first"
        self._round.verify()

    @torch.inference_mode()
    def accept(self) -> Emitted:
        assert self._round is not None, "draft comes first"
        result, self._round = self._round.accept(self.forms.nodes), None
        return _emit(self.rows, result)


def _emit(rows: DeviceRows, result: RoundResult) -> Emitted:
    """Write the new state in place."""
    # A padding row stays where it is: with room before it for the pairs that it feeds.
    lengths = torch.where(rows.active, result.state.lengths, rows.state.room)
    rows.state.copy(replace(result.state, lengths=lengths), len(rows.active))
    verdict = result.verdict
    tokens = torch.cat((verdict.accepted[:, None], verdict.tokens), dim=1)
    return Emitted(tokens, result.logprobs)
