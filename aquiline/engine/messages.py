"""What a process and the engine process below it say to each other.

Commands go down (Submit, Abort), reports come up (Ready or Failed once, then Admitted, Refused and
Progress). A report holds what is new since the one before, so that a step costs nothing that grows
with the texts.
"""

from __future__ import annotations

from dataclasses import dataclass

from aquiline.core.outputs import Delta, PromptLogprobs
from aquiline.core.params import SamplingParams
from aquiline.engine.sequence import Said


@dataclass(frozen=True)
class Submit:
    """A request; ``params.seed`` is fixed. ``said``: see Engine.add_request."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    said: tuple[Said, ...] = ()


@dataclass(frozen=True)
class Abort:
    """End a request; no report about it follows."""

    request_id: int


@dataclass(frozen=True)
class Ready:
    """The model is loaded.

    Attributes:
        sampling_defaults: the checkpoint's own, by the names of SamplingParams.
    """

    max_model_len: int
    vocab_size: int
    sampling_defaults: dict[str, object]


@dataclass(frozen=True)
class Failed:
    """The model cannot be loaded; the process ends."""

    message: str


@dataclass(frozen=True)
class Admitted:
    """The request is queued."""

    request_id: int


@dataclass(frozen=True)
class Refused:
    """The request cannot run."""

    request_id: int
    message: str


@dataclass(frozen=True)
class Update:
    """What a step added to one request."""

    request_id: int
    finished: bool
    deltas: tuple[Delta, ...]
    num_cached_tokens: int
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True)
class Load:
    """How full the engine is: choices running and waiting, and the share of the KV cache's pages
    that is taken."""

    running: int = 0
    waiting: int = 0
    cache_usage: float = 0.0


@dataclass(frozen=True)
class Progress:
    """A step was done, or requests came and went."""

    updates: tuple[Update, ...]
    load: Load


Command = Submit | Abort
Report = Ready | Failed | Admitted | Refused | Progress
