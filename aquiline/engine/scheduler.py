"""Scheduler: who runs in this step, on which pages; and the bookkeeping after it (host side).

Requests wait in order of arrival. A waiting request is admitted when a row is free and its prompt
and one tree fit in free pages; admitted prompts are prefilled before the next round. A running
request grows page by page; when none is left the newest running request is preempted: its pages are
freed and it waits, first in line, to be prefilled again with what it has said. The seed contract
makes its text the same. Choices of one request that are admitted together share its prompt's pages.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from aquiline.core.outputs import RequestOutput
from aquiline.engine.choices import Choices
from aquiline.engine.sequence import Sequence, StepTokens
from aquiline.kvcache.pages import OutOfPages
from aquiline.speculation.dispatch.dispatcher import TreeChooser
from aquiline.speculation.dispatch.paths import band_of


@dataclass(frozen=True)
class Batch:
    """One step's work: prompts to prefill, or running sequences to advance by one round of a tree
    (an index among the chooser's candidates).

    Attributes:
        twins: sequences that share the prompt and its full pages with one among ``prefills``: each
            with the index of that one.
    """

    prefills: tuple[Sequence, ...] = ()
    twins: tuple[tuple[Sequence, int], ...] = ()
    decodes: tuple[Sequence, ...] = ()
    tree: int = 0


class Scheduler:
    """``chooser`` picks the tree; ``room``, the largest one's size, are the slots that a round
    needs past the length."""

    def __init__(self, max_num_seqs: int, chooser: TreeChooser, prefill_tokens: int) -> None:
        self.chooser, self.prefill_tokens = chooser, prefill_tokens
        self.room = max(tree.size for tree in chooser.candidates)
        self.waiting: deque[Sequence] = deque()
        self._choices: dict[int, Choices] = {}  # by request id, until the last of them ended
        self.running: list[Sequence] = []
        self._rows = list(range(max_num_seqs - 1, -1, -1))  # free rows, lowest last

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, choices: Choices) -> None:
        self._choices[choices.request.id] = choices
        self.waiting.extend(one for one in choices.sequences if one.finish_reason is None)

    def schedule(self) -> Batch:
        """Admit what fits; else reserve room for a round of everything that runs."""
        admitted = self._admit()
        if admitted.prefills:
            return admitted
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

    def _admit(self) -> Batch:
        """Waiting sequences in order while rows, pages and the prefill budget last."""
        prefills: list[Sequence] = []
        twins: list[tuple[Sequence, int]] = []
        budget = self.prefill_tokens
        while self.waiting and self._rows:
            sequence = self.waiting[0]
            length = len(sequence.tokens)
            leader = _leader(sequence, prefills)
            if leader is not None:
                # The page of the last token is not shared: the draft, a slot behind, writes to it.
                sequence.table.share(prefills[leader].table, length - 1)
            elif length > budget and budget < self.prefill_tokens:
                break  # a prompt longer than the whole budget goes alone
            try:
                _reserve(sequence, length + self.room)
            except OutOfPages:
                sequence.table.free()
                break
            self.waiting.popleft()
            sequence.row = self._rows.pop()
            self.running.append(sequence)
            if leader is not None:
                twins.append((sequence, leader))
            else:
                prefills.append(sequence)
                budget -= length
        return Batch(prefills=tuple(prefills), twins=tuple(twins))

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
        deltas: dict[int, dict[int, str]] = {}
        for step in emitted:
            sequence, request = step.sequence, step.sequence.request.id
            deltas.setdefault(request, {})[sequence.index] = sequence.extend(step)
            if step.prompt is not None:
                self._choices[request].prompt = step.prompt
            if sequence.finish_reason is not None:
                self._leave(sequence)
        outputs = [self._choices[request].output_now(new) for request, new in deltas.items()]
        for output in outputs:
            if output.finished:
                del self._choices[output.request_id]
        return outputs

    def abort(self, request_id: int) -> RequestOutput | None:
        """End a request wherever it is; None if it is unknown or already ended."""
        choices = self._choices.pop(request_id, None)
        if choices is None:
            return None
        deltas = {}
        for sequence in choices.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = "abort"
                if sequence.row is not None:
                    self._leave(sequence)
                else:
                    self.waiting.remove(sequence)
                deltas[sequence.index] = sequence.detokenizer.finish()
        return choices.output_now(deltas)


def _leader(sequence: Sequence, prefills: list[Sequence]) -> int | None:
    """Which of ``prefills`` has the same request and, like ``sequence``, has said nothing yet."""
    same = (i for i, one in enumerate(prefills) if one.request is sequence.request)
    return next((i for i in same if not (sequence.output or prefills[i].output)), None)


def _reserve(sequence: Sequence, room: int) -> None:
    copy = sequence.table.reserve(room)
    assert copy is None, "no sequence writes to a page that it shares"
