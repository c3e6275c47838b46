"""Token ids to text as they come, without ever taking a shown character back.

    ids    [ ... shown ... | context | pending ]      window = context + pending
    text   [ ... shown ........ | held ] + U+FFFD...

Only the window is decoded: the text of the last settled tokens (context, because some decoders
treat the first token of a text differently) and of those after it. A window that ends in U+FFFD may
end inside a character and is kept pending. Settled text is held back while its tail may be the
beginning of a stop string. Work per token is constant.
"""

from __future__ import annotations

from collections.abc import Sequence

from aquiline.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes: a longer tail of U+FFFD also holds bytes that are simply invalid.
_MAX_PENDING = 8
_MAX_CONTEXT = 16  # tokens; to drop some costs one more decoding


class Detokenizer:
    """The text of one growing sequence of tokens.

    What ``append`` and ``finish`` return adds up to ``tokenizer.decode`` of all tokens, cut before
    the first completed stop string. (Exact for byte-level tokenizers; one with byte fallback
    decodes a run of invalid bytes as a whole, which no streaming can foresee.) Where the text is
    cut does not depend on how tokens were grouped into calls.

    Attributes:
        stopped_at: how many of the appended tokens lead up to the end of the first stop string, the
            token that completed it included; None while there was none. Later tokens are ignored.
            One that the first ``min_tokens`` tokens complete is text like any other.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
    ) -> None:
        self.stopped_at: int | None = None
        self.tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._stop, self._min_tokens = stop, min_tokens
        self._count = 0
        self._window: list[int] = []
        self._num_context = 0
        self._settled = 0  # characters of the window's text that have been settled
        self._held = ""
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text shown so far."""
        return "".join(self._parts)

    @property
    def num_parts(self) -> int:
        """Pieces of text shown so far."""
        return len(self._parts)

    def text_of(self, parts: int) -> str:
        """The first ``parts`` pieces: the text when there were that many."""
        return "".join(self._parts[:parts])

    def append(self, token_ids: Sequence[int]) -> str:
        """Take in new tokens; return the new text that is final."""
        runs = [[token] for token in token_ids] if self._stop else [token_ids]
        shown = ""
        for run in runs:
            if self.stopped_at is None:
                self._count += len(run)
                new = [token for token in run if token not in self._skipped]
                self._window += new
                shown += self._show(self._settle()) if new else ""
        return shown

    def finish(self) -> str:
        """No token will follow: return what was held back, a broken last character as U+FFFD."""
        if self.stopped_at is not None:
            return ""
        shown = self._show(self._decode(self._window)[self._settled :])
        self._window, self._num_context, self._settled = [], 0, 0
        if self.stopped_at is None:
            self._parts.append(self._held)
            shown, self._held = shown + self._held, ""
        return shown

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _settle(self) -> str:
        """Text that no later token can change; a window that ends a character is context."""
        text = self._decode(self._window)
        end = len(text.rstrip(_REPLACEMENT))
        new = text[self._settled : end]
        self._settled = max(self._settled, end)
        if end == len(text):
            if len(self._window) > _MAX_CONTEXT:
                self._drop_context()
            self._num_context = len(self._window)
        elif len(self._window) - self._num_context > _MAX_PENDING:
            new += self._drop_invalid(text)
        return new

    def _drop_context(self) -> None:
        """What was context so far leaves the window; the newest tokens are context enough."""
        self._window = self._window[self._num_context :]
        self._settled = len(self._decode(self._window))

    def _drop_invalid(self, text: str) -> str:
        """Settle an invalid head of the pending tokens, up to where a character really begins.

        Bytes of one character decode to more text apart than together, so a boundary is between
        characters if both sides together give ``text``.
        """
        for start in range(len(self._window) - 1, self._num_context, -1):
            head, tail = self._decode(self._window[:start]), self._decode(self._window[start:])
            if tail and head + tail == text:
                new = head[self._settled :]
                self._window, self._num_context = self._window[start:], 0
                self._settled = len(tail.rstrip(_REPLACEMENT))
                return new
        return ""

    def _show(self, settled: str) -> str:
        """Pass settled text on, up to a stop string or to what may become one."""
        text = self._held + settled
        live = self._stop if self._count > self._min_tokens else ()
        held = len(self._held)  # what ends in it was completed too early
        found = [
            (start + len(stop), -len(stop))
            for stop in live
            if (start := text.find(stop, max(0, held + 1 - len(stop)))) >= 0
        ]
        if found:
            end, minus_length = min(found)
            self.stopped_at = self._count
            shown, self._held = text[: end + minus_length], ""
        else:
            shown = text[: len(text) - self._num_held(text)]
            self._held = text[len(shown) :]
        self._parts.append(shown)
        return shown

    def _num_held(self, text: str) -> int:
        """Length of the longest tail of ``text`` that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
