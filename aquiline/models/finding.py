"""What one check of a draft folder found, and for which engines it matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Engine = Literal["aquiline", "vllm", "sglang"]
ALL: tuple[Engine, ...] = ("aquiline", "vllm", "sglang")
OTHERS: tuple[Engine, ...] = ("vllm", "sglang")


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: its name.
        says: what was found and, if that is bad, what it does.
        engines: those that would lose acceptance or not load; none if all is well.
        remedy: what to do; empty if all is well.
    """

    check: str
    says: str
    engines: tuple[Engine, ...] = ()
    remedy: str = ""

    @property
    def ok(self) -> bool:
        return not self.engines
