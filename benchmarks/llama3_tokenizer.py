"""The Llama-3 tokenizer as a folder with ``tokenizer.json``, from its published tiktoken ranks.

    python -m benchmarks.llama3_tokenizer tokenizer.model FOLDER

A line of ranks is a token's bytes in base64 and its rank. Byte-level BPE joins the pair of lowest
rank first, so a token's last join is found by encoding its bytes with the lower ranks alone: what
is left are two parts, its merge. The ranks come with Meta's community licence: made at run time,
never stored here.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import zipfile
from collections.abc import Mapping
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

from aquiline.text.gguf_tokenizer import tokenizer_of

INSIDE = "llama_models/llama3/tokenizer.model"  # of the package's wheel
NORMAL, CONTROL = 1, 3  # kinds of tokens, as GGUF counts
SPECIALS = {
    0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id",
    7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag",
}  # fmt: skip
SPECIAL_COUNT = 256


def read_ranks(path: Path) -> dict[bytes, int]:
    """Of a file of ranks, or of a wheel that holds it; raises ValueError on another file."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            lines = wheel.read(INSIDE).splitlines()
    else:
        lines = path.read_bytes().splitlines()
    pairs = [line.split() for line in lines if line]
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(
        bytes([byte]) in ranks for byte in range(256)
    ):
        raise ValueError(f"{path}: not tiktoken ranks from 0 on with every byte among them")
    return ranks


def parts(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The token's bytes joined by the ranks below its own."""
    found, below = [bytes([byte]) for byte in token], ranks[token]
    while True:
        pairs = [ranks.get(a + b, below) for a, b in itertools.pairwise(found)]
        at = min(range(len(pairs)), key=pairs.__getitem__, default=None)
        if at is None or pairs[at] >= below:
            return found
        found[at : at + 2] = [found[at] + found[at + 1]]


def special_names() -> list[str]:
    """Of the ids behind the ranks, in order."""
    reserved = itertools.count()
    return [
        f"<|{SPECIALS.get(place) or f'reserved_special_token_{next(reserved)}'}|>"
        for place in range(SPECIAL_COUNT)
    ]


def letters() -> list[str]:
    """Of the byte-level alphabet, by byte: printable Latin-1 bytes are their own, the others take,
    in order, the rest of the alphabet."""
    alphabet = sorted(ByteLevel.alphabet())
    plain = {ord(letter): letter for letter in alphabet if ord(letter) < 256}
    others = iter(letter for letter in alphabet if ord(letter) >= 256)
    return [plain.get(byte) or next(others) for byte in range(256)]


def write_tokenizer(ranks: Mapping[bytes, int], folder: Path) -> None:
    """Write ``tokenizer.json`` and its configuration; Llama 3's special tokens follow the ranks."""
    letter = letters()

    def spelled(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    tokens = sorted(ranks, key=ranks.__getitem__)
    merges = [parts(token, ranks) for token in tokens if len(token) > 1]
    specials = special_names()
    fields = {
        "model": "gpt2", "pre": "llama-bpe", "tokens": [*map(spelled, tokens), *specials],
        "token_type": [NORMAL] * len(tokens) + [CONTROL] * len(specials),
        # A token that no join reaches is found whole, before any merge.
        "merges": [" ".join(map(spelled, pair)) for pair in merges if len(pair) == 2],
        "bos_token_id": len(tokens), "eos_token_id": len(tokens) + 1,
        "eot_token_id": len(tokens) + 9,
    }  # fmt: skip
    fast = tokenizer_of({f"tokenizer.ggml.{name}": value for name, value in fields.items()}).fast
    fast.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ranks", type=Path, help="tokenizer.model, or the wheel that holds it")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(read_ranks(options.ranks), options.folder)


if __name__ == "__main__":
    main()
