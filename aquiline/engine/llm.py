"""LLM: the offline door, in the shape that users of vLLM know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aquiline.core.errors import AquilineError
from aquiline.core.heap import settled_heap
from aquiline.core.outputs import RequestOutput
from aquiline.core.params import SamplingParams
from aquiline.engine.config import DtypeName, EngineConfig
from aquiline.engine.engine import Engine
from aquiline.engine.loader import load

Prompt = str | Mapping[str, Sequence[int]]
Messages = Sequence[Mapping[str, str]]


class LLM:
    """A loaded model that generates text.

    Args:
        model: a built-in name, a Hugging Face folder, or a GGUF file.
        dtype, max_model_len, max_num_seqs, ...: see EngineConfig.
        speculative_config: None is plain decoding; else a mapping, see SpeculationParams.

    Raises:
        AquilineError: bad input; one line that names the field and the remedy.
    """

    def __init__(
        self,
        model: str,
        dtype: DtypeName = "auto",
        speculative_config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        config = EngineConfig.of(model, dtype, speculative_config, options)
        loaded = load(config)
        self.engine = Engine(config, loaded)
        self.tokenizer = loaded.tokenizer
        self._defaults = loaded.sampling_defaults

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """The checkpoint's sampling defaults with ``changes``."""
        return SamplingParams(**{**self._defaults, **changes})

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue texts or token lists ({"prompt_token_ids": [...]}), in order.

        ``sampling_params`` is one for all, one for each, or None for the checkpoint's defaults.
        """
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        return self._run([self._encode(prompt) for prompt in many], sampling_params)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the checkpoint's chat template."""
        if not messages:
            raise AquilineError("messages: there are none; give at least one")
        many = [messages] if isinstance(messages[0], Mapping) else messages
        prompts = [self.tokenizer.encode_chat([dict(m) for m in one]) for one in many]  # type: ignore[arg-type]
        return self._run(prompts, sampling_params)

    def stream(
        self, prompt: Prompt | Messages, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """The same for one prompt or conversation, step by step as tokens arrive."""
        if isinstance(prompt, str | Mapping):
            tokens = self._encode(prompt)
        else:
            tokens = self.tokenizer.encode_chat([dict(m) for m in prompt])
        params = sampling_params or self.default_sampling_params()
        request = self.engine.add_request(tokens, params)
        finished = False
        try:
            while not finished:
                for output in self.engine.step():
                    if output.request_id == request:
                        finished = output.finished
                        yield output
        finally:
            self.engine.abort(request)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if set(prompt) != {"prompt_token_ids"}:
            raise AquilineError("prompt: give a text or {'prompt_token_ids': [...]}")
        return list(prompt["prompt_token_ids"])

    def _run(
        self,
        prompts: list[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[RequestOutput]:
        params = sampling_params or self.default_sampling_params()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise AquilineError(
                f"sampling_params: {len(each)} for {len(prompts)} prompts; give one, or one each"
            )
        ids = []
        try:
            for tokens, one in zip(prompts, each, strict=True):
                ids.append(self.engine.add_request(tokens, one))
            done: dict[int, RequestOutput] = {}
            with settled_heap():
                while len(done) < len(ids):
                    done |= {out.request_id: out for out in self.engine.step() if out.finished}
        except BaseException:
            for request in ids:
                self.engine.abort(request)
            raise
        return [done[request] for request in ids]
