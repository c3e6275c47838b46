"""Transcript: what a request has said so far, put together from the engine process's updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from aquiline.core.outputs import (
    CompletionOutput,
    Delta,
    FinishReason,
    Logprobs,
    PromptLogprobs,
    RequestOutput,
    SpeculationStats,
)
from aquiline.engine.messages import Update
from aquiline.engine.sequence import Said


class Transcript:
    """One request over the lives of one engine or several; ``wants_logprobs`` as it asked."""

    def __init__(
        self, request_id: int, prompt_token_ids: tuple[int, ...], n: int, wants_logprobs: bool
    ) -> None:
        self.request_id, self.prompt_token_ids = request_id, prompt_token_ids
        self._choices = [_Choice(index, wants_logprobs) for index in range(n)]
        self._prompt: PromptLogprobs | None = None
        self._cached: int | None = None  # in the first engine

    def add(self, update: Update) -> RequestOutput:
        """Take in an update; the request's state after it."""
        for delta in update.deltas:
            self._choices[delta.index].add(delta)
        self._prompt = update.prompt_logprobs or self._prompt
        if self._cached is None:
            self._cached = update.num_cached_tokens
        prompt = self._prompt
        completions = [choice.completion_now() for choice in self._choices]
        statistics = [choice.statistics_now() for choice in self._choices]
        return RequestOutput(
            self.request_id, self.prompt_token_ids, update.finished, update.deltas,
            lambda: tuple(completion() for completion in completions),
            lambda: SpeculationStats.sum(statistic() for statistic in statistics),
            lambda: prompt,
            self._cached,
        )  # fmt: skip

    def said(self) -> tuple[Said, ...]:
        """What the next engine is to go on with; it counts its rounds from nothing."""
        return tuple(choice.said() for choice in self._choices)


class _Choice:
    def __init__(self, index: int, wants_logprobs: bool) -> None:
        self.index, self.wants_logprobs = index, wants_logprobs
        self.texts: list[str] = []
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.finish_reason: FinishReason | None = None
        self.counts = self.before = SpeculationStats()  # in this engine, in those before it

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.tokens += delta.token_ids
        self.depths += delta.depths
        self.logprobs += delta.logprobs or ()
        self.finish_reason, self.counts = delta.finish_reason, delta.counts

    def said(self) -> Said:
        self.before = SpeculationStats.sum((self.before, self.counts))
        self.counts = SpeculationStats()
        finished = self.finish_reason is not None
        return Said(tuple(self.tokens), sum(map(len, self.texts)), finished)

    def completion_now(self) -> Callable[[], CompletionOutput]:
        parts, count, reason = len(self.texts), len(self.tokens), self.finish_reason

        def completion() -> CompletionOutput:
            text, tokens = "".join(self.texts[:parts]), tuple(self.tokens[:count])
            if not self.wants_logprobs:
                return CompletionOutput(self.index, text, tokens, reason)
            logprobs = tuple(self.logprobs[:count])
            total = sum(next(iter(one.values())).logprob for one in logprobs)
            return CompletionOutput(self.index, text, tokens, reason, logprobs, total)

        return completion

    def statistics_now(self) -> Callable[[], SpeculationStats]:
        before, counts, count = self.before, self.counts, len(self.depths)
        return lambda: replace(
            SpeculationStats.sum((before, counts)), depths=tuple(self.depths[:count])
        )
