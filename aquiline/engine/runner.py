"""Runner: turns a scheduled batch into device work, and the device's answer into tokens."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.core.params import VerificationRule
from aquiline.decoding.models import DecoderModels, Planes
from aquiline.decoding.prefill import prefill
from aquiline.decoding.round import decode_round
from aquiline.decoding.state import DecodeState
from aquiline.engine.scheduler import Batch, StepTokens
from aquiline.engine.sequence import Sequence
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.tree import TreeShape


@dataclass(frozen=True)
class Ticket:
    """Work in flight: for each sequence ``accepted`` [B] draft tokens plus one, in ``tokens``.

    ``accepted`` is -1 for a prefill, which drew one token.
    """

    sequences: tuple[Sequence, ...]
    tokens: Tensor
    accepted: Tensor


class Runner:
    """The models, their cache, and the decode state of every row."""

    def __init__(
        self,
        models: DecoderModels,
        planes: Planes,
        shape: TreeShape,
        rule: VerificationRule,
        rows: int,
    ) -> None:
        self.models, self.planes, self.rule = models, planes, rule
        self.tree = shape.tables(models.device)
        width = models.feature_size
        self.state = DecodeState.empty(rows, shape.depth + 1, width, models.dtype, models.device)
        self._sampling: tuple[tuple[Sequence, ...], SamplingBatch] | None = None

    def launch(self, batch: Batch) -> Ticket:
        """Enqueue the batch's work; nothing is read back."""
        return self._prefill(batch.prefills) if batch.prefills else self._round(batch.decodes)

    def collect(self, ticket: Ticket) -> list[StepTokens]:
        """Read a ticket's tokens and commit its pages' lengths."""
        emitted = []
        tree_nodes, depth = self.tree.shape.size - 1, self.tree.shape.depth
        rows = zip(ticket.sequences, ticket.tokens.tolist(), ticket.accepted.tolist(), strict=True)
        for sequence, tokens, accepted in rows:
            if accepted < 0:  # a prefill: the prompt is committed, one token was drawn
                sequence.table.append(len(sequence.tokens))
                emitted.append(StepTokens(sequence, (tokens[0],), (0,)))
                continue
            sequence.table.append(accepted + 1)
            sequence.record_round(accepted, tree_nodes, depth)
            depths = (*range(1, accepted + 1), 0)
            emitted.append(StepTokens(sequence, tuple(tokens[: accepted + 1]), depths))
        return emitted

    def _prefill(self, sequences: tuple[Sequence, ...]) -> Ticket:
        prompts = [sequence.tokens for sequence in sequences]
        tokens = self._tensor(_padded(prompts))
        counts = self._tensor([len(prompt) for prompt in prompts])
        state = prefill(
            self.models, self.planes, self._page_table(sequences), tokens, counts,
            self._sampling_of(sequences),
        )  # fmt: skip
        self.state.store(self._rows(sequences), state)
        return Ticket(sequences, state.roots[:, None], torch.full_like(counts, -1))

    def _round(self, sequences: tuple[Sequence, ...]) -> Ticket:
        rows = self._rows(sequences)
        result = decode_round(
            self.models, self.planes, self.tree, self.rule, self._page_table(sequences),
            self.state.select(rows), self._sampling_of(sequences),
        )  # fmt: skip
        self.state.store(rows, result.state)
        return Ticket(sequences, result.verdict.tokens, result.verdict.accepted)

    def _sampling_of(self, sequences: tuple[Sequence, ...]) -> SamplingBatch:
        """The batch's parameters; rebuilt only when the batch changed."""
        if self._sampling is None or self._sampling[0] != sequences:
            params = [sequence.request.params for sequence in sequences]
            seeds = [sequence.request.seed for sequence in sequences]
            self._sampling = sequences, SamplingBatch.of(params, seeds, self.models.device)
        return self._sampling[1]

    def _page_table(self, sequences: Items[Sequence]) -> Tensor:
        return self._tensor(_padded([sequence.table.pages for sequence in sequences]))

    def _rows(self, sequences: Items[Sequence]) -> Tensor:
        return self._tensor([sequence.row for sequence in sequences])

    def _tensor(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.models.device)


def _padded(lists: list[list[int]]) -> list[list[int]]:
    width = max(map(len, lists))
    return [row + [0] * (width - len(row)) for row in lists]
