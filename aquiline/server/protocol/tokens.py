"""/tokenize and /detokenize."""

from __future__ import annotations

from aquiline.core.errors import AquilineError
from aquiline.server.protocol.body import Body
from aquiline.server.protocol.chat import Message, Tool


class TokenizeRequest(Body):
    """A text, or a conversation through the chat template.

    ``add_special_tokens`` is for a text (default true); a template writes its own.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] = []
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    def check(self) -> None:
        """Raises AquilineError unless exactly one of prompt and messages is given."""
        if (self.prompt is None) == (self.messages is None):
            raise AquilineError("prompt: give it or messages, one of the two")
        if self.messages is not None and self.add_special_tokens:
            raise AquilineError("add_special_tokens: the chat template writes them; leave it out")


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[int]
