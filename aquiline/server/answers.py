"""Parts that the answers of both kinds of completion share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aquiline.core.outputs import (
    Delta,
    Logprob,
    Logprobs,
    PromptLogprobs,
    RequestOutput,
    SpeculationStats,
)


def usage(prompt_tokens: int, cached_tokens: int, tokens: int) -> dict[str, Any]:
    """Counts of tokens; ``cached_tokens`` of the prompt's came from the prefix cache."""
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }  # fmt: skip


def usage_of(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Of finished requests."""
    cached = sum(output.num_cached_tokens for output in outputs)
    tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return usage(sum(len(output.prompt_token_ids) for output in outputs), cached, tokens)


def speculation(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """What speculation did, over several requests."""
    stats = SpeculationStats.sum(output.speculation for output in outputs)
    return {
        "rounds": stats.rounds, "tokens": stats.tokens, "drafted": stats.drafted,
        "accepted_by_depth": stats.accepted_by_depth, "depths": stats.depths,
        "tokens_per_call": round(stats.tokens_per_call, 4),
    }  # fmt: skip


def chunk_speculation(delta: Delta, token_bytes: Sequence[bytes]) -> dict[str, Any]:
    """What a chunk's choice tells of it: of each token the tree depth and the bytes (none for a
    special token), the tree that was verified, and the tokens per call so far."""
    return {
        "depths": delta.depths,
        "bytes": [list(b"".join(token_bytes[token : token + 1])) for token in delta.token_ids],
        "tree": delta.tree and {"paths": delta.tree.paths, "retrieved": delta.tree.retrieved},
        "tokens_per_call": round(delta.counts.tokens_per_call, 4),
    }  # fmt: skip


def chat_logprobs(
    logprobs: Sequence[Logprobs], top: int, token_bytes: Sequence[bytes]
) -> dict[str, Any]:
    """``logprobs`` of a chat's choice; ``top`` alternatives beside each token."""

    def shown(token: int, one: Logprob) -> dict[str, Any]:
        known = token_bytes[token] if token < len(token_bytes) else b""
        return {
            "token": one.decoded_token, "logprob": one.logprob,
            "bytes": list(known or one.decoded_token.encode()),
        }  # fmt: skip

    content = []
    for position in logprobs:
        said = next(iter(position))
        best = sorted(position.items(), key=lambda item: item[1].rank)[:top]
        content.append(
            {**shown(said, position[said]), "top_logprobs": [shown(*item) for item in best]}
        )
    return {"content": content, "refusal": None}


def text_logprobs(logprobs: Sequence[Logprobs], offset: int) -> dict[str, Any]:
    """``logprobs`` of a text's choice, its first token at character ``offset``."""
    tokens, values, tops, offsets = [], [], [], []
    for position in logprobs:
        said = next(iter(position.values()))
        tokens.append(said.decoded_token)
        values.append(said.logprob)
        tops.append({one.decoded_token: one.logprob for one in position.values()})
        offsets.append(offset)
        offset += len(said.decoded_token)
    return {
        "tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets
    }  # fmt: skip


def prompt_logprobs(prompt: PromptLogprobs) -> list[dict[str, Any] | None]:
    """vLLM's form: by token id."""
    return [None if position is None else _by_id(position) for position in prompt]


def _by_id(position: Logprobs) -> dict[str, Any]:
    return {
        str(token): {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.decoded_token}
        for token, one in position.items()
    }
