"""A byte-level BPE tokenizer from the metadata of a GGUF file.

GGUF keeps the vocabulary, the merges and the *name* of the splitting rule; the rules themselves are
here, as the original ``tokenizer.json`` files spell them. A name that is not here is refused: a
near miss would tokenise most text right and some text wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from aquiline.core.errors import CheckpointError
from aquiline.core.gguf_cursor import GgufCursor

_CONTROL, _USER_DEFINED = 3, 4
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _smollm() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def _split_by(digits: str) -> PreTokenizer:
    words = Split(Regex(_WORDS.format(digits=digits)), behavior="isolated")
    return Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])


@dataclass(frozen=True)
class _Rule:
    """What a pre-tokenizer name implies beside the vocabulary."""

    split: Callable[[], PreTokenizer]
    adds_bos: bool = False
    whole_words_first: bool = False
    nfc: bool = False


_RULES = {
    "smollm": _Rule(_smollm),
    "llama-bpe": _Rule(lambda: _split_by(r"\p{N}{1,3}"), adds_bos=True, whole_words_first=True),
    "qwen2": _Rule(lambda: _split_by(r"\p{N}"), nfc=True),
}


@dataclass(frozen=True)
class GgufTokenizer:
    """``fast`` with its chat template set, and the ids that end a turn or a text."""

    fast: PreTrainedTokenizerFast
    eos_token_ids: tuple[int, ...]


def load_gguf_tokenizer(path: Path) -> GgufTokenizer:
    """The tokenizer inside a GGUF file.

    Raises:
        CheckpointError: a truncated file, no tokenizer in it, or a splitting rule not known here.
    """
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            fields = GgufCursor(data).metadata()[1]
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise CheckpointError(
            f"{path}: not a complete GGUF file ({error}); download it again"
        ) from None
    try:
        return tokenizer_of(fields)
    except KeyError as error:
        raise CheckpointError(
            f"{path}: {error.args[0]} is missing; give a GGUF file with its tokenizer"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # tokenizers raises bare ones when vocabulary and merges disagree
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: the tokenizer cannot be built ({reason}); download it again"
        ) from None


def tokenizer_of(fields: Mapping[str, Any]) -> GgufTokenizer:
    """The tokenizer that GGUF metadata describes; raises KeyError, CheckpointError."""
    start = "tokenizer.ggml."
    own = {key.removeprefix(start): v for key, v in fields.items() if key.startswith(start)}
    rule = _rule(own["model"], own.get("pre"))
    tokens, kinds = own["tokens"], own["token_type"]
    bpe = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in own["merges"]],
            ignore_merges=rule.whole_words_first,
        )
    )
    bpe.pre_tokenizer = rule.split()
    bpe.decoder = decoders.ByteLevel()
    if rule.nfc:
        bpe.normalizer = normalizers.NFC()
    bpe.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    bos, eos, eot = (own.get(f"{name}_token_id") for name in ("bos", "eos", "eot"))
    if bos is not None and own.get("add_bos_token", rule.adds_bos):
        bpe.post_processor = TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=None if bos is None else tokens[bos],
        eos_token=None if eos is None else tokens[eos],
        chat_template=fields.get("tokenizer.chat_template"),
    )
    return GgufTokenizer(fast, tuple(i for i in (eos, eot) if i is not None))


def _rule(model: str, pre: str | None) -> _Rule:
    if model != "gpt2":
        raise CheckpointError(f"tokenizer.ggml.model={model!r}: only byte-level BPE (gpt2) works")
    if pre not in _RULES:
        raise CheckpointError(
            f"tokenizer.ggml.pre={pre!r}: known are {sorted(_RULES)}; give the Hugging Face folder"
        )
    return _RULES[pre]
