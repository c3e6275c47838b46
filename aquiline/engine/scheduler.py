"""Scheduler: who runs in this step, on which pages; and the bookkeeping after it (host side).

A step is a prefill or a round of all that decode; while there is work for both they take turns, so
a prompt never holds up a stream for longer than one step's budget of tokens.

Prompts wait in line, and those that a step can finish together go together. One that is longer than
the budget runs a stretch of that length alone and then stands in a line of those that have begun.
The two lines have every second prefill each: a short prompt waits for one stretch at most beside
those ahead of it, and of m long ones each has every 2m-th prefill, however many short ones come.

At its first turn a request needs a row, and pages for its prompt and one tree; what the prefix
cache knows of it is not run. If a prompt that is under way will leave at least half of the rest,
the request waits for that; so do the choices of one request. A running request grows page by page;
when none is left the newest is preempted: its pages are given back and it waits, first in line, to
be prefilled with what it has said, as far as the cache has lost it. The seed contract makes its
text the same.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from aquiline.core.outputs import RequestOutput
from aquiline.engine.choices import Choices
from aquiline.engine.config import PrefillBudget
from aquiline.engine.sequence import Sequence, StepTokens
from aquiline.kvcache.pages import OutOfPages
from aquiline.kvcache.prefix import Prefix, PrefixCache, shared
from aquiline.speculation.dispatch.dispatcher import PLAIN, TreeChooser
from aquiline.speculation.dispatch.paths import band_of


class Stretch(NamedTuple):
    """``length`` tokens of a sequence to be prefilled from ``start``; ``last`` reaches its end."""

    sequence: Sequence
    start: int
    length: int
    last: bool


@dataclass(frozen=True)
class Batch:
    """One step's work: prompts to prefill, or running sequences to advance by one round of a tree
    (an index among the chooser's candidates).

    Attributes:
        prefills: all of them last stretches, or one that is not.
        copies: (source page, target page), in order, before anything else.
    """

    prefills: tuple[Stretch, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    decodes: tuple[Sequence, ...] = ()
    tree: int = 0


class Scheduler:
    """``chooser`` picks the tree; ``room``, the largest one's size, are the slots that a round
    needs past the length. ``cache`` is None to compute every prompt anew.

    Attributes:
        waiting: sequences whose prompt has not been launched to its end, in line.
        running: those that have a row and pages, in the order they got them.
    """

    def __init__(
        self,
        max_num_seqs: int,
        chooser: TreeChooser,
        budget: PrefillBudget,
        cache: PrefixCache | None,
    ) -> None:
        self.chooser, self.budget, self.cache = chooser, budget, cache
        self.room = max(tree.size for tree in chooser.candidates)
        self._plain = chooser.candidates.index(PLAIN)
        self.waiting: deque[Sequence] = deque()
        self._choices: dict[int, Choices] = {}  # by request id, until the last of them ended
        self.running: list[Sequence] = []
        self._rows = list(range(max_num_seqs - 1, -1, -1))  # free rows, lowest last
        self._last = Batch()
        self._fresh_first = True

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, choices: Choices) -> None:
        self._choices[choices.request.id] = choices
        self.waiting.extend(one for one in choices.sequences if one.finish_reason is None)

    def schedule(self) -> Batch:
        """A prefill or a round, in turn while there is work for both."""
        for stretch in self._last.prefills:
            self._keep(stretch.sequence)
        decodes = self._decodes()
        if not (self._last.prefills and decodes):
            self._last = self._prefill(bool(decodes))
            if self._last.prefills:
                return self._last
        self._last = self._round(decodes)
        return self._last

    # ------------------------------------------------------------------------------------- rounds

    def _decodes(self) -> list[Sequence]:
        return [one for one in self.running if one.decoding and not one.will_end]

    def _round(self, active: list[Sequence]) -> Batch:
        """Reserve room for a round of everything that decodes."""
        for sequence in active:
            while sequence.row is not None:
                try:
                    sequence.table.reserve(sequence.ahead + self.room)
                    break
                except OutOfPages:
                    self._preempt(self.running[-1])
        decodes = tuple(sequence for sequence in active if sequence.row is not None)
        return Batch(decodes=decodes, tree=self._choose(decodes) if decodes else 0)

    def _choose(self, decodes: tuple[Sequence, ...]) -> int:
        """The chooser's tree; the root alone if anybody declines speculation."""
        if not all(sequence.request.params.speculation for sequence in decodes):
            return self._plain
        tokens = sum(sequence.table.length + sequence.ahead for sequence in decodes)
        temperatures = sorted(sequence.request.params.temperature for sequence in decodes)
        band = band_of(temperatures[len(temperatures) // 2])
        return self.chooser.choose(len(decodes), tokens, band)

    # ----------------------------------------------------------------------------------- prefills

    def _prefill(self, beside: bool) -> Batch:
        """The turn of those at the head of one of the lines, ``beside`` rounds or not."""
        budget = self.budget.beside_rounds if beside else self.budget.alone
        chosen: list[Stretch] = []
        copies: list[tuple[int, int]] = []
        blocked = False
        begun = [sequence for sequence in self.waiting if sequence.row is not None]
        fresh = [sequence for sequence in self.waiting if sequence.row is None]
        for sequence in (*fresh, *begun) if self._fresh_first else (*begun, *fresh):
            prefix = None
            if sequence.row is None:
                prefix = None if blocked else self._known(sequence)
                if prefix is None:
                    continue
            start = sequence.table.length if prefix is None else prefix.tokens
            left = len(sequence.tokens) - start
            whole = max(left, *(one.length for one in chosen), 0) * (len(chosen) + 1) <= budget
            if chosen and not whole:
                break
            if prefix is not None and not self._admit(sequence, prefix, copies):
                blocked = True  # nobody overtakes it, but those that have their pages go on
                continue
            chosen.append(Stretch(sequence, start, left if whole else budget, whole))
            if not whole:
                break
        self._fresh_first = bool(chosen) and chosen[0].sequence in begun
        for sequence, _, _, last in chosen:
            self.waiting.remove(sequence)
            sequence.decoding = last
            if not last:
                self.waiting.append(sequence)
        return Batch(tuple(chosen), tuple(copies))

    def _known(self, sequence: Sequence) -> Prefix | None:
        """What need not be run of it; None while somebody else is running the better part."""
        if self.cache is None or sequence.wants_prompt_scores:
            return Prefix()
        tokens = sequence.tokens
        prefix = self.cache.find(tokens)
        under_way = (other.tokens for other in self.running if not other.decoding)
        soon = max((min(shared(tokens, other), len(tokens) - 1) for other in under_way), default=0)
        worth_waiting = 2 * (soon - prefix.tokens) >= len(tokens) - prefix.tokens
        return None if worth_waiting else prefix

    def _admit(self, sequence: Sequence, prefix: Prefix, copies: list[tuple[int, int]]) -> bool:
        """Give it a row and pages, if there are any."""
        if not self._rows:
            return False
        table = sequence.table
        table.begin(prefix.pages)
        try:
            table.reserve(len(sequence.tokens) - table.length + self.room)
        except OutOfPages:
            table.free()
            return False
        if prefix.partial is not None:
            copies.append((prefix.partial, table.pages[len(prefix.pages)]))
        sequence.admitted(self._rows.pop(), prefix.tokens)
        self.running.append(sequence)
        return True

    def _keep(self, sequence: Sequence) -> None:
        """The prefix cache learns what its pages hold."""
        if self.cache is not None:
            self.cache.keep(sequence.tokens, sequence.table.pages, sequence.settled)

    # ------------------------------------------------------------------------------------ leaving

    def _preempt(self, sequence: Sequence) -> None:
        if not sequence.decoding:
            self.waiting.remove(sequence)
        self._leave(sequence)
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Stop running: the row and the pages are free again."""
        assert sequence.row is not None
        self._keep(sequence)
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
                if not sequence.decoding:
                    self.waiting.remove(sequence)
                if sequence.row is not None:
                    self._leave(sequence)
                deltas[sequence.index] = sequence.detokenizer.finish()
        return choices.output_now(deltas)
