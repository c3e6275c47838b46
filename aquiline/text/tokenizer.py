"""Text to token ids and back, and conversations to prompts, exactly as the checkpoint says.

A thin wrapper around the checkpoint's own fast tokenizer. It adds three guarantees: never two BOS
in a row, no clean-up of spaces on decoding, and a chat template's output encoded as it stands (the
template, not the tokenizer, decides about BOS).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from aquiline.core.errors import AquilineError, CheckpointError
from aquiline.text.gguf_tokenizer import load_gguf_tokenizer
from aquiline.text.token_bytes import token_bytes

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")


class Tokenizer:
    """The tokenizer of one checkpoint.

    Attributes:
        vocab_size: number of token ids, added tokens included; the model's may be padded beyond.
        bos_token_id: None if the checkpoint has none.
        eos_token_ids: every token that ends a turn or a text, none twice.
        special_token_ids: what ``skip_special_tokens`` leaves out.
        has_chat_template: whether ``render_chat`` can be used.
    """

    def __init__(self, fast: PreTrainedTokenizerFast, eos_token_ids: Iterable[int]) -> None:
        self._fast = fast
        self._backend = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = len(fast)
        self.bos_token_id: int | None = fast.bos_token_id
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        added = self._backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self.has_chat_template = bool(fast.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; a text that spells the BOS token itself gets no second one."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        spelled = self._fast.bos_token is not None and text.startswith(self._fast.bos_token)
        if spelled and add_special_tokens and ids[:2] == [self.bos_token_id] * 2:
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self) -> list[bytes]:
        """The bytes of every token; none for those that ``special_token_ids`` names."""
        return token_bytes(self._backend, self.vocab_size)

    @property
    def chat_template(self) -> str:
        """The template's source; empty if the checkpoint has none."""
        template = self._fast.chat_template
        return template if isinstance(template, str) else ""

    @property
    def template_takes_tools(self) -> bool:
        """Whether the chat template writes the tools that it is given."""
        return re.search(r"\btools\b", self.chat_template) is not None

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Message] | None = None,
    ) -> str:
        """The conversation as the text the model was trained on.

        ``tools`` are in OpenAI's form; a template that does not take them ignores them. An
        assistant's message with ``tool_calls`` may have no content.

        Raises:
            AquilineError: no template, a message without a known role or without text, or a
                conversation that the template itself refuses.
        """
        if not self.has_chat_template:
            raise AquilineError(
                "chat_template: the checkpoint has none; send a plain prompt or use a chat model"
            )
        _validate(messages)
        try:
            text: str = self._fast.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
            )
        except Exception as error:  # a template is a program of somebody else's
            reason = str(error) or type(error).__name__
            raise AquilineError(f"messages: refused by the chat template: {reason}") from None
        return text

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Message] | None = None,
    ) -> list[int]:
        """Token ids of ``render_chat``, with no special token that the template did not write."""
        return self.encode(self.render_chat(messages, add_generation_prompt, tools), False)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or a ``.gguf`` file.

    Raises:
        CheckpointError: there is none, it cannot be read, or its kind is not implemented.
    """
    if path.suffix == ".gguf":
        gguf = load_gguf_tokenizer(path)
        return Tokenizer(gguf.fast, gguf.eos_token_ids)
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"{path}: tokenizer.json is missing; add the checkpoint's own")
    # Not AutoTokenizer: it puts its class's own splitting rule in place of tokenizer.json's.
    try:
        fast = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises many kinds, from json's to Rust's bare one
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: the tokenizer cannot be read ({reason}); download tokenizer.json again"
        ) from None
    eos = [*_eos(path / "generation_config.json"), *_eos(path / "config.json")]
    return Tokenizer(fast, [*eos, *([] if fast.eos_token_id is None else [fast.eos_token_id])])


def _eos(file: Path) -> list[int]:
    """``eos_token_id`` of a JSON file: one, several, or none (also if there is no file)."""
    if not file.exists():
        return []
    try:
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); download it again") from None
    ids = ids if isinstance(ids, list) else [ids]
    return [index for index in ids if index is not None]


def _validate(messages: Sequence[Message]) -> None:
    if not messages:
        raise AquilineError("messages: the list is empty; give at least one message")
    for index, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise AquilineError(f"messages[{index}].role={role!r}: give one of {ROLES}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise AquilineError(
                f"messages[{index}].content={message.get('content')!r}: give a string"
            )
