"""Small real tokenizers (byte-level BPE trained on a few lines) with two chat templates."""

from collections.abc import Sequence

import jinja2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}\
{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """{% for m in messages %}{% if loop.first %}{{ '<|begin|>' }}{% endif %}\
{{ '<|header|>' + m['role'] + '<|/header|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"""
NOT_BY_PREFIX = "{{ messages | length }}" + CHATML
SPECIALS = [
    "<|end|>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|header|>", "<|/header|>", "<|eot|>",
]  # fmt: skip
LINES = [
    "user\n\n\nThe assistant\n\n sees\n \n日本 Größe 😀.<",
    "assistant\n\n\n\n  The end.\n\n\n",
    "\nT" * 20,
]


def train(specials: Sequence[str] = SPECIALS, splits: bool = False) -> Tokenizer:
    """A byte-level BPE; without ``splits`` its tokens run across words, lines and borders."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(specials),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 20, trainer)
    return tokenizer


class ChatTokenizer:
    """The interface of ``aquiline.text.tokenizer.Tokenizer`` over one of them."""

    def __init__(self, template: str, backend: Tokenizer | None = None) -> None:
        self.backend = backend or train()
        self.template = jinja2.Environment().from_string(template)
        self.vocab_size = self.backend.get_vocab_size()
        self.eos_token_ids = tuple(
            self.backend.token_to_id(name) for name in ("<|end|>", "<|im_end|>", "<|eot|>")
        )

    def encode(self, text, add_special_tokens=True):
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens=True):
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages, add_generation_prompt=True):
        assert messages
        return self.template.render(messages=messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages, add_generation_prompt=True):
        return self.encode(self.render_chat(messages, add_generation_prompt), False)
