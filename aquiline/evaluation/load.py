"""A load: which requests reach a server, and when.

open     each request has an arrival time, from a rate (Poisson or fixed) or a recorded trace
closed   no times: the next request goes out when one of ``concurrency`` has been answered
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from aquiline.core.errors import AquilineError, DataError
from aquiline.evaluation.tasks import load_task

Arrivals = Literal["poisson", "fixed"]
T = TypeVar("T")
ARRIVALS = get_args(Arrivals)
RANDOM_IDS = 256, 32000  # token ids of random prompts: words in any tokenizer served here


@dataclass(frozen=True)
class Planned:
    """One request.

    Attributes:
        prompt: messages of a chat, a text to continue, or its token ids.
        max_tokens: None leaves the load's own.
        at: seconds after the start; None in a closed load.
        seed: None leaves it to the server.
    """

    prompt: tuple[Mapping[str, Any], ...] | str | tuple[int, ...]
    max_tokens: int | None = None
    at: float | None = None
    seed: int | None = None

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str) and isinstance(self.prompt[0], Mapping)


def task_prompts(name: str) -> list[Planned]:
    """First turns of a benchmark (``evaluation.tasks``), as chats."""
    return [Planned(({"role": "user", "content": one.turns[0]},)) for one in load_task(name)]


def file_prompts(path: Path) -> list[Planned]:
    """JSON lines: ``messages`` or ``prompt`` (a text), and ``max_tokens`` where it is a line's own.

    Raises DataError with the file and the line.
    """

    def parse(row: Mapping[str, Any]) -> Planned:
        messages, prompt, limit = row.get("messages"), row.get("prompt"), row.get("max_tokens")
        if not (limit is None or _is_count(limit)):
            raise ValueError("max_tokens must be at least 1")
        if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
            return Planned(tuple(messages), limit)
        if isinstance(prompt, str) and prompt:
            return Planned(prompt, limit)
        raise ValueError("it needs messages or a prompt")

    return list(_parsed(path, parse))


def random_prompts(count: int, tokens: int, seed: int) -> list[Planned]:
    """Prompts of so many random token ids each; what is said about them means nothing."""
    ids = np.random.default_rng(seed).integers(*RANDOM_IDS, size=(count, tokens))
    return [Planned(tuple(row)) for row in ids.tolist()]


def trace(path: Path, seed: int) -> list[Planned]:
    """A recorded trace as random prompts, in order of time, the first one at 0.

    JSON lines of ``at`` (seconds), ``prompt_tokens`` and ``output_tokens``. Raises DataError with
    the file and the line.
    """

    def parse(row: Mapping[str, Any]) -> tuple[float, int, int]:
        at, prompt, output = (row.get(n) for n in ("at", "prompt_tokens", "output_tokens"))
        if not (isinstance(at, int | float) and np.isfinite(at)):
            raise ValueError("at must be seconds")
        if not (_is_count(prompt) and _is_count(output)):
            raise ValueError("prompt_tokens and output_tokens must be at least 1")
        return float(at), prompt, output  # type: ignore[return-value]

    rows = sorted(_parsed(path, parse))
    generator = np.random.default_rng(seed)
    return [
        Planned(
            tuple(generator.integers(*RANDOM_IDS, size=prompt).tolist()), output, at - rows[0][0]
        )
        for at, prompt, output in rows
    ]


def arriving(requests: Sequence[Planned], rate: float, kind: Arrivals, seed: int) -> list[Planned]:
    """The requests at ``rate`` a second: evenly spaced, or a Poisson process; the first at 0."""
    if kind not in ARRIVALS:
        raise AquilineError(f"arrivals={kind!r}: one of {ARRIVALS}")
    if not 0 < rate < float("inf"):
        raise AquilineError(f"rate={rate}: give requests a second, above 0; none for a closed load")
    count = max(len(requests) - 1, 0)
    gaps = np.full(count, 1 / rate)
    if kind == "poisson":
        gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    times = [0.0, *np.cumsum(gaps).tolist()]
    return [replace(one, at=at) for one, at in zip(requests, times, strict=False)]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _parsed(path: Path, parse: Callable[[Mapping[str, Any]], T]) -> Iterator[T]:
    """What ``parse`` makes of each line of a JSONL file; a ValueError of it is the user's."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}; give a file of JSON lines") from None
    if not any(line.strip() for line in lines):
        raise DataError(f"{path}: it is empty; give one JSON object a line")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            parsed = parse(row)
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}; correct the line") from None
        yield parsed
