"""A tokenised corpus: conversations as token ids, with the assistant's tokens marked.

The mask is found for any chat template by rendering prefixes of the conversation: an assistant turn
lies between the prefix that ends in a generation prompt and the prefix that ends with the turn. A
token belongs to the speaker of its first character. On disk a corpus is a folder of flat arrays,
memory-mapped when opened, that appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from os import getpid
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aquiline.core.errors import DataError
from aquiline.training.conversations import Conversation

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]
Document = tuple[Ids, Mask]
_FORMAT = 1


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


@dataclass(frozen=True)
class CorpusInfo:
    """What a corpus holds; the content of its ``meta.json``.

    Attributes:
        truncated: documents cut at ``max_length``.
        skipped: conversations left out because the cut left them no assistant token.
        tokenizer: ``tokenizer_fingerprint`` of the tokenizer that built it.
        source: where the conversations came from, as the builder named it.
    """

    documents: int
    tokens: int
    assistant_tokens: int
    truncated: int
    skipped: int
    max_length: int
    vocab_size: int
    tokenizer: str
    source: str
    format: int = _FORMAT


class Corpus:
    """A memory-mapped corpus; open it with ``Corpus.open``."""

    def __init__(self, info: CorpusInfo, tokens: Any, mask: Any, offsets: Ids) -> None:
        self.info = info
        self.lengths: Ids = np.diff(offsets)
        self._tokens, self._mask, self._offsets = tokens, mask, offsets

    @classmethod
    def open(cls, folder: str | Path, vocab_size: int | None = None) -> Corpus:
        """Open a folder written by ``build_corpus``, for a target of ``vocab_size`` tokens.

        Raises:
            DataError: not a corpus, or its vocabulary is larger than the target's.
        """
        folder = Path(folder)
        try:
            info = CorpusInfo(**json.loads((folder / "meta.json").read_text()))
            tokens, mask = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("tokens", "mask"))
            offsets = np.load(folder / "offsets.npy")
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{folder}: not a corpus ({error}); build it again") from None
        if (
            info.format != _FORMAT
            or len(tokens) != offsets[-1]
            or len(offsets) != info.documents + 1
        ):
            raise DataError(f"{folder}: damaged or of another version; build it again")
        if vocab_size is not None and info.vocab_size > vocab_size:
            raise DataError(
                f"{folder}: its vocab_size is {info.vocab_size}, the target's {vocab_size}; "
                "build it again with the target's tokenizer"
            )
        return cls(info, tokens, mask, offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def token_count(self) -> int:
        return self.info.tokens

    @property
    def assistant_token_count(self) -> int:
        return self.info.assistant_tokens

    def token_counts(self, vocab_size: int) -> Ids:
        """How often each token id occurs, [vocab_size]."""
        return np.bincount(self._tokens, minlength=vocab_size)

    def document(self, index: int) -> Document:
        """Token ids (int64) and assistant mask (bool) of one document, as copies."""
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        bits = np.unpackbits(self._mask[start // 8 : end // 8 + 1])
        skip = start % 8
        return self._tokens[start:end].astype(np.int64), bits[skip : skip + end - start] == 1


def build_corpus(
    tokenizer: ChatTokenizer,
    conversations: Iterable[Conversation],
    out_dir: str | Path,
    max_length: int,
    progress: Callable[[int], None] | None = None,
    *,
    source: str = "",
) -> CorpusInfo:
    """Tokenise conversations, each cut at ``max_length`` tokens, into the new folder ``out_dir``.

    ``progress`` is called with the number of conversations done. All processor cores are used.

    Raises:
        DataError: ``out_dir`` exists, no conversation has an assistant token within
            ``max_length``, or the chat template does not render prefixes.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise DataError(f"{out_dir}: exists; delete it or give another folder")
    fingerprint = tokenizer_fingerprint(tokenizer)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    documents: list[tuple[NDArray[Any], Mask]] = []
    done = truncated = 0
    for done, (ids, mask) in enumerate(_tokenise_all(tokenizer, conversations), 1):
        if mask[:max_length].any():
            truncated += len(ids) > max_length
            documents.append((ids[:max_length].astype(dtype), mask[:max_length]))
        if progress is not None:
            progress(done)
    if not documents:
        raise DataError(f"{out_dir}: no conversation has an assistant token; raise max_length")
    info = CorpusInfo(
        documents=len(documents),
        tokens=sum(len(ids) for ids, _ in documents),
        assistant_tokens=sum(int(mask.sum()) for _, mask in documents),
        truncated=truncated,
        skipped=done - len(documents),
        max_length=max_length,
        vocab_size=tokenizer.vocab_size,
        tokenizer=fingerprint,
        source=source,
    )
    _write(out_dir, documents, info)
    return info


