"""The bytes that each token stands for, whatever way the tokenizer spells them.

    byte-level       "Ġthe"    -> b" the"     every byte is a character of its own alphabet
    byte fallback    "▁the"    -> b" the"     and "<0x0A>" is the byte 10

What a grammar is matched against are the bytes of the text, so a token that leaves none in it (a
special one) has none here.
"""

from __future__ import annotations

import json
import re

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from aquiline.core.errors import CheckpointError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(backend: Tokenizer, size: int) -> list[bytes]:
    """The bytes of token ids 0 .. ``size`` - 1; empty for special and for unused ids.

    Raises:
        CheckpointError: a tokenizer that spells bytes in neither of the two ways.
    """
    decoder = json.loads(backend.to_str())["decoder"] or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
    if "ByteLevel" in kinds:
        table = _byte_level_alphabet()
    elif "ByteFallback" in kinds:
        table = None
    else:
        raise CheckpointError(
            f"tokenizer.json: the decoder {sorted(kinds)} is neither byte-level nor byte fallback; "
            "structured output needs one of the two"
        )
    added = backend.get_added_tokens_decoder()
    found = [b""] * size
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index in added:
            found[index] = b"" if added[index].special else token.encode()
        elif table is not None:
            found[index] = bytes(table[letter] for letter in token)
        elif byte := _BYTE.fullmatch(token):
            found[index] = bytes([int(byte[1], 16)])
        else:
            found[index] = token.replace("▁", " ").encode()
    return found


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each letter of the byte-level alphabet stands for.

    Printable Latin-1 bytes stand for themselves, the others, in order, for the letters from 256 on.
    """
    letters = ByteLevel.alphabet()
    plain = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    others = sorted(set(range(256)) - set(plain.values()))
    return plain | dict(zip(sorted(set(letters) - set(plain)), others, strict=True))
