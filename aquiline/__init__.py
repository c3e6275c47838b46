"""aquiline trains EAGLE drafts for Llama-family models and serves those models with them."""

from aquiline.core.errors import AquilineError
from aquiline.core.outputs import CompletionOutput, Logprob, RequestOutput, SpeculationStats
from aquiline.core.params import SamplingParams, SpeculationParams
from aquiline.engine.async_llm import AsyncLLM
from aquiline.engine.llm import LLM

__all__ = [
    "LLM", "AquilineError", "AsyncLLM", "CompletionOutput", "Logprob", "RequestOutput",
    "SamplingParams", "SpeculationParams", "SpeculationStats",
]  # fmt: skip
