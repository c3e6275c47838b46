"""The verification rules by name. A rule decides how children are ranked and which are accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from aquiline.core.params import VerificationRule
from aquiline.speculation.verification.baselines import Independent, TargetOnly
from aquiline.speculation.verification.block import Block
from aquiline.speculation.verification.coupled import Coupled
from aquiline.speculation.verification.multi_round import MultiRound
from aquiline.speculation.verification.noise import RoundNoise
from aquiline.speculation.verification.verdict import Verdict


class Rule(Protocol):
    """One round of a batch under one rule; used once.

    Attributes:
        any_proposal: nodes may hold any tokens, if siblings differ; else those it proposed alone.
    """

    any_proposal: bool

    def propose(self, logits: Tensor, depth: int, count: int) -> Tensor:
        """Draft logits [B, E, Vd] of the expanded nodes, adjusted -> their children at ``depth``.

        Returns draft ids [B, E, count], distinct in a row, best first. Called once per depth, 1..D.
        """
        ...

    def accept(self, tokens: Tensor, logits: Tensor) -> Verdict:
        """Node tokens [B, N] and the target's logits [B, N, V] after each node, adjusted."""
        ...


RuleFactory = Callable[[RoundNoise], Rule]
RULES: Mapping[VerificationRule, RuleFactory] = MappingProxyType(
    {
        "coupled": Coupled,
        "multi-round": MultiRound,
        "target-only": TargetOnly,
        "independent": Independent,
        "block": Block,
    }
)
