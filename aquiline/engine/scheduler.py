"""Scheduler: who runs in this step, on which pages; and the bookkeeping after it (host side).

Requests wait in order of arrival. A waiting request is admitted when a row is free and its prompt
and one tree fit in free pages; admitted prompts are prefilled before the next round. A running
request grows page by page; when none is left the newest running request is preempted: its pages are
freed and it waits, first in line, to be prefilled again with what it has said. The seed contract
makes its text the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from aquiline.core.outputs import RequestOutput
from aquiline.engine.sequence import Sequence
from aquiline.kvcache.pages import OutOfPages
from aquiline.speculation.dispatch.dispatcher import TreeChooser
from aquiline.speculation.dispatch.paths import band_of


@dataclass(frozen=True)
class Batch:
    """One step's work: prompts to prefill, or running sequences to advance by one round of a tree
    (an index among the chooser's candidates)."""

    prefills: tuple[Sequence, ...] = ()
    decodes: tuple[Sequence, ...] = ()
    tree: int = 0


@dataclass(frozen=True)
class StepTokens:
    """What a step emitted for one sequence.

    Attributes:
        tokens: in order.
        depths: the tree depth each was accepted at; 0 for the target's own token.
    """

    sequence: Sequence
    tokens: tuple[int, ...]
    depths: tuple[int, ...]


class Scheduler:
    """``chooser`` picks the tree; ``room``, the largest one's size, are the slots that a round
    needs past the length."""

    def __init__(self, max_num_seqs: int, chooser: TreeChooser, prefill_tokens: int) -> None:
        self.chooser, self.prefill_tokens = chooser, prefill_tokens
        self.room = max(tree.size for tree in chooser.candidates)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._rows = list(range(max_num_seqs - 1, -1, -1))  # free rows, lowest last

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Batch:
        """Admit what fits; else reserve room for a round of everything that runs."""
        prefills = tuple(self._admit())
        if prefills:
            return Batch(prefills=prefills)
        active = [sequence for sequence in self.running if not sequence.will_end]
        for sequence in active:
            while sequence.row is not None:
                try:
                    _reserve(sequence, sequence.ahead + self.room)
                    break
                except OutOfPages:
                    self._preempt(self.running[-1])
        decodes = tuple(sequence for sequence in active if sequence.row is not None)
        return Batch(decodes=decodes, tree=self._choose(decodes) if decodes else 0)

    def _choose(self, decodes: tuple[Sequence, ...]) -> int:
        tokens = sum(sequence.table.length + sequence.ahead for sequence in decodes)
        temperatures = sorted(sequence.request.params.temperature for sequence in decodes)
        band = band_of(temperatures[len(temperatures) // 2])
        return self.chooser.choose(len(decodes), tokens, band)

    def _admit(self) -> Iterator[Sequence]:
        """Waiting sequences in order while rows, pages and the prefill budget last."""
        budget = self.prefill_tokens
        while self.waiting and self._rows:
            sequence = self.waiting[0]
            length = len(sequence.tokens)
            if length > budget and budget < self.prefill_tokens:
                return  # a prompt longer than the whole budget goes alone
            try:
                _reserve(sequence, length + self.room)
            except OutOfPages:
                return
            self.waiting.popleft()
            sequence.row = self._rows.pop()
            self.running.append(sequence)
            budget -= length
            yield sequence

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Stop running: the row and the pages are free again."""
        assert sequence.row is not None
        self.running.remove(sequence)
        self._rows.append(sequence.row)
        sequence.leave()

    def settle(self, emitted: list[StepTokens]) -> list[RequestOutput]:
        """Append what a step emitted; sequences that ended leave."""
        outputs = []
        for step in emitted:
            delta = step.sequence.extend(step.tokens, step.depths)
            if step.sequence.finish_reason is not None:
                self._leave(step.sequence)
            outputs.append(step.sequence.output_now(delta))
        return outputs

    def abort(self, request_id: int) -> RequestOutput | None:
        """End a request wherever it is; None if it is unknown or already ended."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.request.id == request_id:
                sequence.finish_reason = "abort"
                if sequence.row is not None:
                    self._leave(sequence)
                else:
                    self.waiting.remove(sequence)
                return sequence.output_now(sequence.detokenizer.finish())
        return None


def _reserve(sequence: Sequence, room: int) -> None:
    copy = sequence.table.reserve(room)
    assert copy is None, "no sequence shares its pages yet"
