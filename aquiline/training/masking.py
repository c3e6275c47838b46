"""Token ids of a conversation, with the assistant's marked, for any chat template.

The mask is found by rendering prefixes of the conversation: an assistant turn lies between the
prefix that ends in a generation prompt and the prefix that ends with the turn. A token belongs to
the speaker of its first character. A turn that was cut off (``finish_reason`` "length") is the
document's last and has no end: a draft must not learn to end there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aquiline.core.errors import DataError
from aquiline.training.conversations import CUT, Conversation

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]
Document = tuple[Ids, Mask]


class ChatTokenizer(Protocol):
    """What a corpus needs of a tokenizer; it is used in forked processes.

    ``encode_chat`` must equal ``encode`` of ``render_chat`` without added special tokens.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> Collection[int]: ...
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def render_chat(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str: ...
    def encode_chat(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> list[int]: ...


def tokenize_conversation(tokenizer: ChatTokenizer, conversation: Conversation) -> Document:
    """Token ids of the conversation up to its first cut turn, and the assistant mask.

    The ids equal ``encode_chat``'s (of a cut conversation, up to the end of the text that there
    is). The mask marks what the assistant has to produce: its content and the token that ends its
    turn, not what the template puts after that token.

    Raises:
        DataError: the chat template does not render prefixes of the conversation.
    """
    cut = next(
        (i for i, message in enumerate(conversation) if CUT.items() <= message.items()), None
    )
    if cut is not None:
        conversation = conversation[: cut + 1]
    text = tokenizer.render_chat(conversation, add_generation_prompt=False)
    edges = _assistant_edges(tokenizer, conversation, text)
    if cut is None:
        ids = tokenizer.encode_chat(conversation, add_generation_prompt=False)
    else:
        edges[-1] = edges[-2] + _content_end(text[edges[-2] :], conversation[-1]["content"])
        text = text[: edges[-1]]
        ids = tokenizer.encode(text, add_special_tokens=False)
    cuts = _token_cuts(tokenizer, text, ids, edges)
    mask = np.zeros(len(ids), dtype=np.bool_)
    for start, stop in zip(cuts[::2], cuts[1::2], strict=True):
        ends = [i for i in range(start, stop) if ids[i] in tokenizer.eos_token_ids]
        mask[start : ends[-1] + 1 if ends else stop] = True
    return np.asarray(ids, dtype=np.int64), mask


def head(conversation: Conversation, characters: int, messages: int) -> Conversation:
    """The beginning of a conversation: at most so many characters of content, in so many messages.

    What is tokenised and then cut at a length need not be rendered whole, once for every turn.
    """
    beginning: Conversation = []
    for message in conversation[:messages]:
        if characters <= 0:
            break
        beginning.append({**message, "content": message["content"][:characters]})
        characters -= len(message["content"])
    return beginning


def _content_end(turn: str, content: str) -> int:
    """Where ``content``, perhaps stripped by the template, ends in the rendered turn."""
    for spelled in (content, content.strip()):
        if spelled in turn:
            return turn.index(spelled) + len(spelled)
    raise DataError("chat template: it alters the assistant's text; a cut turn's end is not found")


def _assistant_edges(tokenizer: ChatTokenizer, conversation: Conversation, text: str) -> list[int]:
    """Character positions in ``text``: start and end of each assistant turn, in order."""
    edges = []
    for index, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        before = tokenizer.render_chat(conversation[:index], add_generation_prompt=True)
        through = tokenizer.render_chat(conversation[: index + 1], add_generation_prompt=False)
        if not (text.startswith(through) and through.startswith(before)):
            raise DataError(
                f"chat template: message {index} is not rendered after its context as prompted for "
                "generation; use a template whose prefixes stay as they are"
            )
        edges += [len(before), len(through)]
    return edges


def _token_cuts(tokenizer: ChatTokenizer, text: str, ids: list[int], edges: list[int]) -> list[int]:
    """For each character position in ``edges``, how many tokens of ``text`` begin before it.

    Walks two tokenisations in step, of the whole text and of each piece between edges; where they
    agree up to an edge, the walk goes on from there. They differ where a token of the whole
    straddles an edge: it is counted, and the next piece begins at the last edge they agreed on.
    """

    def extent(some: Sequence[int]) -> int:
        return len(tokenizer.decode(some, skip_special_tokens=False))

    cuts: list[int] = []
    at = position = 0
    for edge in [*edges, len(text)]:
        piece = tokenizer.encode(text[position:edge], add_special_tokens=False)
        rest = ids[at : at + len(piece)]
        if rest == piece:
            at, position = at + len(piece), edge
            cuts.append(at)
            continue
        differ = (i for i, (a, b) in enumerate(zip(piece, rest, strict=False)) if a != b)
        same = next(differ, len(rest))
        missing, rest = extent(piece[same:]), ids[at + same :]
        counts = range(min(len(rest), 4 * missing) + 1)  # a character has at most 4 tokens
        covering = bisect_left(counts, missing, key=lambda count: extent(rest[:count]))
        cuts.append(at + same + covering)
    if cuts.pop() != len(ids):
        raise DataError(
            "tokenizer: encode_chat is not encode of render_chat without added special tokens; "
            "remove the special tokens its post-processor adds"
        )
    return cuts
