"""The bytes of the tokens of a text, put together, are the bytes of the text."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from aquiline.core.errors import CheckpointError
from aquiline.models.registry import resolve
from aquiline.text.token_bytes import token_bytes
from aquiline.text.tokenizer import load_tokenizer
from tests.tiny_checkpoint import SPECIALS, write_tokenizer

TEXT = 'Hé 😀\n\t{"a":  1}\x00\x7f\u3000'


def joined(found: list[bytes], ids: list[int]) -> bytes:
    return b"".join(found[index] for index in ids)


def test_byte_level(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    found = tokenizer.token_bytes()
    assert sorted(found[:256]) == [bytes([byte]) for byte in range(256)]
    assert found[256:] == [b""] * len(SPECIALS)
    assert joined(found, tokenizer.encode(TEXT + SPECIALS[0])) == TEXT.encode()


def test_a_tokenizer_born_of_a_gguf_file():
    tokenizer = load_tokenizer(resolve("smollm2-135m-instruct"))
    found = tokenizer.token_bytes()
    assert len(found) == tokenizer.vocab_size
    assert joined(found, tokenizer.encode(TEXT + "<|im_end|>")) == TEXT.encode()
    assert all(found[token] == b"" for token in tokenizer.special_token_ids)


def test_byte_fallback():
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁the", "é"]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
    ])  # fmt: skip
    backend.add_tokens([AddedToken("<tool>", special=False), AddedToken("</s>", special=True)])
    found = token_bytes(backend, 262)
    assert found[:256] == [bytes([byte]) for byte in range(256)]
    assert found[256:] == [b" the", "é".encode(), b"<tool>", b"", b"", b""]


def test_another_spelling_is_refused():
    backend = Tokenizer(models.WordLevel({"a": 0}, "a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(CheckpointError, match="neither byte-level nor byte fallback"):
        token_bytes(backend, 1)
