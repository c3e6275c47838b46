"""/v1/completions: texts or tokens to continue."""

from __future__ import annotations

from typing import Any

from aquiline.core.errors import AquilineError
from aquiline.core.params import MAX_LOGPROBS
from aquiline.server.protocol.sampling import COMMON_NO_OPS, SamplingFields, ranged

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 256


class CompletionRequest(SamplingFields):
    """One prompt or several, each a text or token ids."""

    no_ops = COMMON_NO_OPS
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = ranged(None, 0, MAX_LOGPROBS)
    add_special_tokens: bool = True

    def prompts(self) -> list[str | list[int]]:
        """One a prompt."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt or (len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int)):
            raise AquilineError(f"prompt: give 1 to {MAX_PROMPTS} prompts, none without a token")
        if isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)

    def sampling(self) -> dict[str, Any]:
        """As arguments of SamplingParams."""
        limit = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        given = {**super().sampling(), "max_tokens": limit}
        return given if self.logprobs is None else {**given, "logprobs": self.logprobs}
