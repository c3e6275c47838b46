"""What a user gets back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class CompletionOutput:
    """One generated text. ``token_ids`` include the token that ended it, ``text`` does not."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class SpeculationStats:
    """What speculation did for one request.

    Attributes:
        rounds: target forwards in decoding (prefill not counted).
        tokens: tokens they emitted, bonus tokens included, before any stop condition cut them.
        drafted: draft tokens verified.
        accepted_by_depth: how many rounds accepted a draft token at depth 1, 2, ...
        depths: for every token of the text the depth it was accepted at; 0 where the target
            itself supplied it (bonus token, or the first one, from prefill).
    """

    rounds: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted_by_depth: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()

    @property
    def tokens_per_call(self) -> float:
        """Mean tokens per target forward (TPC); 1.0 without speculation."""
        return self.tokens / self.rounds if self.rounds else 0.0


@dataclass(frozen=True)
class RequestOutput:
    """The state of one request after a step; the last one has ``finished`` set.

    ``text_delta`` is what this step added to the text. ``outputs`` and ``speculation`` are made
    when they are first looked at, and show the state after this step even then.
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]
    finished: bool
    text_delta: str
    completion: Callable[[], CompletionOutput] = field(repr=False)
    statistics: Callable[[], SpeculationStats] = field(repr=False)

    @cached_property
    def outputs(self) -> tuple[CompletionOutput, ...]:
        """One for each choice."""
        return (self.completion(),)

    @cached_property
    def speculation(self) -> SpeculationStats:
        """What speculation did for the request so far."""
        return self.statistics()
