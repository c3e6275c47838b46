"""What a user asks for: how to sample and how to speculate.

Both are frozen and validated on construction, so that no later code meets a bad value. A field is
honoured exactly or refused by name; none is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from aquiline.core.errors import AquilineError

VerificationRule = Literal["coupled", "multi-round"]
DraftMethod = Literal["eagle", "eagle3"]
TreePath = tuple[int, ...]
MAX_SEED = 2**63 - 1
MAX_CHAIN = 64  # draft tokens of a chain
AUTO_TREE = "auto"


def _require(ok: bool, field: str, value: object, remedy: str) -> None:
    if not ok:
        raise AquilineError(f"{field}={value!r}: {remedy}")


def _integer(value: object, low: int, high: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object) -> float:
    """The value if it is a number, else NaN, which no range admits."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan  # type: ignore[arg-type]


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled.

    The target distribution of a token is softmax(logits / temperature), cut to the ``top_k``
    likeliest, then to the smallest set whose mass reaches ``top_p``, then to the tokens with at
    least ``min_p`` times the largest probability, and renormalised. Tokens tied with the last one
    kept are kept too.

    Attributes:
        max_tokens: tokens to generate at most; None means up to the context's end.
        temperature: 0 is greedy; a positive one below 1e-6 acts as 1e-6.
        top_k: 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.
        min_p: in [0, 1]; 0 keeps all.
        seed: the text is a function of (target, prompt, seed); None draws one per request.
        stop: strings that end the text; the match itself is not returned.
        stop_token_ids: tokens that end the text, beside the checkpoint's own end tokens.
        ignore_eos: go on after the checkpoint's end tokens.
        skip_special_tokens: leave special tokens out of the text.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop: object = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        limit, seed, infinity = self.max_tokens, self.seed, math.inf
        checks = {
            "max_tokens": (limit is None or _integer(limit, 1, infinity), "give at least 1"),
            "temperature": (
                0 <= _number(self.temperature) < infinity, "give 0 (greedy) or a positive number"
            ),
            "top_k": (_integer(self.top_k, 0, infinity), "give 0 (all tokens) or a count"),
            "top_p": (0 < _number(self.top_p) <= 1, "give a number in (0, 1]"),
            "min_p": (0 <= _number(self.min_p) <= 1, "give a number in [0, 1]"),
            "seed": (
                seed is None or _integer(seed, 0, MAX_SEED), f"give an integer from 0 to {MAX_SEED}"
            ),
            "stop": (
                all(isinstance(text, str) and text for text in self.stop),
                "give strings that are not empty",
            ),
            "stop_token_ids": (
                all(_integer(token, 0, infinity) for token in self.stop_token_ids),
                "give token ids, integers from 0",
            ),
        }  # fmt: skip
        for field, (ok, remedy) in checks.items():
            _require(ok, field, getattr(self, field), remedy)


@dataclass(frozen=True)
class SpeculationParams:
    """How drafts are proposed and verified.

    Attributes:
        method: ``"eagle"`` (EAGLE-1) or ``"eagle3"``; the draft's own keys must agree.
        num_speculative_tokens: length of a chain, the root not counted.
        model: folder of a draft; None takes the draft shipped for a built-in target.
        tree: instead of a chain, paths of child ranks (``[[0], [1], [0, 0]]``) or a pool name, or
            ``"auto"``: the dispatcher picks one for every round. It is a value of ``tree`` and not
            a field beside it, since it answers the same question: no two answers can be given.
        dispatch_table: file of ``aquiline tune`` for ``tree="auto"``; None is a rule by batch size.
        verification: ``"coupled"`` or ``"multi-round"``.
    """

    method: DraftMethod = "eagle"
    num_speculative_tokens: int | None = None
    model: str | None = None
    tree: str | tuple[TreePath, ...] | None = None
    verification: VerificationRule = "coupled"
    dispatch_table: str | None = None

    def __post_init__(self) -> None:
        methods = get_args(DraftMethod)
        _require(self.method in methods, "method", self.method, f"one of {methods}")
        rules = get_args(VerificationRule)
        _require(self.verification in rules, "verification", self.verification, f"one of {rules}")
        length = self.num_speculative_tokens
        ok = length is None or _integer(length, 1, MAX_CHAIN)
        _require(ok, "num_speculative_tokens", length, f"give a chain length from 1 to {MAX_CHAIN}")
        ok = self.model is None or isinstance(self.model, str)
        _require(ok, "model", self.model, "give the draft's folder as a string")
        _require(
            length is None or self.tree is None,
            "tree", self.tree, "give either num_speculative_tokens (a chain) or tree, not both",
        )  # fmt: skip
        table = self.dispatch_table
        ok = table is None or (isinstance(table, str) and bool(table))
        _require(ok, "dispatch_table", table, "give the file that aquiline tune wrote")
        ok = table is None or self.tree == AUTO_TREE
        _require(
            ok, "dispatch_table", table, "it goes with tree='auto'; give that, or leave it out"
        )
        if self.tree is not None and not isinstance(self.tree, str):
            object.__setattr__(self, "tree", _tree_paths(self.tree))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SpeculationParams:
        """From a ``speculative_config`` mapping; an unknown key is refused by name."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(config) - known)
        if unknown:
            raise AquilineError(
                f"speculative_config: unknown field {unknown[0]!r}; known are {sorted(known)}"
            )
        return cls(**config)


def _tree_paths(tree: Sequence[Sequence[int]]) -> tuple[TreePath, ...]:
    try:
        return tuple(tuple(int(rank) for rank in path) for path in tree)
    except (TypeError, ValueError):
        raise AquilineError(
            f"tree={tree!r}: give paths of child ranks such as [[0], [1], [0, 0]], or a pool name"
        ) from None
