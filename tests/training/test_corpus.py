"""The mask is the brute-force mask for any template; a corpus on disk gives back its documents."""

import json
import random
import time

import numpy as np
import pytest

from aquiline.core.errors import AquilineError, DataError
from aquiline.training.conversations import CUT
from aquiline.training.corpus import (
    Corpus,
    build_corpus,
    tokenizer_fingerprint,
)
from aquiline.training.masking import tokenize_conversation
from tests.training.chat_tokenizers import CHATML, LLAMA3, NOT_BY_PREFIX, ChatTokenizer, train

PIECES = [
    "\n",
    "\n\n",
    " ",
    "The end",
    "日本",
    "😀",
    "assistant",
    "<|eot|>",
    "<",
    "é",
    "user",
    "123",
]
ENDS = {CHATML: "<|im_end|>", LLAMA3: "<|eot|>"}


def random_conversation(random_: random.Random) -> list[dict[str, str]]:
    def content() -> str:
        return "".join(random_.choices(PIECES, k=random_.randrange(12)))

    roles = ["user", "assistant"] * random_.randint(1, 5)
    roles = ["system"] * random_.randrange(2) + roles + ["user"] * random_.randrange(2)
    return [{"role": role, "content": content()} for role in roles]


def brute_force_mask(tokenizer, template, conversation):
    """Token by token: its first character is in an assistant's content or in its end token."""
    text = tokenizer.render_chat(conversation, add_generation_prompt=False)
    inside = set()
    for index, message in enumerate(conversation):
        if message["role"] == "assistant":
            start = len(tokenizer.render_chat(conversation[:index]))
            trim = template == LLAMA3
            content = message["content"].strip() if trim else message["content"]
            assert text[start:].startswith(content + ENDS[template])
            inside.update(range(start, start + len(content + ENDS[template])))
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    return encoding.ids, [start in inside for start, _ in encoding.offsets]


@pytest.mark.parametrize("splits", [True, False])
@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_mask_equals_brute_force(template, splits):
    tokenizer = ChatTokenizer(template, train(splits=splits))
    random_ = random.Random(0)
    for _ in range(200):
        conversation = random_conversation(random_)
        ids, mask = tokenize_conversation(tokenizer, conversation)
        expected_ids, expected_mask = brute_force_mask(tokenizer, template, conversation)
        assert ids.tolist() == expected_ids == tokenizer.encode_chat(conversation, False)
        assert mask.tolist() == expected_mask


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_mask_when_tokens_run_across_turns(template):
    """No special tokens at all: tokens may straddle every border."""
    backend = train(specials=["<|end|>"])
    tokenizer = ChatTokenizer(template, backend)
    tokenizer.eos_token_ids = (backend.token_to_id("<|end|>"),)
    random_ = random.Random(1)
    straddling = 0
    for _ in range(200):
        conversation = random_conversation(random_)
        ids, mask = tokenize_conversation(tokenizer, conversation)
        edges = []
        for index, message in enumerate(conversation):
            if message["role"] == "assistant":
                start = len(tokenizer.render_chat(conversation[:index]))
                end = len(tokenizer.render_chat(conversation[: index + 1], False))
                edges.append((start, end))
        text = tokenizer.render_chat(conversation, False)
        offsets = backend.encode(text, add_special_tokens=False).offsets
        expected = [any(a <= start < b for a, b in edges) for start, _ in offsets]
        assert mask.tolist() == expected
        straddling += sum(any(s < edge < e for pair in edges for edge in pair) for s, e in offsets)
        assert len(ids) == len(offsets)
    assert straddling > 20


def test_template_that_does_not_render_prefixes_is_refused():
    conversation = random_conversation(random.Random(0))
    with pytest.raises(DataError, match="chat template"):
        tokenize_conversation(ChatTokenizer(NOT_BY_PREFIX), conversation)


@pytest.fixture
def conversations():
    random_ = random.Random(2)
    return [random_conversation(random_) for _ in range(60)]


@pytest.fixture
def tokenizer():
    return ChatTokenizer(CHATML)


