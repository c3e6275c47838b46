"""What a request's parameters mean for this model: its tokenizer, its vocabulary, its context."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from aquiline.core.errors import AquilineError
from aquiline.core.params import SamplingParams
from aquiline.sampling.adjust import check
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
    banned = list(params.banned_token_ids)
    for word in params.bad_words:
        banned += _spellings(word, tokenizer, banned)
    params = replace(params, banned_token_ids=tuple(banned), bad_words=())
    check(params, end_tokens(params, tokenizer), vocab)
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
