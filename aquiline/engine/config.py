"""EngineConfig: what the engine is built from, validated before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from aquiline.core.errors import AquilineError
from aquiline.core.params import SpeculationParams

DtypeName = Literal["auto", "float32", "bfloat16", "float64"]
DTYPES = get_args(DtypeName)


class PrefillBudget(NamedTuple):
    """Tokens of prompts, padding included, that a step runs at most: while nobody decodes, and in
    turn with rounds, when everybody who decodes waits for it."""

    alone: int
    beside_rounds: int


PREFILL_BUDGETS = {"cpu": PrefillBudget(512, 128), "cuda": PrefillBudget(16384, 512)}


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and choices of one engine.

    Attributes:
        model: a built-in name, a Hugging Face folder, or a GGUF file.
        dtype: "auto" is bfloat16 where the device multiplies it natively, else float32.
        device: "auto" is CUDA where there is one.
        max_model_len: tokens of prompt and text together; None takes the model's own limit, or its
            sliding window where that is less.
        max_num_seqs: requests in a running batch at most.
        page_size: tokens a page of the KV cache.
        max_num_batched_tokens: tokens of prompts that a step runs at most; None is 128 on the CPU
            and 512 on CUDA while others decode, else 512 and 16384.
        enable_prefix_caching: reuse the cache pages of a text that begins like an earlier one.
        kv_cache_tokens: size of the KV cache; None is one full context, or a fair batch's worth.
        gpu_memory_utilization: on CUDA, the share of the card that weights and cache may fill.
        speculation: None is plain decoding.
    """

    model: str
    dtype: DtypeName = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 16
    page_size: int = 128
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    kv_cache_tokens: int | None = None
    gpu_memory_utilization: float = 0.8
    tensor_parallel_size: int = 1
    speculation: SpeculationParams | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise AquilineError(f"dtype={self.dtype!r}: one of {DTYPES}")
        sizes = "max_model_len", "max_num_seqs", "page_size", "kv_cache_tokens"
        for name in (*sizes, "max_num_batched_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AquilineError(f"{name}={value}: give a positive number")
        if self.tensor_parallel_size != 1:
            raise AquilineError(
                f"tensor_parallel_size={self.tensor_parallel_size}: this version runs on one rank; "
                "give 1"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise AquilineError(
                f"gpu_memory_utilization={self.gpu_memory_utilization}: give a number in (0, 1]"
            )

    @classmethod
    def of(
        cls,
        model: str,
        dtype: DtypeName,
        speculative_config: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> EngineConfig:
        """From what users of vLLM pass; an unknown option is refused by name."""
        speculation = None
        if speculative_config is not None:
            speculation = SpeculationParams.from_config(speculative_config)
        try:
            return cls(model, dtype, speculation=speculation, **options)
        except TypeError as error:
            raise AquilineError(f"LLM: {error}; see EngineConfig for the options") from None

    def prefill_budget(self, device: str) -> PrefillBudget:
        """What was asked for, or what suits a kind of device."""
        limit = self.max_num_batched_tokens
        return PREFILL_BUDGETS[device] if limit is None else PrefillBudget(limit, limit)

    def pages(self, max_model_len: int, room: int, tokens: int | None = None) -> int:
        """Pages of the cache, the dustbin included.

        Args:
            room: slots that a round needs past the length.
            tokens: what the device has memory for, if that is known.

        Raises AquilineError if one request of ``max_model_len`` tokens would not fit.
        """
        one_request = math.ceil((max_model_len + room) / self.page_size)
        default = tokens or max(one_request * self.page_size, 32768)
        pages = math.ceil((self.kv_cache_tokens or default) / self.page_size)
        if pages < one_request:
            raise AquilineError(
                f"kv_cache_tokens={self.kv_cache_tokens or tokens}: one request of max_model_len="
                f"{max_model_len} tokens and its draft tree needs {one_request * self.page_size}; "
                "raise it or lower max_model_len"
            )
        return pages + 1
