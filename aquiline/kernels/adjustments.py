"""AdjustmentTable: what changes the logits of a request before it is sampled, one row a request.

The raw logits of the token to come are adjusted in this order: repetition, presence and frequency
penalty, bias, bans, and what the form of the text allows, masks that come with the logits. Rows are
found through a ``slots`` column that batches carry, so that captured graphs of every batch size
share one table. A row's flags say which of its other columns count.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntFlag
from typing import NamedTuple, Self

import torch
from torch import Tensor

MAX_BIASED = 1024  # entries of a row; these two are powers of two: rows are searched by halving
MAX_ENDS = 64
UNUSED = 2**31 - 1  # in place of a token id: sorts behind all of them
MAX_COUNT = 2**15 - 1  # counts stay there
TOP_LOGPROBS = 20
LOGPROB_COLUMNS = 2 + 2 * TOP_LOGPROBS


class Flag(IntFlag):
    """What a row asks for."""

    PENALTIES = 1
    BIAS = 2
    BANS = 4
    MIN_TOKENS = 8
    LOGPROBS = 16
    FORM = 32


ADJUSTING = Flag.PENALTIES | Flag.BIAS | Flag.BANS | Flag.MIN_TOKENS | Flag.FORM


class History(NamedTuple):
    """The path of each row of logits, so far as it lies in the tree.

    Attributes:
        tokens: [B, M] of the first nodes of a tree, the root first. The root itself has been
            counted, or is the prompt's.
        ancestors: [N, N] bool, row i True at i and at every ancestor of i; an ancestor comes first.
        nodes: [E] which node each row of logits is; None: row i is node i.
    """

    tokens: Tensor
    ancestors: Tensor
    nodes: Tensor | None


@dataclass(frozen=True)
class AdjustmentTable:
    """R rows over a vocabulary of V tokens; bit t % 32 of word t // 32 stands for token t.

    Attributes:
        flags: [R] int32, see Flag; a row without flags is adjusted in nothing.
        repetition, presence, frequency: [R] fp32 penalties.
        prompt_seen: [R, ceil(V / 32)] int32, set for tokens of the prompt.
        counts: [R, V] int16, how often the output holds a token; at most MAX_COUNT.
        bias_ids, bias_values: [R, K] int32, ascending, then UNUSED; fp32.
        allowed: [R, ceil(V / 32)] int32, clear for tokens that are never said.
        end_ids: [R, E] int32, ascending, then UNUSED: banned before position ``min_length`` [R].
    """

    flags: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    prompt_seen: Tensor
    counts: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    allowed: Tensor
    end_ids: Tensor
    min_length: Tensor

    @classmethod
    def empty(
        cls,
        rows: int,
        vocab: int,
        device: torch.device,
        biased: int = MAX_BIASED,
        ends: int = MAX_ENDS,
    ) -> Self:
        """``rows`` rows without flags, with room for ``biased`` entries and ``ends`` end tokens."""
        words = -(-vocab // 32)

        def full(value: float, dtype: torch.dtype, *width: int) -> Tensor:
            return torch.full((rows, *width), value, dtype=dtype, device=device)

        return cls(
            full(0, torch.int32), full(1, torch.float32), full(0, torch.float32),
            full(0, torch.float32), full(0, torch.int32, words), full(0, torch.int16, vocab),
            full(UNUSED, torch.int32, biased), full(0, torch.float32, biased),
            full(-1, torch.int32, words), full(UNUSED, torch.int32, ends), full(0, torch.int64),
        )  # fmt: skip

    def select(self, rows: Tensor) -> Self:
        """The given rows, copied."""
        return type(self)(*(getattr(self, f.name)[rows] for f in fields(self)))

    @property
    def vocab(self) -> int:
        return self.counts.shape[1]
