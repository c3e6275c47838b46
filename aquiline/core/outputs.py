"""What a user gets back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import Literal, NamedTuple

from aquiline.core.params import TreePath

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Logprob:
    """One token at one position, under the raw logits (no temperature, penalty, bias or ban).

    Attributes:
        logprob: natural logarithm of its probability.
        rank: 1 for the likeliest token; how many are likelier, plus one.
        decoded_token: its text alone.
    """

    logprob: float
    rank: int
    decoded_token: str


Logprobs = dict[int, Logprob]  # by token id: the token that is there first, then the likeliest
PromptLogprobs = tuple[Logprobs | None, ...]


@dataclass(frozen=True)
class CompletionOutput:
    """One generated text. ``token_ids`` include the token that ended it, ``text`` does not.

    Attributes:
        index: which of the request's ``n``.
        logprobs: one mapping a token, if asked for.
        cumulative_logprob: the sum over ``token_ids``, if asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[Logprobs, ...] | None = None
    cumulative_logprob: float | None = None


@dataclass(frozen=True)
class SpeculationStats:
    """What speculation did for one request, its choices one after another.

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

    @classmethod
    def sum(cls, parts: Iterable[SpeculationStats]) -> SpeculationStats:
        """Several texts' statistics as one."""
        every = tuple(parts)
        by_depth = zip_longest(*(part.accepted_by_depth for part in every), fillvalue=0)
        return cls(
            sum(part.rounds for part in every),
            sum(part.tokens for part in every),
            sum(part.drafted for part in every),
            tuple(map(sum, by_depth)),
            tuple(depth for part in every for depth in part.depths),
        )

    @property
    def tokens_per_call(self) -> float:
        """Mean tokens per target forward (TPC); 1.0 without speculation."""
        return self.tokens / self.rounds if self.rounds else 0.0


class VerifiedTree(NamedTuple):
    """What a round verified; only a root without speculation.

    Attributes:
        paths: of child ranks, one a drafted node, as SpeculationParams.tree has them.
        retrieved: length of the chain of retrieved nodes beside them.
    """

    paths: tuple[TreePath, ...]
    retrieved: int


@dataclass(frozen=True)
class Delta:
    """What one step added to one choice.

    Attributes:
        index: which of the request's ``n``.
        text: final text; some of the tokens' own may be held back.
        depths: one a token, see SpeculationStats.
        finish_reason: why the choice ended with this step; None while it goes on.
        counts: the choice's statistics so far, without ``depths``.
        tree: what the round verified; None where the token came from prefill.
        logprobs: one mapping a token, if asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    depths: tuple[int, ...]
    finish_reason: FinishReason | None
    counts: SpeculationStats
    tree: VerifiedTree | None
    logprobs: tuple[Logprobs, ...] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """The state of one request after a step; the last one has ``finished`` set.

    ``outputs``, ``speculation`` and ``prompt_logprobs`` are made when they are first looked at, and
    show the state after this step even then.

    Attributes:
        deltas: what this step added, one for each choice that it advanced.
        num_cached_tokens: tokens of the prompt that the prefix cache had for the first choice.
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]
    finished: bool
    deltas: tuple[Delta, ...]
    completions: Callable[[], tuple[CompletionOutput, ...]] = field(repr=False)
    statistics: Callable[[], SpeculationStats] = field(repr=False)
    prompt: Callable[[], PromptLogprobs | None] = field(repr=False)
    num_cached_tokens: int = 0

    @property
    def text_delta(self) -> str:
        """What this step added to the text of the first choice."""
        return "".join(delta.text for delta in self.deltas if delta.index == 0)

    @cached_property
    def outputs(self) -> tuple[CompletionOutput, ...]:
        """One for each choice."""
        return self.completions()

    @cached_property
    def speculation(self) -> SpeculationStats:
        """What speculation did for the request so far."""
        return self.statistics()

    @cached_property
    def prompt_logprobs(self) -> PromptLogprobs | None:
        """One mapping a prompt token, if asked for; None for the first, which nothing predicts."""
        return self.prompt()
