"""Tokenizer: the built-in's GGUF tokenizer, tiny GGUF files of other kinds, and HF folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tokenizers.processors import TemplateProcessing
from transformers import Qwen2Tokenizer

from aquiline.core.errors import AquilineError, CheckpointError
from aquiline.models.registry import resolve
from aquiline.text.tokenizer import Tokenizer, load_tokenizer

ALPHABET = sorted(ByteLevel.alphabet())
MERGES = ["1 2", "12 3", "123 4", "Ġ w", "o r", "Ġw or", "H e"]
SPECIAL = ["<s>", "</s>", "<turn>", "<tool>"]
TOKENS = ALPHABET + [merge.replace(" ", "") for merge in MERGES] + SPECIAL
BOS, EOS, EOT = (TOKENS.index(token) for token in SPECIAL[:3])
SAMPLES = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces \n\n\tand tabs\r\n",
    "it's we'll I'M DON'T",
    "x = 12345.678e-9 # 2024",
    "def f(a, b):\n    return a + b\n",
    "Grüße, naïve café",
    "नमस्ते दुनिया",
    "你好,世界。",
    "👨‍👩‍👧 🇫🇷 🤷🏽‍♀️",
    "שלום مرحبا",
]


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    return load_tokenizer(resolve("smollm2-135m-instruct"))


def write_gguf(path: Path, pre: str, tokens: list[str] = TOKENS, **more: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(more.get("model", "gpt2"))
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    kinds = {"<tool>": gguf.TokenType.USER_DEFINED, **dict.fromkeys(SPECIAL[:3], 3)}
    writer.add_token_types([int(kinds.get(token, gguf.TokenType.NORMAL)) for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(EOT)
    if "add_bos" in more:
        writer.add_add_bos_token(more["add_bos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_folder(folder: Path, template: str | None = None, **config: Any) -> Path:
    """An HF folder whose tokenizer puts <s> before a text and splits digits one by one."""
    backend = Backend(BPE({t: i for i, t in enumerate(TOKENS)}, [tuple(m.split()) for m in MERGES]))
    backend.pre_tokenizer = Sequence([Digits(True), ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    backend.enable_truncation(3)
    backend.save(str(folder / "tokenizer.json"))
    saved = {"bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": True}
    saved |= {"tokenizer_class": "Qwen2Tokenizer", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(saved))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **config}))
    return folder


def test_smollm_facts(smollm: Tokenizer) -> None:
    assert smollm.vocab_size == 49152
    assert smollm.bos_token_id == 1
    assert smollm.eos_token_ids == (2,)
    assert smollm.special_token_ids == frozenset(range(17))
    assert smollm.has_chat_template


@pytest.mark.parametrize("text", SAMPLES)
def test_smollm_round_trip(smollm: Tokenizer, text: str) -> None:
    assert smollm.decode(smollm.encode(text)) == text


def test_smollm_special_tokens_are_single_ids(smollm: Tokenizer) -> None:
    assert smollm.encode("<|im_start|>") == [1]
    ids = smollm.encode("<|im_start|>user\nHi<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert smollm.decode(ids) == "user\nHi"
    assert smollm.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nHi<|im_end|>"


def test_smollm_splits_digits(smollm: Tokenizer) -> None:
    assert [smollm.decode([i]) for i in smollm.encode("12345")] == list("12345")


def test_smollm_words(smollm: Tokenizer) -> None:
    pieces = [smollm.decode([i]) for i in smollm.encode("The capital of France isn't Lyon.")]
    assert pieces == ["The", " capital", " of", " France", " isn", "'t", " Lyon", "."]


def test_smollm_does_not_clean_up_spaces(smollm: Tokenizer) -> None:
    assert smollm.decode(smollm.encode("a , b .  do n't")) == "a , b .  do n't"


def test_smollm_chat_keeps_the_default_system_message(smollm: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = smollm.render_chat(messages)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm.render_chat(messages, add_generation_prompt=False) == text[:-22]
    ids = smollm.encode_chat(messages)
    assert smollm.decode(ids, skip_special_tokens=False) == text
    assert ids.count(1) == 3
    own = [{"role": "system", "content": "Be brief."}, *messages]
    assert smollm.render_chat(own).startswith("<|im_start|>system\nBe brief.<|im_end|>")


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages"),
        ([{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}], r"\[1\]\.role='bot'"),
        ([{"content": "a"}], r"\[0\]\.role=None"),
        ([{"role": "user"}], r"\[0\]\.content=None"),
        ([{"role": "user", "content": 3}], r"\[0\]\.content=3"),
    ],
)
def test_bad_messages_are_named(smollm: Tokenizer, messages: Any, named: str) -> None:
    with pytest.raises(AquilineError, match=named):
        smollm.render_chat(messages)


@pytest.mark.parametrize("text", SAMPLES)
def test_qwen2_gguf_equals_the_original(tmp_path: Path, text: str) -> None:
    ours = load_tokenizer(write_gguf(tmp_path / "t.gguf", "qwen2"))
    vocab = {token: index for index, token in enumerate(TOKENS)}
    theirs = Qwen2Tokenizer(vocab, [tuple(m.split()) for m in MERGES], unk_token=None,
                            eos_token="</s>", pad_token=None)  # fmt: skip
    assert ours.encode(text) == theirs.encode(text)


def test_qwen2_gguf_normalises(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", "qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert tokenizer.encode("1234") == [TOKENS.index(digit) for digit in "1234"]


def test_llama_bpe_gguf(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", "llama-bpe"))
    expected = ["<s>", "123", "4", "Ġwor", "<turn>", "<tool>"]
    ids = tokenizer.encode("1234 wor<turn><tool>")
    assert [TOKENS[i] for i in ids] == expected
    assert tokenizer.decode(ids) == "1234 wor<tool>"
    assert tokenizer.eos_token_ids == (EOS, EOT)
    assert tokenizer.encode("1", add_special_tokens=False) == [TOKENS.index("1")]


def test_llama_bpe_takes_whole_words_first(tmp_path: Path) -> None:
    tokens = [*TOKENS, "xyz"]  # no merges lead to it
    llama = load_tokenizer(write_gguf(tmp_path / "l.gguf", "llama-bpe", tokens))
    qwen2 = load_tokenizer(write_gguf(tmp_path / "q.gguf", "qwen2", tokens))
    assert llama.encode("xyz", add_special_tokens=False) == [len(TOKENS)]
    assert len(qwen2.encode("xyz")) == 3


def test_gguf_says_whether_bos_is_added(tmp_path: Path) -> None:
    with_bos = load_tokenizer(write_gguf(tmp_path / "a.gguf", "qwen2", add_bos=True))
    without = load_tokenizer(write_gguf(tmp_path / "b.gguf", "llama-bpe", add_bos=False))
    assert with_bos.encode("1") == [BOS, *without.encode("1")]


@pytest.mark.parametrize(
    ("pre", "model", "named"),
    [("deepseek-llm", "gpt2", "deepseek-llm"), ("default", "llama", "ggml.model='llama'")],
)
def test_unknown_gguf_tokenizers_are_refused(
    tmp_path: Path, pre: str, model: str, named: str
) -> None:
    with pytest.raises(CheckpointError, match=named):
        load_tokenizer(write_gguf(tmp_path / "t.gguf", pre, model=model))


def test_broken_gguf_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "t.gguf", "qwen2")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="not a complete GGUF"):
        load_tokenizer(file)
    with pytest.raises(CheckpointError, match=r"absent\.gguf"):
        load_tokenizer(tmp_path / "absent.gguf")


def test_folder_is_read_as_written(tmp_path: Path) -> None:
    """Its class claims Qwen2's splitting rule, and it truncates: neither may leak in."""
    tokenizer = load_tokenizer(write_folder(tmp_path))
    assert [TOKENS[i] for i in tokenizer.encode("1234 wor")] == ["<s>", *"1234", "Ġwor"]
    assert tokenizer.decode(tokenizer.encode("He , He .")) == "He , He ."


