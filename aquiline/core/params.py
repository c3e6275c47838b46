"""What a user asks for: how to sample and how to speculate.

Both are frozen and validated on construction, so that no later code meets a bad value. A field is
honoured exactly or refused by name; none is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from aquiline.core.errors import AquilineError
from aquiline.core.guided_params import StructuredOutput

VerificationRule = Literal["coupled", "multi-round", "target-only", "independent", "block"]
# Rules that follow the child equal to the token drawn, whoever proposed it.
MATCHING_RULES: tuple[VerificationRule, ...] = ("coupled", "target-only", "independent")
DraftMethod = Literal["eagle", "eagle3"]
TreePath = tuple[int, ...]
MAX_SEED = 2**63 - 1
MAX_CHAIN = 64  # draft tokens of a chain
MAX_LOGPROBS = 20  # alternatives shown beside a token
MAX_BIASED = 1024  # entries of logit_bias
MAX_CHOICES = 128
MAX_TEMPERATURE = 1e6
MAX_SHOWN = 200  # characters of a refused value
AUTO_TREE = "auto"
# What would leave nothing to say where the form asks for a token, or go on after the form's end.
AGAINST_A_FORM = ("min_tokens", "ignore_eos", "allowed_token_ids", "banned_token_ids", "bad_words")


def _require(ok: bool, field: str, value: object, remedy: str) -> None:
    if not ok:
        shown = repr(value)
        shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
        raise AquilineError(f"{field}={shown}: {remedy}")


def _integer(value: object, low: int, high: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object) -> float:
    """The value if it is a number, else NaN, which no range admits."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan  # type: ignore[arg-type]


def _tuple(name: str, value: object, remedy: str) -> tuple[Any, ...]:
    """A sequence as a tuple; a lone string is one element."""
    if isinstance(value, str):
        return (value,)
    _require(isinstance(value, Iterable), name, value, remedy)
    return tuple(value)  # type: ignore[arg-type]


def _tokens(value: tuple[object, ...]) -> bool:
    return all(_integer(token, 0, math.inf) for token in value)


def _texts(value: tuple[object, ...]) -> bool:
    return all(isinstance(text, str) and text != "" for text in value)


