"""The sampling fields of a completion: OpenAI's, and vLLM's beyond them.

Types are checked here, ranges and combinations by SamplingParams, whose field names the errors use.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from aquiline.core.errors import AquilineError
from aquiline.core.guided_params import StructuredOutput
from aquiline.core.params import MAX_CHOICES, MAX_LOGPROBS, MAX_SEED, MAX_TEMPERATURE
from aquiline.server.protocol.body import ANY, Body, NoOps

COMMON_NO_OPS: NoOps = {
    "user": ANY, "metadata": ANY, "safety_identifier": ANY, "prompt_cache_key": ANY,
    "store": (False,), "service_tier": ("auto", "default"), "best_of": (1,),
    "use_beam_search": (False,), "length_penalty": (1, 1.0), "echo": (False,),
    "include_stop_str_in_output": (False,), "spaces_between_special_tokens": (True,),
    "priority": (0,), "return_tokens_as_token_ids": (False,), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "detokenize": (True,),
}  # fmt: skip
_GUIDED = ("json", "regex", "choice", "grammar")


def ranged(default: Any, low: float, high: float) -> Any:
    """A field whose range the OpenAPI document tells; SamplingParams is the one to check it."""
    return Field(default, json_schema_extra={"minimum": low, "maximum": high})


class StreamOptions(Body):
    """``continuous_usage_stats``: the usage so far in every chunk."""

    no_ops = {"include_obfuscation": (False,)}
    include_usage: bool = False
    continuous_usage_stats: bool = False


class StructuredOutputs(Body):
    """vLLM's way to ask for a form; exactly one field."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class SamplingFields(Body):
    """What both kinds of completion share."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = ranged(1, 1, MAX_CHOICES)
    max_tokens: int | None = Field(None, json_schema_extra={"minimum": 1})
    temperature: float | None = ranged(None, 0, MAX_TEMPERATURE)
    top_p: float | None = ranged(None, 1e-9, 1)
    seed: int | None = ranged(None, 0, MAX_SEED)
    stop: str | list[str] = []
    presence_penalty: float = ranged(0.0, -2, 2)
    frequency_penalty: float = ranged(0.0, -2, 2)
    logit_bias: dict[str, float] | None = None
    top_k: int | None = Field(None, description="0 or -1 keeps all.")
    min_p: float | None = ranged(None, 0, 1)
    repetition_penalty: float = ranged(1.0, 0.01, 100)
    min_tokens: int = Field(0, json_schema_extra={"minimum": 0})
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = ranged(None, 0, MAX_LOGPROBS)
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    speculation: bool = Field(True, description="False: decode without speculation.")
    return_speculation: bool = Field(
        False,
        description="Add what speculation did: statistics, and in chunks each token's depth and the"
        " tree in use.",
    )

    @property
    def wants_last_chunk(self) -> bool:
        """Whether a stream ends with a chunk without choices."""
        options = self.stream_options
        return self.return_speculation or (options is not None and options.include_usage)

    def sampling(self) -> dict[str, Any]:
        """As arguments of SamplingParams, those left out that were not given."""
        if self.stream_options is not None and not self.stream:
            raise AquilineError("stream_options: they go with stream=true; add it, or leave them")
        if self.prompt_logprobs is not None and self.stream:
            raise AquilineError("prompt_logprobs: not served in a stream; set stream=false")
        given: dict[str, Any] = {
            "n": self.n, "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty, "min_tokens": self.min_tokens,
            "repetition_penalty": self.repetition_penalty, "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens, "bad_words": tuple(self.bad_words),
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            "stop_token_ids": tuple(self.stop_token_ids), "seed": self.seed,
            "prompt_logprobs": self.prompt_logprobs, "temperature": self.temperature,
            "top_p": self.top_p, "min_p": self.min_p, "allowed_token_ids": self.allowed_token_ids,
            "top_k": 0 if self.top_k == -1 else self.top_k, "logit_bias": self._bias(),
            "structured_outputs": self._form(), "speculation": self.speculation,
        }  # fmt: skip
        return {name: value for name, value in given.items() if value is not None}

    def _bias(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        wrong = [key for key in self.logit_bias if not (key.isascii() and key.isdigit())]
        if wrong or max(map(len, self.logit_bias), default=0) > 18:
            raise AquilineError("logit_bias: its keys must be token ids, such as '5'")
        return {int(key): bias for key, bias in self.logit_bias.items()}

    def _form(self) -> StructuredOutput | None:
        guided = {name: getattr(self, f"guided_{name}") for name in _GUIDED}
        given = {name: value for name, value in guided.items() if value is not None}
        if self.structured_outputs is not None:
            if given:
                raise AquilineError("structured_outputs: give it, or guided_*, not both")
            given = self.structured_outputs.model_dump(by_alias=True, exclude_none=True)
            return StructuredOutput(**given)
        return StructuredOutput(**given) if given else None