def test_never_a_double_bos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path))
    assert tokenizer.encode("He") == tokenizer.encode("<s>He") == [BOS, TOKENS.index("He")]
    assert tokenizer.encode("<s><s>He")[:3] == [BOS, BOS, TOKENS.index("He")]
    assert tokenizer.encode("<s>", add_special_tokens=False) == [BOS]


def test_a_template_decides_about_bos(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}<turn>{{ m.content }}{% endfor %}"
    tokenizer = load_tokenizer(write_folder(tmp_path, template))
    ids = tokenizer.encode_chat([{"role": "user", "content": "He"}])
    assert ids == [BOS, EOT, TOKENS.index("He")]


def test_template_errors_and_absence(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "He"}]
    with pytest.raises(AquilineError, match="chat_template"):
        load_tokenizer(write_folder(tmp_path)).render_chat(messages)
    refusing = write_folder(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(AquilineError, match="roles must alternate"):
        load_tokenizer(refusing).render_chat(messages)


def test_end_tokens_come_from_every_file(tmp_path: Path) -> None:
    write_folder(tmp_path, eos_token_id=EOT)
    assert load_tokenizer(tmp_path).eos_token_ids == (EOT, EOS)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, EOT]}))
    assert load_tokenizer(tmp_path).eos_token_ids == (7, EOT, EOS)


@pytest.mark.parametrize("content", [None, "{", '{"model": 1}'])
def test_unreadable_folders_are_named(tmp_path: Path, content: str | None) -> None:
    write_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
