"""GgufCursor: the values of a GGUF header, one after another, each length checked.

Weights (models) and tokenizer (text) both live in a GGUF file and read its header through this.
"""

from __future__ import annotations

import struct
from mmap import mmap
from typing import Any

# GGUF value types by number, as struct codes; * and [ stand for string and array.
VALUE_CODES = "BbHhIif?*[Qqd"


class GgufCursor:
    """Reads little-endian GGUF values one after another."""

    def __init__(self, data: memoryview | mmap) -> None:
        self.data = data
        self.at = 0

    def metadata(self) -> tuple[int, dict[str, Any]]:
        """The number of tensors and the metadata fields, from the start of a file.

        Raises ValueError, LookupError or struct.error on a file that is not whole GGUF.
        """
        magic, version = self.number("4s"), self.number("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"magic {magic!r}, version {version}")
        tensors, fields = self.number("Q"), self.number("Q")
        return tensors, {self.string(): self.value(self.number("I")) for _ in range(fields)}

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        end = self._room(self.number("Q"))
        text = str(self.data[self.at : end], "utf-8")
        self.at = end
        return text

    def value(self, kind: int) -> Any:
        code = VALUE_CODES[kind]
        if code == "*":
            return self.string()
        if code == "[":
            item, count = self.number("I"), self.number("Q")
            self._room(count)
            return [self.value(item) for _ in range(count)]
        return self.number(code)

    def _room(self, size: int) -> int:
        if self.at + size > len(self.data):
            raise ValueError("a length reaches past the end of the file")
        return self.at + size
