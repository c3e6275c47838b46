"""What a request's parameters mean for this model: its tokenizer, its vocabulary, its context."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from aquiline.core.errors import AquilineError
from aquiline.core.params import SamplingParams
from aquiline.kernels.ops import MAX_ENDS
from aquiline.text.tokenizer import Tokenizer


def end_tokens(params: SamplingParams, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end the text."""
    own = () if params.ignore_eos else tokenizer.eos_token_ids
    return frozenset((*params.stop_token_ids, *own))


def admit(params: SamplingParams, tokenizer: Tokenizer, vocab: int, room: int) -> SamplingParams:
    """The parameters of a request with ``room`` tokens left in the context; its bad words have
    become banned tokens.

    Raises AquilineError if they cannot be honoured; names the field and the remedy.
    """
    if params.min_tokens > room:
        raise AquilineError(
            f"min_tokens={params.min_tokens}: the prompt leaves room for {room}; lower it or raise "
            "max_model_len"
        )
    for name in ("logit_bias", "allowed_token_ids", "banned_token_ids", "stop_token_ids"):
        beyond = max(getattr(params, name) or (0,))
        if beyond >= vocab:
            raise AquilineError(f"{name}: token {beyond} is outside the vocabulary of {vocab}")
    banned = list(params.banned_token_ids)
    for word in params.bad_words:
        banned += _spellings(word, tokenizer, banned)
    top_k = params.top_k if params.top_k < vocab else 0  # all of them
    params = replace(params, banned_token_ids=tuple(banned), bad_words=(), top_k=top_k)
    ends = end_tokens(params, tokenizer) if params.min_tokens else frozenset()
    if len(ends) > MAX_ENDS:
        raise AquilineError(
            f"stop_token_ids: {len(ends)} tokens end the text, and min_tokens holds back at most "
            f"{MAX_ENDS}; give fewer"
        )
    _require_something_to_say(params, ends, vocab)
    return params


def _spellings(word: str, tokenizer: Tokenizer, banned: Collection[int]) -> list[int]:
    """The tokens that are ``word``, with or without a space before it; a spelling of several tokens
    will do if one of them is banned already."""
    found: list[int] = []
    for text in (word, f" {word}"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            found += ids
        elif not {*found, *banned} & set(ids):
            raise AquilineError(
                f"bad_words: {text!r} is {len(ids)} tokens to this model; give words of one token"
            )
    return found


def _require_something_to_say(params: SamplingParams, ends: Collection[int], vocab: int) -> None:
    """``ends`` cannot be said before ``min_tokens``."""
    silent = {*params.banned_token_ids, *ends}
    allowed = params.allowed_token_ids
    if allowed is None:
        name, left = "banned_token_ids", vocab - len(silent)
    else:
        name, left = "allowed_token_ids", len(set(allowed) - silent)
    if not left:
        raise AquilineError(
            f"{name}: no token is left to say, those banned aside and, before min_tokens="
            f"{params.min_tokens}, those that end the text; leave one"
        )