def test_corpus_gives_back_every_document(tmp_path, tokenizer, conversations):
    calls = []
    info = build_corpus(
        tokenizer, iter(conversations), tmp_path / "c", 50, calls.append, source="random"
    )
    corpus = Corpus.open(tmp_path / "c", vocab_size=tokenizer.vocab_size)
    assert corpus.info == info
    assert calls == list(range(1, 61))
    assert (info.source, info.tokenizer) == ("random", tokenizer_fingerprint(tokenizer))
    documents = [tokenize_conversation(tokenizer, c) for c in conversations]
    kept = [(ids, mask) for ids, mask in documents if mask[:50].any()]
    assert info.skipped == len(documents) - len(kept) > 0
    assert info.truncated == sum(len(ids) > 50 for ids, _ in kept) > 0
    assert len(corpus) == len(kept) == info.documents
    for index, (ids, mask) in enumerate(kept):
        stored_ids, stored_mask = corpus.document(index)
        np.testing.assert_array_equal(stored_ids, ids[:50])
        np.testing.assert_array_equal(stored_mask, mask[:50])
        assert corpus.lengths[index] == len(stored_ids)
    assert corpus.token_count == sum(min(len(ids), 50) for ids, _ in kept)
    assert corpus.assistant_token_count == sum(mask[:50].sum() for _, mask in kept)
    assert np.load(tmp_path / "c" / "tokens-00000.npy").dtype == np.uint16


def test_large_vocabulary_is_stored_whole(tmp_path, tokenizer, conversations):
    encode_chat = tokenizer.encode_chat
    tokenizer.vocab_size = 70_000
    shift = 69_000
    tokenizer.encode = lambda text, add_special_tokens=True: [
        i + shift for i in tokenizer.backend.encode(text, add_special_tokens=False).ids
    ]
    tokenizer.decode = lambda ids, skip_special_tokens=True: (
        tokenizer.backend.decode([i - shift for i in ids], skip_special_tokens=skip_special_tokens)
        if min(ids, default=shift) >= shift
        else ""
    )
    build_corpus(tokenizer, conversations[:3], tmp_path / "c", 1000)
    ids, _ = Corpus.open(tmp_path / "c").document(0)
    assert ids.tolist() == encode_chat(conversations[0], False)
    assert ids.min() >= shift


def test_corpus_of_a_larger_vocabulary_is_refused(tmp_path, tokenizer, conversations):
    build_corpus(tokenizer, conversations, tmp_path / "c", 50)
    Corpus.open(tmp_path / "c", vocab_size=tokenizer.vocab_size + 64)  # padded: fits
    with pytest.raises(DataError, match="vocab_size"):
        Corpus.open(tmp_path / "c", vocab_size=tokenizer.vocab_size - 1)


def test_existing_folder_is_refused_before_any_work(tmp_path, tokenizer):
    with pytest.raises(DataError, match="exists"):
        build_corpus(tokenizer, iter(lambda: pytest.fail("worked"), None), tmp_path, 50)


def test_failed_build_leaves_nothing(tmp_path, tokenizer, conversations):
    def broken():
        yield from conversations
        raise DataError("bad line")

    with pytest.raises(DataError, match="bad line"):
        build_corpus(tokenizer, broken(), tmp_path / "c", 50)
    assert list(tmp_path.iterdir()) == []


