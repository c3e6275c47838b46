"""Request: one prompt to continue, as the engine receives it."""

from __future__ import annotations

from dataclasses import dataclass

from aquiline.core.params import SamplingParams


@dataclass(frozen=True)
class Request:
    """``seed`` is the params' own, or one derived for this request."""

    id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
