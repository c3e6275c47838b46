"""A tokenised corpus: a folder of shards, memory-mapped when opened, that reads as one.

    meta.json               CorpusInfo, written last
    tokens-00000.npy        [tokens of the shard], 16-bit where the vocabulary allows, else 32-bit
    mask-00000.npy          [tokens / 8] bits, true where the token is the assistant's
    offsets-00000.npy       [documents of the shard + 1] int64, where each document begins
    tokens-00001.npy  ...

No document crosses from one shard to the next. The folder appears whole or not at all, and no more
than one shard is held in memory while it is built.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from os import getpid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aquiline.core.errors import AquilineError, DataError
from aquiline.training.conversations import Conversation
from aquiline.training.masking import (
    ChatTokenizer,
    Document,
    Ids,
    Mask,
    head,
    tokenize_conversation,
)

SHARD_TOKENS = 64_000_000
_FORMAT = 2


@dataclass(frozen=True)
class CorpusInfo:
    """What a corpus holds; the content of its ``meta.json``.

    Attributes:
        truncated: documents cut at ``max_length``.
        skipped: conversations left out because the cut left them no assistant token.
        refused: conversations left out because the chat template does not allow them.
        tokenizer: ``tokenizer_fingerprint`` of the tokenizer that built it.
        source: where the conversations came from, as the builder named it.
    """

    documents: int
    tokens: int
    assistant_tokens: int
    truncated: int
    skipped: int
    refused: int
    shards: int
    max_length: int
    vocab_size: int
    tokenizer: str
    source: str
    format: int = _FORMAT


class _Shard(NamedTuple):
    tokens: NDArray[Any]
    mask: NDArray[np.uint8]
    offsets: Ids

    @classmethod
    def open(cls, folder: Path, number: int) -> _Shard:
        tokens, mask = (
            np.load(folder / f"{name}-{number:05d}.npy", mmap_mode="r")
            for name in ("tokens", "mask")
        )
        shard = cls(tokens, mask, np.load(folder / f"offsets-{number:05d}.npy"))
        if len(tokens) != shard.offsets[-1] or len(mask) != -(-len(tokens) // 8):
            raise ValueError(f"shard {number} is damaged")
        return shard

    def save(self, folder: Path, number: int) -> None:
        for name, array in self._asdict().items():
            np.save(folder / f"{name}-{number:05d}.npy", array)

    def document(self, index: int) -> Document:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        bits = np.unpackbits(self.mask[start // 8 : end // 8 + 1])
        skip = start % 8
        return self.tokens[start:end].astype(np.int64), bits[skip : skip + end - start] == 1


class Corpus:
    """A memory-mapped corpus; open it with ``Corpus.open``.

    Attributes:
        lengths: tokens of each document, [documents].
    """

    def __init__(self, info: CorpusInfo, shards: list[_Shard]) -> None:
        self.info = info
        self.lengths: Ids = np.concatenate([np.diff(shard.offsets) for shard in shards])
        self._shards = shards
        self._first = np.cumsum([0, *(len(shard.offsets) - 1 for shard in shards)])

    @classmethod
    def open(cls, folder: str | Path, vocab_size: int | None = None) -> Corpus:
        """Open a folder written by ``build_corpus``, for a target of ``vocab_size`` tokens.

        Raises:
            DataError: not a corpus, or its vocabulary is larger than the target's.
        """
        folder = Path(folder)
        try:
            info = CorpusInfo(**json.loads((folder / "meta.json").read_text()))
            if info.format != _FORMAT:
                raise ValueError("of another version")
            corpus = cls(info, [_Shard.open(folder, number) for number in range(info.shards)])
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{folder}: not a corpus ({error}); build it again") from None
        if (len(corpus), int(corpus.lengths.sum())) != (info.documents, info.tokens):
            raise DataError(f"{folder}: its shards are not those of meta.json; build it again")
        if vocab_size is not None and info.vocab_size > vocab_size:
            raise DataError(
                f"{folder}: its vocab_size is {info.vocab_size}, the target's {vocab_size}; "
                "build it again with the target's tokenizer"
            )
        return corpus

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
        counts = np.zeros(vocab_size, np.int64)
        for shard in self._shards:
            counts += np.bincount(shard.tokens, minlength=vocab_size)
        return counts

    def document(self, index: int) -> Document:
        """Token ids (int64) and assistant mask (bool) of one document, as copies."""
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._shards[shard].document(index - int(self._first[shard]))


def build_corpus(
    tokenizer: ChatTokenizer,
    conversations: Iterable[Conversation],
    out_dir: str | Path,
    max_length: int,
    progress: Callable[[int], None] | None = None,
    *,
    source: str = "",
    shard_tokens: int = SHARD_TOKENS,
) -> CorpusInfo:
    """Tokenise conversations, each cut at ``max_length`` tokens, into the new folder ``out_dir``.

    ``progress`` is called with the number of conversations done. A shard holds ``shard_tokens`` at
    most, or one document. All processor cores are used.

    Raises:
        DataError: ``out_dir`` exists, no conversation has an assistant token within
            ``max_length``, or the chat template does not render prefixes.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise DataError(f"{out_dir}: exists; delete it or give another folder")
    fingerprint = tokenizer_fingerprint(tokenizer)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    partial = out_dir.with_name(f".{out_dir.name}.{getpid()}.partial")
    partial.mkdir(parents=True)
    shard: list[tuple[NDArray[Any], Mask]] = []
    held = done = documents = shards = tokens = assistant_tokens = truncated = refused = 0
    try:
        for done, document in enumerate(_tokenise_all(tokenizer, conversations, max_length), 1):
            refused += document is None
            if document is not None and document[1][:max_length].any():
                ids, mask = document[0][:max_length].astype(dtype), document[1][:max_length]
                if held + len(ids) > shard_tokens and shard:
                    _pack(shard).save(partial, shards)
                    shard, held, shards = [], 0, shards + 1
                shard.append((ids, mask))
                held += len(ids)
                documents += 1
                tokens += len(ids)
                assistant_tokens += int(mask.sum())
                truncated += len(document[0]) > max_length
            if progress is not None:
                progress(done)
        if not shard:
            raise DataError(
                f"{out_dir}: of {done} conversations the chat template refuses {refused}, the "
                f"others have no assistant token within max_length={max_length}; raise it"
            )
        _pack(shard).save(partial, shards)
        info = CorpusInfo(
            documents, tokens, assistant_tokens, truncated,
            done - documents - refused, refused, shards + 1,
            max_length, tokenizer.vocab_size, fingerprint, source,
        )  # fmt: skip
        (partial / "meta.json").write_text(json.dumps(asdict(info), indent=2) + "\n")
        partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return info


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


