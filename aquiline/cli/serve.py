"""``aquiline serve``: an OpenAI-compatible server. The flags are vLLM's where vLLM has them."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

from aquiline.cli import options
from aquiline.core.errors import AquilineError
from aquiline.engine.async_llm import AsyncLLM
from aquiline.models.registry import shipped_draft

_AUTO = "auto"
_NAMES = typer.Option(help="Name that clients ask for; repeatable; default: MODEL.")
_KEYS = typer.Option(help="Key that clients must bring; repeatable; or $AQUILINE_API_KEY.")
_LISTS = typer.Option(help="CORS: a JSON list, such as '[\"*\"]'.")


def serve(
    model: options.Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 is any free one.")] = 8000,
    served_model_name: Annotated[list[str] | None, _NAMES] = None,
    api_key: Annotated[list[str] | None, _KEYS] = None,
    dtype: options.Dtype = "auto",
    speculative_config: Annotated[
        str, typer.Option(help="JSON, see the README; auto: the shipped draft; none: plain.")
    ] = _AUTO,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and text.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Choices that run at once.")] = 16,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of prompts that a step runs at most.")
    ] = None,
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Reuse the cache of texts that begin alike.")
    ] = True,
    max_waiting: Annotated[int, typer.Option(help="Choices that may wait; beyond: 429.")] = 1024,
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks.")] = 1,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the card.")] = 0.8,
    kv_cache_tokens: Annotated[int | None, typer.Option(help="Size of the KV cache.")] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Of a request; beyond: 413.")] = 8 * 2**20,
    tool_call_parser: Annotated[
        str, typer.Option(help="auto (by the chat template), llama3_json or hermes.")
    ] = _AUTO,
    enable_log_requests: Annotated[
        bool, typer.Option(help="Put prompts and answers into the log.")
    ] = False,
    allowed_origins: Annotated[str, _LISTS] = "[]",
    allowed_methods: Annotated[str, _LISTS] = '["*"]',
    allowed_headers: Annotated[str, _LISTS] = '["*"]',
    allow_credentials: Annotated[bool, typer.Option(help="CORS: let cookies through.")] = False,
    shutdown_timeout: Annotated[
        int | None, typer.Option(help="Seconds for running requests after SIGTERM.")
    ] = None,
) -> None:
    """Serve a model over HTTP: /v1/chat/completions, /v1/completions, /v1/models, /tokenize,
    /detokenize, /health, /metrics, /version, and a page to chat on at /."""
    try:
        from aquiline.server.run import run
        from aquiline.server.settings import Settings
    except ModuleNotFoundError as error:
        raise AquilineError(
            f"{error.name}: it is not installed; run pip install 'aquiline[serve]'"
        ) from None
    environment = os.environ.get("AQUILINE_API_KEY")
    settings = Settings(
        tuple(served_model_name or (model,)), host, port,
        tuple(api_key or ([environment] if environment else ())), max_body_bytes,
        enable_log_requests, _list("--allowed-origins", allowed_origins),
        _list("--allowed-methods", allowed_methods), _list("--allowed-headers", allowed_headers),
        allow_credentials, tool_call_parser, shutdown_timeout,
    )  # fmt: skip
    llm = AsyncLLM(
        model, dtype, _speculation(model, speculative_config), max_waiting,  # type: ignore[arg-type]
        max_model_len=max_model_len, max_num_seqs=max_num_seqs, kv_cache_tokens=kv_cache_tokens,
        max_num_batched_tokens=max_num_batched_tokens, enable_prefix_caching=enable_prefix_caching,
        tensor_parallel_size=tensor_parallel_size, gpu_memory_utilization=gpu_memory_utilization,
    )  # fmt: skip
    run(llm, settings)


def _speculation(model: str, given: str) -> dict[str, Any] | None:
    if given == _AUTO:
        return {} if shipped_draft(model) is not None else None
    if given == "none":
        return None
    try:
        config = json.loads(given)
    except ValueError as error:
        raise AquilineError(f"--speculative-config {given}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise AquilineError(f"--speculative-config {given}: give a JSON object")
    return config


def _list(flag: str, given: str) -> tuple[str, ...]:
    try:
        values = json.loads(given)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise AquilineError(f"{flag} {given}: give a JSON list of texts, such as '[\"*\"]'")
    return tuple(values)
