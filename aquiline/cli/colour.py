"""Colours: which tokens the draft supplied, by the depth at which they were accepted."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from aquiline.text.detokenizer import Detokenizer
from aquiline.text.tokenizer import Tokenizer

# The target's own tokens are plain; deeper is brighter green.
DEPTH_STYLES = ("", "green", "bright_green", "cyan", "bright_cyan", "bright_blue")


def coloured(tokenizer: Tokenizer, token_ids: Sequence[int], depths: Sequence[int]) -> Text:
    """The text of ``token_ids``, each token in the colour of its depth."""
    detokenizer, text = Detokenizer(tokenizer), Text()
    for token, depth in zip(token_ids, depths, strict=True):
        text.append(detokenizer.append([token]), DEPTH_STYLES[min(depth, len(DEPTH_STYLES) - 1)])
    return text.append(detokenizer.finish())