_worker: list[tuple[ChatTokenizer, int, int]] = []  # one, in a worker process


def _start_worker(*state: Any) -> None:
    _worker[:] = [state]


def _work(conversation: Conversation) -> Document | None:
    """None for a conversation that the template refuses."""
    tokenizer, characters, messages = _worker[0]
    try:
        return tokenize_conversation(tokenizer, head(conversation, characters, messages))
    except DataError:  # of template or tokenizer: it concerns every conversation
        raise
    except AquilineError:
        return None


def _tokenise_all(
    tokenizer: ChatTokenizer, conversations: Iterable[Conversation], max_length: int
) -> Iterator[Document | None]:
    """Tokenised conversations in order; forked workers inherit the tokenizer, unpickled.

    A conversation of any size takes the time of its first ``max_length`` + 1 tokens: no token is
    longer than the longest of the vocabulary, and every message has one at least.
    """
    tokens = range(tokenizer.vocab_size)
    longest = max(len(tokenizer.decode([i], skip_special_tokens=False)) for i in tokens)
    state = tokenizer, longest * (max_length + 1), max_length + 1
    with get_context("fork").Pool(initializer=_start_worker, initargs=state) as pool:
        yield from pool.imap(_work, conversations, chunksize=16)


def _pack(documents: list[tuple[NDArray[Any], Mask]]) -> _Shard:
    return _Shard(
        np.concatenate([ids for ids, _ in documents]),
        np.packbits(np.concatenate([mask for _, mask in documents])),
        np.cumsum([0, *(len(ids) for ids, _ in documents)], dtype=np.int64),
    )