def test_shards_read_as_one(tmp_path, tokenizer, conversations):
    info = build_corpus(tokenizer, conversations, tmp_path / "one", 50)
    sharded = build_corpus(tokenizer, conversations, tmp_path / "many", 50, shard_tokens=170)
    assert info.shards == 1
    assert sharded.shards > 5
    one, many = Corpus.open(tmp_path / "one"), Corpus.open(tmp_path / "many")
    sizes = [len(np.load(path)) for path in sorted((tmp_path / "many").glob("tokens-*.npy"))]
    assert len(sizes) == sharded.shards
    assert max(sizes) <= 170
    assert sum(sizes) == one.token_count == many.token_count
    np.testing.assert_array_equal(one.lengths, many.lengths)
    for index in range(len(one)):
        for a, b in zip(one.document(index), many.document(index), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.token_counts(500), many.token_counts(500))
    assert one.token_counts(500).sum() == one.token_count


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
@pytest.mark.parametrize("content", ["The end", "\n\nassistant 123\n", "end", "im_end 日本"])
def test_cut_turn_has_no_end(template, content):
    tokenizer = ChatTokenizer(template, train(splits=True))
    before = [
        {"role": "user", "content": "123"}, {"role": "assistant", "content": "é"},
        {"role": "user", "content": "user"},
    ]  # fmt: skip
    cut = {"role": "assistant", "content": content} | CUT
    never = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "never"}]
    ids, mask = tokenize_conversation(tokenizer, [*before, cut, *never])
    prompt = tokenizer.render_chat(before)
    text = prompt + (content.strip() if template == LLAMA3 else content)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    assert ids.tolist() == encoding.ids
    first = len(tokenizer.render_chat(before[:1]))
    inside = {*range(first, first + len("é" + ENDS[template])), *range(len(prompt), len(text))}
    assert mask.tolist() == [start in inside for start, _ in encoding.offsets]
    assert sum(token in tokenizer.eos_token_ids for token in ids[mask]) == 1  # of the turn before


def test_conversation_without_an_assistant_turn_is_skipped(tmp_path, tokenizer):
    silent = [{"role": "user", "content": "The end"}]
    info = build_corpus(
        tokenizer, [silent, [*silent, {"role": "assistant", "content": "x"}]], tmp_path / "c", 50
    )
    assert (info.documents, info.skipped) == (1, 1)


def test_conversation_that_the_template_refuses_is_counted(tmp_path, tokenizer):
    render = tokenizer.render_chat

    def refuses(messages, add_generation_prompt=True):
        if messages[0]["content"] == "no":
            raise AquilineError("messages: refused by the chat template")
        return render(messages, add_generation_prompt)

    tokenizer.render_chat = refuses
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]
        for text in ("no", "The end")
    ]
    info = build_corpus(tokenizer, chats, tmp_path / "c", 50)
    assert (info.documents, info.skipped, info.refused) == (1, 0, 1)
    with pytest.raises(DataError, match="of 1 conversations the chat template refuses 1"):
        build_corpus(tokenizer, chats[:1], tmp_path / "d", 50)


def test_beginning_of_a_long_conversation_costs_little_and_is_the_same(tmp_path, tokenizer):
    """10 MB in one message, and 30,000 messages: only what is kept is rendered and tokenised."""
    short = [{"role": "user", "content": "a b " * 20}, {"role": "assistant", "content": "The end"}]
    talk = short * 15_000
    text = [short[0], {"role": "assistant", "content": "日本 The end. " * 800_000}, *short]
    started = time.perf_counter()
    build_corpus(tokenizer, [talk, text], tmp_path / "c", 300)
    assert time.perf_counter() - started < 5
    corpus = Corpus.open(tmp_path / "c")
    beginnings = talk[:20], [text[0], {"role": "assistant", "content": "日本 The end. " * 300}]
    for index, whole in enumerate(beginnings):
        ids, mask = tokenize_conversation(tokenizer, whole)
        np.testing.assert_array_equal(corpus.document(index)[0], ids[:300])
        np.testing.assert_array_equal(corpus.document(index)[1], mask[:300])


@pytest.mark.parametrize("damage", ["delete", "shorten", "format", "field"])
def test_damaged_corpus_is_refused(tmp_path, tokenizer, conversations, damage):
    folder = tmp_path / "c"
    build_corpus(tokenizer, conversations, folder, 50)
    meta = json.loads((folder / "meta.json").read_text())
    if damage == "delete":
        (folder / "mask-00000.npy").unlink()
    elif damage == "shorten":
        np.save(folder / "tokens-00000.npy", np.load(folder / "tokens-00000.npy")[:-1])
    else:
        meta |= {"format": 99} if damage == "format" else {"unknown": 1}
        (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="build it again"):
        Corpus.open(folder)


def test_fingerprint_tells_tokenizers_apart(tokenizer):
    prints = {tokenizer_fingerprint(ChatTokenizer(t, train(splits=s)))
              for t in (CHATML, LLAMA3) for s in (True, False)}  # fmt: skip
    assert len(prints) == 4
    assert tokenizer_fingerprint(tokenizer) in prints
