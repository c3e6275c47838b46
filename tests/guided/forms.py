"""A vocabulary of bytes and a few words, and texts that a grammar allows, at random."""

from __future__ import annotations

import random
from typing import Any

import torch

from aquiline.core.guided_params import StructuredOutput
from aquiline.guided.grammar import Grammar, Grammars, mask_words
from aquiline.guided.matcher import Matcher
from aquiline.speculation.tree import TreeShape

WORDS = [b'{"', b'":', b'": ', b'"}', b'", "', b"name", b"na", b"true", b"10", b"\xc3\xa9", b"  "]
TOKENS = [*(bytes([i]) for i in range(256)), *WORDS, b"", b""]
END, SPECIAL = len(TOKENS) - 2, len(TOKENS) - 1
VOCAB = 280  # padded beyond the tokenizer's, as in real checkpoints
ROOT = TreeShape.chain(0)
_CLOSING = [*map(ord, '"}],'), END]


def grammars(**options: Any) -> Grammars:
    return Grammars(TOKENS, VOCAB, [END], tokens_of, **options)


def compiled(**form: Any) -> Grammar:
    return grammars().compile(StructuredOutput(**form))


def tokens_of(text: str) -> list[int]:
    """One token a byte."""
    return list(text.encode())


def allowed(mask: torch.Tensor) -> set[int]:
    """The tokens of a mask [words]."""
    bits = (mask[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
    return set(bits.flatten().nonzero()[:, 0].tolist())


def next_tokens(matcher: Matcher) -> set[int]:
    rows = torch.empty(1, mask_words(VOCAB), dtype=torch.int32)
    matcher.fill(ROOT, torch.zeros(1, dtype=torch.int64), rows)
    return allowed(rows[0])


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether a whole text has the form, byte by byte."""
    matcher = Matcher(grammar)
    for token in [*tokens_of(text), END]:
        if token not in next_tokens(matcher):
            return False
        matcher.advance([token])
    return matcher.finished


def random_text(grammar: Grammar, chance: random.Random, limit: int = 400) -> str | None:
    """A text of random allowed tokens, which likes to close what is open; None if it is cut."""
    matcher, text = Matcher(grammar), b""
    for _ in range(limit):
        choices = next_tokens(matcher)
        closing = [token for token in _CLOSING if token in choices]
        pool = closing if closing and chance.random() < 0.4 else sorted(choices)
        token = chance.choice(pool)
        matcher.advance([token])
        if matcher.finished:
            return text.decode(errors="replace")
        text += TOKENS[token]
    return None
