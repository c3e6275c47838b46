"""Choices: the n sequences of one request, and what the user sees of them (host side)."""

from __future__ import annotations

from collections.abc import Mapping

from aquiline.core.outputs import PromptLogprobs, RequestOutput, SpeculationStats
from aquiline.core.request import Request
from aquiline.engine.scores import TokenScores, shown
from aquiline.engine.sequence import Sequence
from aquiline.text.tokenizer import Tokenizer


class Choices:
    """``sequences`` in order of their index; ``prompt`` holds the scores of the prompt's tokens
    from the second on, once the prefill that was asked for them has reported."""

    def __init__(
        self, request: Request, sequences: tuple[Sequence, ...], tokenizer: Tokenizer
    ) -> None:
        self.request, self.sequences, self.tokenizer = request, sequences, tokenizer
        self.prompt: tuple[TokenScores, ...] | None = None

    @property
    def finished(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def output_now(self, deltas: Mapping[int, str]) -> RequestOutput:
        """The request's state as the user sees it; ``deltas`` are new texts by index. Made when
        looked at, so that a step costs nothing that grows with the text."""
        completions = [sequence.completion_now() for sequence in self.sequences]
        statistics = [sequence.statistics_now() for sequence in self.sequences]
        scores, tokenizer = self.prompt, self.tokenizer

        def prompt() -> PromptLogprobs | None:
            return None if scores is None else (None, *shown(scores, tokenizer))

        return RequestOutput(
            self.request.id,
            self.request.prompt_token_ids,
            self.finished,
            tuple(self.sequences[index].news(text) for index, text in deltas.items()),
            lambda: tuple(completion() for completion in completions),
            lambda: SpeculationStats.sum(statistic() for statistic in statistics),
            prompt,
            self.sequences[0].cached or 0,
        )
