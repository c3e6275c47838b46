"""Grammars: from what a user asks to an automaton over the tokens of one vocabulary.

Compiled once for each (grammar, vocabulary) and kept, the least recently used going first when the
cache is full. Compiling takes milliseconds, so a server does it in a thread beside the engine's.
xgrammar does the work and is needed only in this room.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from aquiline.core.errors import AquilineError
from aquiline.core.guided_params import StructuredOutput
from aquiline.guided.pattern import check_pattern
from aquiline.guided.schema import checked

Spell = Callable[[str], Sequence[int]]
CACHE_BYTES = 256 * 2**20
_THREADS = 4
# White space in a row: without a limit a small model may never stop writing it.
_JSON = {"strict_mode": False, "max_whitespace_cnt": 16}


def mask_words(vocab_size: int) -> int:
    """Words of 32 bits in the mask of one node."""
    return -(-vocab_size // 32)


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar; shared between requests.

    Attributes:
        compiled: xgrammar's own.
        vocab_size: of the model's logits.
        end_tokens: allowed where the text may end, and nowhere else.
        spell: a text's usual tokens.
    """

    compiled: Any
    vocab_size: int
    end_tokens: tuple[int, ...]
    spell: Spell

    @cached_property
    def end_mask(self) -> Tensor:
        """[words] int32: the end tokens and no other."""
        bits = torch.zeros(32 * mask_words(self.vocab_size), dtype=torch.int64)
        bits[list(self.end_tokens)] = 1
        return (bits.view(-1, 32) << torch.arange(32)).sum(dim=1).to(torch.int32)


class Grammars:
    """Compiles and keeps the grammars of one vocabulary."""

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        vocab_size: int,
        end_tokens: Sequence[int],
        spell: Spell,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """
        Args:
            token_bytes: what each token stands for; one without bytes is never allowed in a text.
            vocab_size: of the model's logits; ids beyond ``token_bytes`` are never allowed.
            end_tokens: the checkpoint's own; a text ends with one of them.
            spell: the tokenizer's; see Matcher.foreseen, which needs no more than a good guess.

        Raises:
            AquilineError: xgrammar is not installed, or a text could never end.
        """
        if not end_tokens:
            raise AquilineError(
                "eos_token_id: the checkpoint names no end token, so a text of a given form could "
                "not end; add it to generation_config.json"
            )
        self._xgrammar = _import_xgrammar()
        self._vocab_size, self._end_tokens, self._spell = vocab_size, tuple(end_tokens), spell
        # Padded to whole words, or the last one's bits beyond the vocabulary could be set.
        bits = 32 * mask_words(vocab_size)
        tokens = [*token_bytes[:vocab_size], *[b""] * (bits - min(len(token_bytes), vocab_size))]
        self._compiler = self._xgrammar.GrammarCompiler(
            self._xgrammar.TokenizerInfo(tokens, vocab_size=bits, stop_token_ids=list(end_tokens)),
            max_threads=_THREADS,
            cache_enabled=False,  # xgrammar's own (0.2.8) fails on repetitions beyond 128
        )
        self._cache: OrderedDict[StructuredOutput, Future[Grammar]] = OrderedDict()
        self._cache_bytes, self._lock = cache_bytes, Lock()

    def compile(self, wanted: StructuredOutput) -> Grammar:
        """The grammar of a form, from the cache if it is there. Threads may call it.

        Raises:
            AquilineError: names the field, the place in it and the remedy.
        """
        with self._lock:
            future = self._cache.get(wanted)
            if found := future is not None:
                self._cache.move_to_end(wanted)
            else:
                future = self._cache[wanted] = Future()
        if not found:
            try:
                future.set_result(self._compile(wanted))
                self._trim()
            except BaseException as error:
                with self._lock:
                    self._cache.pop(wanted, None)
                future.set_exception(error)
        return future.result()

    def _trim(self) -> None:
        """Forget the oldest while all together are too large; the newest stays."""
        with self._lock:
            sizes = {
                key: future.result().compiled.memory_size_bytes
                for key, future in self._cache.items()
                if future.done()
            }
            while len(sizes) > 1 and sum(sizes.values()) > self._cache_bytes:
                oldest = next(iter(sizes))
                del self._cache[oldest], sizes[oldest]

    def _compile(self, wanted: StructuredOutput) -> Grammar:
        compiled = self._json(wanted.json) if wanted.json is not None else self._plain(wanted)
        grammar = Grammar(compiled, self._vocab_size, self._end_tokens, self._spell)
        mask = torch.zeros(1, mask_words(self._vocab_size), dtype=torch.int32)
        self._xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(mask)
        if not mask.any():
            raise AquilineError(
                f"{wanted.field}: no text of this vocabulary has this form; widen it"
            )
        return grammar

    def _plain(self, wanted: StructuredOutput) -> Any:
        compiler = self._compiler
        try:
            if wanted.regex is not None:
                check_pattern(wanted.regex, "regex")
                return compiler.compile_regex(wanted.regex)
            if wanted.choice is not None:
                texts = (json.dumps(text, ensure_ascii=False) for text in wanted.choice)
                return compiler.compile_grammar(f"root ::= {' | '.join(texts)}")
            if wanted.grammar is not None:
                return compiler.compile_grammar(wanted.grammar)
            return compiler.compile_json_schema('{"type": "object"}', **_JSON)
        except (RuntimeError, UnicodeError) as error:
            raise AquilineError(f"{wanted.field}: {_reason(error)}; correct it there") from None

    def _json(self, text: Any) -> Any:
        schema, parts = checked(json.loads(text))
        try:
            return self._compiler.compile_json_schema(json.dumps(schema), **_JSON)
        except RuntimeError as error:
            where, reason = "#", _reason(error)
        for part in reversed(parts):  # inner parts first: the innermost that fails is at fault
            if "~" not in part:
                try:
                    inner = json.dumps({**schema, "$ref": part})
                    self._xgrammar.Grammar.from_json_schema(inner, **_JSON)
                except RuntimeError as error:
                    where, reason = part, _reason(error)
                    break
        raise AquilineError(f"json: {where}: {reason}; correct it there") from None


def _reason(error: Exception) -> str:
    """The last line of xgrammar's message, without its clock and source line."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", line).rstrip(" .;")


def xgrammar_installed() -> bool:
    """Whether texts can be given a form here; nothing is imported."""
    return find_spec("xgrammar") is not None


def _import_xgrammar() -> Any:
    try:
        import xgrammar
    except ImportError:
        raise AquilineError(
            "structured output: xgrammar is not installed; pip install 'aquiline[guided]'"
        ) from None
    return xgrammar
