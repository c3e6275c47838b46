"""TokenScores: log-probabilities as the device reports them, until somebody looks at them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from aquiline.core.outputs import Logprob, Logprobs
from aquiline.kernels.ops import TOP_LOGPROBS
from aquiline.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenScores:
    """One token at one position, under the raw logits.

    Attributes:
        top: the likeliest tokens and their log-probabilities, best first.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, token: int, columns: list[float], count: int) -> TokenScores:
        """From a row of ops.token_logprobs, with the ``count`` likeliest."""
        logprob, rank, *best = columns
        values, ids = best[:count], map(int, best[TOP_LOGPROBS:][:count])
        top = tuple((one, value) for one, value in zip(ids, values, strict=True) if one >= 0)
        return cls(token, logprob, int(rank), top)

    def shown(self, tokenizer: Tokenizer) -> Logprobs:
        """By token id: the token itself, then the likeliest."""
        ranked = [(self.token, self.logprob, self.rank)]
        ranked += [(token, value, rank) for rank, (token, value) in enumerate(self.top, 1)]
        found: Logprobs = {}
        for token, value, rank in ranked:
            if token not in found:
                found[token] = Logprob(value, rank, tokenizer.decode([token], False))
        return found


def shown(scores: Iterable[TokenScores], tokenizer: Tokenizer) -> tuple[Logprobs, ...]:
    """One mapping a token."""
    return tuple(score.shown(tokenizer) for score in scores)