def tokenize_conversation(tokenizer: ChatTokenizer, conversation: Conversation) -> Document:
    """Token ids of the whole conversation, equal to ``encode_chat``'s, and the assistant mask.

    The mask marks what the assistant has to produce: its content and the token that ends its turn,
    not what the template puts after that token.

    Raises:
        DataError: the chat template does not render prefixes of the conversation.
    """
    text = tokenizer.render_chat(conversation, add_generation_prompt=False)
    ids = tokenizer.encode_chat(conversation, add_generation_prompt=False)
    edges = _assistant_edges(tokenizer, conversation, text)
    cuts = _token_cuts(tokenizer, text, ids, edges)
    mask = np.zeros(len(ids), dtype=np.bool_)
    for start, stop in zip(cuts[::2], cuts[1::2], strict=True):
        ends = [i for i in range(start, stop) if ids[i] in tokenizer.eos_token_ids]
        mask[start : ends[-1] + 1 if ends else stop] = True
    return np.asarray(ids, dtype=np.int64), mask


def tokenizer_fingerprint(tokenizer: ChatTokenizer) -> str:
    """A digest of a tokenizer's behaviour: a rendered chat, its ids, a sample of the vocabulary."""
    chat = [
        {"role": "user", "content": "Größe 12345\n\n\t日本"},
        {"role": "assistant", "content": "ok."},
    ]
    sample = range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // 1024))
    behaviour = [
        tokenizer.vocab_size,
        sorted(tokenizer.eos_token_ids),
        tokenizer.render_chat(chat, add_generation_prompt=True),
        tokenizer.encode_chat(chat, add_generation_prompt=True),
        [tokenizer.decode([token]) for token in sample],
    ]
    return hashlib.sha256(json.dumps(behaviour).encode()).hexdigest()[:16]


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


_worker: list[ChatTokenizer] = []  # one, in a worker process


def _start_worker(tokenizer: ChatTokenizer) -> None:
    _worker[:] = [tokenizer]


def _work(conversation: Conversation) -> Document:
    return tokenize_conversation(_worker[0], conversation)


def _tokenise_all(
    tokenizer: ChatTokenizer, conversations: Iterable[Conversation]
) -> Iterator[Document]:
    """Tokenised conversations in order; forked workers inherit the tokenizer, unpickled."""
    with get_context("fork").Pool(initializer=_start_worker, initargs=(tokenizer,)) as pool:
        yield from pool.imap(_work, conversations, chunksize=16)


def _write(out_dir: Path, documents: list[tuple[NDArray[Any], Mask]], info: CorpusInfo) -> None:
    partial = out_dir.with_name(f".{out_dir.name}.{getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        lengths = [len(ids) for ids, _ in documents]
        np.save(partial / "tokens.npy", np.concatenate([ids for ids, _ in documents]))
        np.save(partial / "mask.npy", np.packbits(np.concatenate([mask for _, mask in documents])))
        np.save(partial / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
        (partial / "meta.json").write_text(json.dumps(asdict(info), indent=2) + "\n")
        partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
