"""What a request's parameters mean for this model: checked against its vocabulary and context."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from aquiline.core.errors import AquilineError
from aquiline.core.params import SamplingParams
from aquiline.text.tokenizer import Tokenizer

MAX_END_TOKENS = 64  # that min_tokens can hold back


def end_tokens(params: SamplingParams, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end the text."""
    return frozenset(params.stop_token_ids) | frozenset(
        () if params.ignore_eos else tokenizer.eos_token_ids
    )


def admit(
    params: SamplingParams, tokenizer: Tokenizer, vocab: int, prompt: int, limit: int
) -> SamplingParams:
    """The parameters of a request, its bad words among its banned tokens.

    Args:
        prompt: tokens of the prompt.
        limit: tokens of prompt and text together.

    Raises AquilineError if a token lies outside the vocabulary, a bad word is more than one token,
    nothing is left to say, or the context ends before ``min_tokens``.
    """
    for name in ("logit_bias", "allowed_token_ids", "banned_token_ids", "stop_token_ids"):
        for token in getattr(params, name) or ():
            if token >= vocab:
                raise AquilineError(
                    f"{name}: token {token} is outside the vocabulary of {vocab}; leave it out"
                )
    if params.min_tokens > limit - prompt:
        raise AquilineError(
            f"min_tokens={params.min_tokens}: a prompt of {prompt} tokens leaves room for "
            f"{limit - prompt}; lower it or raise max_model_len"
        )
    banned = list(params.banned_token_ids)
    for word in params.bad_words:
        banned += _spellings(word, tokenizer, banned)
    params = replace(params, banned_token_ids=tuple(banned), bad_words=())
    early = end_tokens(params, tokenizer) if params.min_tokens else frozenset()
    if len(early) > MAX_END_TOKENS:
        raise AquilineError(
            f"stop_token_ids: {len(early)} tokens end the text, and min_tokens holds back at most "
            f"{MAX_END_TOKENS}; give fewer"
        )
    _require_something_to_say(params, early, vocab)
    return params


def _spellings(word: str, tokenizer: Tokenizer, banned: Collection[int]) -> list[int]:
    """The tokens that ``word`` and `` word`` are; a spelling that holds a banned one needs none."""
    found: list[int] = []
    for text in (word, f" {word}"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            found += ids
        elif not {*found, *banned} & set(ids):
            raise AquilineError(
                f"bad_words: {text!r} is {len(ids)} tokens to this model; only a word of one token "
                "can be banned"
            )
    return found


def _require_something_to_say(params: SamplingParams, early: Collection[int], vocab: int) -> None:
    silent = {*params.banned_token_ids, *early}
    allowed = params.allowed_token_ids
    left = vocab - len(silent) if allowed is None else len(set(allowed) - silent)
    if left == 0:
        name = "banned_token_ids" if allowed is None else "allowed_token_ids"
        raise AquilineError(
            f"{name}: no token is left to say beside those banned and, before min_tokens="
            f"{params.min_tokens}, those that end the text; leave one"
        )
