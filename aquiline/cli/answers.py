"""The engine as what ``training.regenerate`` asks: continuous batching over an open queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from aquiline.core.errors import AquilineError
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from aquiline.training.regenerate import Answer, Answerer, Ask, Finish

_REFILL = 8  # prompts join when this share of the rows is free: prefills in groups, full batches


def engine_answers(llm: LLM, max_tokens: int, top_p: float) -> Answerer:
    """Answers from the engine, in the order they are finished."""
    engine, rows = llm.engine, llm.engine.config.max_num_seqs

    def params(ask: Ask) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens, temperature=ask.temperature, top_p=top_p, seed=ask.seed
        )

    def answers(asks: deque[Ask], /) -> Iterator[tuple[Ask, Answer]]:
        running: dict[int, Ask] = {}
        while asks or running:
            if len(running) <= rows - max(1, rows // _REFILL):
                group: list[tuple[list[int], Ask]] = []
                while asks and len(running) + len(group) < rows:
                    ask = asks.popleft()
                    try:
                        group.append((llm.tokenizer.encode_chat(ask.messages), ask))
                    except AquilineError:  # the template does not allow it
                        yield ask, Answer("", 0, "refused")
                for prompt, ask in sorted(group, key=lambda one: len(one[0])):  # little padding
                    if len(prompt) < engine.max_model_len:
                        running[engine.add_request(prompt, params(ask))] = ask
                    else:
                        yield ask, Answer("", 0, "refused")
            for output in engine.step() if running else ():
                if output.finished:
                    said = output.outputs[0]
                    cut: Finish = "length" if said.finish_reason == "length" else "stop"
                    answer = Answer(said.text, len(said.token_ids), cut)
                    yield running.pop(output.request_id), answer

    return answers