def _bias(value: object) -> bool:
    return value is None or (
        isinstance(value, Mapping)
        and len(value) <= MAX_BIASED
        and _tokens(tuple(value))
        and all(-100 <= _number(bias) <= 100 for bias in value.values())
    )


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled.

    The raw logits of a token are adjusted in this order: repetition, presence and frequency
    penalty; logit_bias; bans (allowed and banned tokens, end tokens before ``min_tokens``). The
    target distribution is softmax(adjusted / temperature), cut to the ``top_k`` likeliest, then to
    the smallest set whose mass reaches ``top_p``, then to the tokens with at least ``min_p`` times
    the largest probability, and renormalised. Tokens tied with the last one kept are kept too.

    Attributes:
        n: texts for the prompt; each has noise of its own, so at temperature 0 they are equal.
        max_tokens: tokens to generate at most; None means up to the context's end.
        min_tokens: tokens to generate before anything may end the text: what would end it (with
            ``ignore_eos`` the ``stop_token_ids`` alone) is banned, a stop string completed so early
            is text like any other.
        temperature: 0 is greedy; a positive one below 1e-6 acts as 1e-6.
        top_k: 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.
        min_p: in [0, 1]; 0 keeps all.
        presence_penalty: in [-2, 2]; taken from the logit of a token that the output holds.
        frequency_penalty: in [-2, 2]; taken as often as the output holds the token.
        repetition_penalty: for tokens in prompt or output a positive logit is divided by it, a
            negative one multiplied; 1 changes nothing.
        logit_bias: token id -> a number in [-100, 100], added to its logit.
        allowed_token_ids: no other token is said; None allows all.
        banned_token_ids: tokens that are never said.
        bad_words: words that are never said, with or without a space before them; only those that
            the tokenizer spells with one token.
        seed: the text is a function of (target, prompt, seed, choice); None draws one per request.
        stop: strings that end the text; the match itself is not returned.
        stop_token_ids: tokens that end the text, beside the checkpoint's own end tokens.
        ignore_eos: go on after the checkpoint's end tokens.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: report every token's log-probability under the raw logits, and of so many of the
            likeliest tokens (0 to 20); None reports nothing.
        prompt_logprobs: the same of the prompt's tokens, the first one aside.
        structured_outputs: the form of the whole text, or a mapping of its fields: tokens that
            break it are banned, and an end token where it is not complete. A stop string or
            ``max_tokens`` may still cut the text short; what else says which tokens may come, or
            that none may end the text, is refused beside it.
        speculation: False has the engine decode without speculation while this request runs.
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
    n: int = 1
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    banned_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutput | Mapping[str, Any] | None = None
    speculation: bool = True

    def __post_init__(self) -> None:
        ids, texts = "give token ids, integers from 0", "give strings that are not empty"
        for name, remedy in (
            ("stop", texts), ("bad_words", texts), ("stop_token_ids", ids),
            ("banned_token_ids", ids), ("allowed_token_ids", ids),
        ):  # fmt: skip
            if getattr(self, name) is not None or name != "allowed_token_ids":
                object.__setattr__(self, name, _tuple(name, getattr(self, name), remedy))
        limit, seed, infinity = self.max_tokens, self.seed, math.inf
        allowed = self.allowed_token_ids
        penalty, tops = "give a number in [-2, 2]; 0 is none", f"give None or 0 to {MAX_LOGPROBS}"
        checks = {
            "n": (_integer(self.n, 1, MAX_CHOICES), f"give 1 to {MAX_CHOICES}"),
            "max_tokens": (limit is None or _integer(limit, 1, infinity), "give at least 1"),
            "min_tokens": (_integer(self.min_tokens, 0, infinity), "give 0 or a count"),
            "temperature": (
                0 <= _number(self.temperature) <= MAX_TEMPERATURE,
                f"give 0 (greedy) or a positive number up to {MAX_TEMPERATURE:g}",
            ),
            "top_k": (_integer(self.top_k, 0, infinity), "give 0 (all tokens) or a count"),
            "top_p": (0 < _number(self.top_p) <= 1, "give a number in (0, 1]"),
            "min_p": (0 <= _number(self.min_p) <= 1, "give a number in [0, 1]"),
            "presence_penalty": (-2 <= _number(self.presence_penalty) <= 2, penalty),
            "frequency_penalty": (-2 <= _number(self.frequency_penalty) <= 2, penalty),
            "repetition_penalty": (
                0.01 <= _number(self.repetition_penalty) <= 100,
                "give a number in [0.01, 100]; 1 is none",
            ),
            "logit_bias": (
                _bias(self.logit_bias),
                f"give at most {MAX_BIASED} token ids with numbers in [-100, 100]",
            ),
            "seed": (
                seed is None or _integer(seed, 0, MAX_SEED), f"give an integer from 0 to {MAX_SEED}"
            ),
            "stop": (_texts(self.stop), texts),
            "bad_words": (_texts(self.bad_words), texts),
            "stop_token_ids": (_tokens(self.stop_token_ids), ids),
            "banned_token_ids": (_tokens(self.banned_token_ids), ids),
            "allowed_token_ids": (
                allowed is None or (bool(allowed) and _tokens(allowed)),
                "give one token id at least, or None for all",
            ),
            "logprobs": (self.logprobs is None or _integer(self.logprobs, 0, MAX_LOGPROBS), tops),
            "prompt_logprobs": (
                self.prompt_logprobs is None or _integer(self.prompt_logprobs, 0, MAX_LOGPROBS),
                tops,
            ),
            "ignore_eos": (isinstance(self.ignore_eos, bool), "give True or False"),
            "skip_special_tokens": (
                isinstance(self.skip_special_tokens, bool), "give True or False"
            ),
            "speculation": (isinstance(self.speculation, bool), "give True or False"),
        }  # fmt: skip
        for name, (ok, remedy) in checks.items():
            _require(ok, name, getattr(self, name), remedy)
        _require(
            limit is None or self.min_tokens <= limit,
            "min_tokens", self.min_tokens, f"lower it to max_tokens={limit}, or raise that",
        )  # fmt: skip
        _require(
            allowed is None or not set(allowed) <= set(self.banned_token_ids),
            "allowed_token_ids", allowed, "banned_token_ids holds them all; leave one to be said",
        )  # fmt: skip
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        if self.structured_outputs is not None:
            form = StructuredOutput.of(self.structured_outputs)
            object.__setattr__(self, "structured_outputs", form)
            for name in AGAINST_A_FORM:
                value, remedy = getattr(self, name), "structured_outputs says it; give one of them"
                _require(value in (None, 0, ()), name, value, remedy)


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
        verification: ``"coupled"`` or ``"multi-round"``; to compare with, ``"target-only"``,
            ``"independent"`` and, on chains, ``"block"``.
        retrieval: nodes beside the drafted ones that continue the last place where the request's
            own text, prompt included, said what it says now; 0 is none. Not for ``"multi-round"``
            and ``"block"``, whose children must be draws from the draft.
    """

    method: DraftMethod = "eagle"
    num_speculative_tokens: int | None = None
    model: str | None = None
    tree: str | tuple[TreePath, ...] | None = None
    verification: VerificationRule = "coupled"
    dispatch_table: str | None = None
    retrieval: int = 0

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
        _require(
            self.verification != "block" or _is_chain(self.tree),
            "tree", self.tree, "verification='block' judges chains; give num_speculative_tokens",
        )  # fmt: skip
        nodes = self.retrieval
        ok = _integer(nodes, 0, MAX_CHAIN)
        _require(ok, "retrieval", nodes, f"give 0 (none) to {MAX_CHAIN} nodes")
        _require(
            nodes == 0 or self.verification in MATCHING_RULES,
            "retrieval", nodes,
            f"verification={self.verification!r} takes drawn children alone; give 'coupled', or 0",
        )  # fmt: skip

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


def _is_chain(tree: str | tuple[TreePath, ...] | None) -> bool:
    if tree is None or isinstance(tree, str):
        return tree is None or tree.startswith("chain-")
    return not any(map(any, tree))


def _tree_paths(tree: Sequence[Sequence[int]]) -> tuple[TreePath, ...]:
    try:
        return tuple(tuple(int(rank) for rank in path) for path in tree)
    except (TypeError, ValueError):
        raise AquilineError(
            f"tree={tree!r}: give paths of child ranks such as [[0], [1], [0, 0]], or a pool name"
        ) from None
