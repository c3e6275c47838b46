"""What a user asks for: how to sample and how to speculate.

Both are frozen and validated on construction, so that no later code meets a bad value. A field is
honoured exactly or refused by name; none is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from aquiline.core.errors import AquilineError

VerificationRule = Literal["coupled", "multi-round"]
TreePath = tuple[int, ...]
MAX_SEED = 2**63 - 1


def _require(ok: bool, field: str, value: object, remedy: str) -> None:
    if not ok:
        raise AquilineError(f"{field}={value!r}: {remedy}")


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled.

    The target distribution of a token is softmax(logits / temperature), cut to the ``top_k``
    likeliest, then to the smallest set whose mass reaches ``top_p``, then to the tokens with at
    least ``min_p`` times the largest probability, and renormalised. Tokens tied with the last one
    kept are kept too.

    Attributes:
        max_tokens: tokens to generate at most; None means up to the context's end.
        temperature: 0 is greedy.
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
        _require(
            self.max_tokens is None or self.max_tokens >= 1,
            "max_tokens", self.max_tokens, "give at least 1",
        )  # fmt: skip
        finite = 0.0 <= self.temperature < float("inf")
        _require(finite, "temperature", self.temperature, "give 0 (greedy) or a positive number")
        _require(self.top_k >= 0, "top_k", self.top_k, "give 0 (all tokens) or a positive count")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "give a number in (0, 1]")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "give a number in [0, 1]")
        seed_ok = self.seed is None or 0 <= self.seed <= MAX_SEED
        _require(seed_ok, "seed", self.seed, f"give an integer from 0 to {MAX_SEED}")
        _require(all(self.stop), "stop", self.stop, "an empty stop string would end every text")


@dataclass(frozen=True)
class SpeculationParams:
    """How drafts are proposed and verified.

    Attributes:
        method: ``"eagle"``; the wiring (EAGLE-1) is read from the draft's own keys.
        num_speculative_tokens: length of a chain, the root not counted.
        model: folder of a draft; None takes the draft shipped for a built-in target.
        tree: instead of a chain, paths of child ranks (``[[0], [1], [0, 0]]``) or a pool name.
        verification: ``"coupled"`` or ``"multi-round"``.
    """

    method: Literal["eagle"] = "eagle"
    num_speculative_tokens: int | None = None
    model: str | None = None
    tree: str | tuple[TreePath, ...] | None = None
    verification: VerificationRule = "coupled"

    def __post_init__(self) -> None:
        _require(self.method == "eagle", "method", self.method, "the supported method is 'eagle'")
        rules = ("coupled", "multi-round")
        _require(self.verification in rules, "verification", self.verification, f"one of {rules}")
        length = self.num_speculative_tokens
        _require(
            length is None or 1 <= length <= 64,
            "num_speculative_tokens", length, "give a chain length from 1 to 64",
        )  # fmt: skip
        _require(
            length is None or self.tree is None,
            "tree", self.tree, "give either num_speculative_tokens (a chain) or tree, not both",
        )  # fmt: skip
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
