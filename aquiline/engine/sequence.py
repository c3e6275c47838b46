"""Sequence: one choice of a request while the engine works on it (host side)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from aquiline.core.outputs import (
    CompletionOutput,
    Delta,
    FinishReason,
    SpeculationStats,
    VerifiedTree,
)
from aquiline.core.request import Request
from aquiline.engine.scores import TokenScores, shown
from aquiline.guided.grammar import Grammar
from aquiline.guided.matcher import Matcher
from aquiline.kvcache.table import PageTable
from aquiline.text.detokenizer import Detokenizer


@dataclass(frozen=True)
class StepTokens:
    """What a step emitted for one sequence.

    Attributes:
        tokens: in order.
        depths: the tree depth each was accepted at; 0 for the target's own token.
        tree: what was verified; None for a prefill.
        scores: one a token, if the request asked for log-probabilities; else none.
        prompt: the prompt's, from its second token on, if asked for and made in this step.
    """

    sequence: Sequence
    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    tree: VerifiedTree | None
    scores: tuple[TokenScores, ...] = ()
    prompt: tuple[TokenScores, ...] | None = None


@dataclass(frozen=True)
class Said:
    """What a choice has said in an engine that is gone, for another one to go on with.

    Attributes:
        characters: length of the text that was shown.
        finished: it ended there.
    """

    token_ids: tuple[int, ...] = ()
    characters: int = 0
    finished: bool = False


class Sequence:
    """Tokens so far, pages, and what speculation did for them."""

    def __init__(
        self,
        request: Request,
        index: int,
        table: PageTable,
        detokenizer: Detokenizer,
        end_tokens: frozenset[int],
        max_tokens: int,
        grammar: Grammar | None = None,
    ) -> None:
        self.request, self.index = request, index
        self.table, self.detokenizer = table, detokenizer
        self.end_tokens, self.max_tokens = end_tokens, max_tokens
        self.grammar = grammar
        self.matcher: Matcher | None = None  # while running; it has heard so many tokens:
        self._heard = 0
        self.row: int | None = None  # its row of the decode state, while it has pages
        self.decoding = False  # its prompt has been launched to the end
        self.epoch = 0  # counts its stays on a row; work launched in an earlier one is void
        self.ahead = 0  # tokens that work in flight may commit, at most
        self.tickets = 0  # pieces of work in flight; each says one token at least
        self.settled = 0  # slots that hold, in both planes, what the tokens make of them
        self.cached: int | None = (
            None  # tokens that the prefix cache had when it was first admitted
        )
        self._pages_sent = 0
        self.output: list[int] = []
        self.depths: list[int] = []
        self.scores: list[TokenScores] = []  # one a token, if asked for
        self.finish_reason: FinishReason | None = None
        self._told = 0  # tokens of the output that news() has told
        self._carried, self._repeated = "", 0  # text not told yet; characters told elsewhere
        self.rounds = self.emitted = self.drafted = 0
        self.accepted_by_depth: list[int] = []
        self._tree: VerifiedTree | None = None  # of the newest tokens

    @property
    def tokens(self) -> list[int]:
        """Prompt and output: what a preempted sequence is prefilled with."""
        return [*self.request.prompt_token_ids, *self.output]

    @property
    def wants_prompt_scores(self) -> bool:
        """One choice reports for all, at its first prefill."""
        wanted = self.request.params.prompt_logprobs is not None
        return wanted and self.index == 0 and not self.output

    def admitted(self, row: int, known: int) -> None:
        """It has a row and pages, of which the first ``known`` slots are filled."""
        self.row, self.settled = row, known
        self.table.append(known - self.table.length)
        if self.cached is None:
            self.cached = known

    def prefilled(self, tokens: int) -> None:
        """So many more tokens of the prompt are under way; whoever reads their slots is launched
        later. The draft's last pair waits for the token after the prompt."""
        self.table.append(tokens)
        self.settled = min(self.table.length, len(self.tokens) - 1)

    def launched(self, tokens: int) -> None:
        """Work is in flight that commits ``tokens`` at most."""
        self.ahead += tokens
        self.tickets += 1

    def arrived(self, expected: int) -> None:
        """Work launched for ``expected`` tokens at most is done."""
        self.ahead -= expected
        self.tickets -= 1

    def committed(self, tokens: int) -> None:
        """A round has committed ``tokens``, and fed the draft what was known where it began; what
        it accepted the draft will be fed with the target's own features by the next one."""
        self.settled = self.table.length
        self.table.append(tokens)

    def enter(self) -> None:
        """About to be prefilled: the grammar, if there is one, stands where the output ends."""
        if self.grammar is not None:
            self.matcher, self._heard = Matcher(self.grammar), 0
            self.hear()

    def hear(self, in_flight: tuple[int, ...] = ()) -> None:
        """Move the matcher on over the output, and what work in flight has said by now."""
        if self.matcher is not None:
            already = max(0, self._heard - len(self.output))
            new = (*self.output[self._heard :], *in_flight[already:])
            self.matcher.advance(new)
            self._heard += len(new)

    def leave(self) -> None:
        """Stop running: pages are free at once, work in flight is void."""
        self.epoch += 1
        self.row, self.matcher, self.decoding = None, None, False
        self.ahead = self.tickets = self.settled = self._pages_sent = 0
        self.table.free()

    @property
    def will_end(self) -> bool:
        """Whether work in flight reaches the length limit for sure."""
        return len(self.output) + self.tickets >= self.max_tokens

    def pages_changed(self) -> bool:
        """Whether pages were added since the last call."""
        changed = len(self.table.pages) != self._pages_sent
        self._pages_sent = len(self.table.pages)
        return changed

    def record_round(self, accepted: int, drafted: int, depth: int) -> None:
        """Count one round that accepted ``accepted`` of ``drafted`` nodes, ``depth`` deep."""
        self.rounds += 1
        self.emitted += accepted + 1
        self.drafted += drafted
        self.accepted_by_depth += [0] * (depth - len(self.accepted_by_depth))
        for level in range(accepted):
            self.accepted_by_depth[level] += 1

    def extend(self, step: StepTokens) -> str:
        """Append emitted tokens up to the first stop condition; returns the new text."""
        tokens, room = step.tokens, self.max_tokens - len(self.output)
        end = next((at for at, token in enumerate(tokens) if token in self.end_tokens), None)
        ended = end is not None and end < room
        kept = tokens[: end + 1] if end is not None and ended else tokens[:room]
        delta = self.detokenizer.append(kept[:-1] if ended else kept)
        if self.detokenizer.stopped_at is not None:
            kept = kept[: self.detokenizer.stopped_at - len(self.output)]
            ended = True
        self.output += kept
        self.depths += step.depths[: len(kept)]
        self._tree = step.tree
        self.scores += step.scores[: len(kept)]
        self.hear()
        if self.matcher is not None and self.matcher.stuck:
            self.finish_reason = "abort"
        elif ended:
            self.finish_reason = "stop"
        elif len(self.output) >= self.max_tokens:
            self.finish_reason = "length"
        return delta if self.finish_reason is None else delta + self.detokenizer.finish()

    def resume(self, said: Said) -> None:
        """Go on after ``said``, as after a preemption; news begin where it ends."""
        self.output = list(said.token_ids)
        self._told = len(self.output)
        if said.finished:
            self.finish_reason = "abort"  # whatever it was, it has been told
        self._carried = self.detokenizer.append(self.output)
        self._repeated = said.characters

    def news(self, text: str) -> Delta:
        """What was added since the last call; ``text`` is the new text."""
        text, self._carried = self._carried + text, ""
        repeated = min(len(text), self._repeated)
        self._repeated -= repeated
        start, self._told = self._told, len(self.output)
        fresh = self._told - start
        logprobs = None
        if self.request.params.logprobs is not None:
            logprobs = shown(self.scores[len(self.scores) - fresh :], self.detokenizer.tokenizer)
        return Delta(
            self.index, text[repeated:], tuple(self.output[start:]),
            tuple(self.depths[len(self.depths) - fresh :]), self.finish_reason,
            self.counts(), self._tree, logprobs,
        )  # fmt: skip

    def counts(self) -> SpeculationStats:
        """The statistics so far, without the depths."""
        return SpeculationStats(
            self.rounds, self.emitted, self.drafted, tuple(self.accepted_by_depth)
        )

    def completion_now(self) -> Callable[[], CompletionOutput]:
        """What makes the text as it is now."""
        count, parts, reason = len(self.output), self.detokenizer.num_parts, self.finish_reason

        def completion() -> CompletionOutput:
            text, tokens = self.detokenizer.text_of(parts), tuple(self.output[:count])
            if self.request.params.logprobs is None:
                return CompletionOutput(self.index, text, tokens, reason)
            scores = self.scores[:count]
            total = sum(score.logprob for score in scores)
            logprobs = shown(scores, self.detokenizer.tokenizer)
            return CompletionOutput(self.index, text, tokens, reason, logprobs, total)

        return completion

    def statistics_now(self) -> Callable[[], SpeculationStats]:
        """What makes the statistics as they are now."""
        counts, count = self.counts(), len(self.depths)
        return lambda: replace(counts, depths=tuple(self.depths[:count]))
