"""The figures of a load: latencies with percentiles, throughput, goodput, acceptance.

TTFT runs to the first chunk, TTIT is (last - first arrival) / (tokens - 1) of one request, end to
end to the close of its stream. Goodput counts the requests that kept every limit given. Acceptance
is what a server's Prometheus counters grew by, under the names that vLLM gave them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aquiline.core.errors import AquilineError
from aquiline.evaluation.client import Answer

PERCENTILES = (50, 95, 99)
LATENCIES = ("ttft", "ttit", "e2e")
_SAMPLE = re.compile(r"^\w*:?spec_decode_(num_\w+?)(?:_total)?(?:\{(.*)\})?\s+(\S+)")
_POSITION = re.compile(r'position="(\d+)"')

Limits = Mapping[str, float]
Counters = Mapping[tuple[str, int], float]  # by name and position, -1 for none


def parse_limits(text: str) -> dict[str, float]:
    """``ttft:500,ttit:25`` -> milliseconds by name."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        limits = {name: float(value) for name, value in pairs}
        if set(limits) <= set(LATENCIES) and all(value > 0 for value in limits.values()):
            return limits
    except ValueError:
        pass
    raise AquilineError(f"--goodput {text}: give limits in ms such as ttft:500,ttit:25,e2e:10000")


def latencies_ms(answer: Answer) -> dict[str, float | None]:
    """By the names of LATENCIES; of an answer without error."""
    seconds = {"ttft": answer.ttft, "ttit": answer.ttit, "e2e": answer.end}
    return {name: None if x is None else 1e3 * x for name, x in seconds.items()}


def summary(answers: Sequence[Answer], limits: Limits | None = None) -> dict[str, Any]:
    """One row of a result: times in ms, rates a second; failed requests count as such alone."""
    done = [answer for answer in answers if answer.error is None]
    found = [latencies_ms(answer) for answer in done]
    # From the first clock's start to the end of the last stream.
    starts, ends = [a.start for a in answers], [a.start + a.end for a in answers]
    seconds = max(ends) - min(starts)
    tokens = sum(answer.tokens for answer in done)
    row: dict[str, Any] = {
        "requests": len(answers), "failed": len(answers) - len(done), "seconds": round(seconds, 3),
        "prompt_tokens": sum(a.prompt_tokens for a in done), "tokens": tokens,
        "requests_per_second": round(len(done) / seconds, 4),
        "tokens_per_second": round(tokens / seconds, 2),
    }  # fmt: skip
    for name in LATENCIES:
        row[f"{name}_ms"] = statistics([one[name] for one in found])
    if limits:
        kept = sum(all((one[n] or 0) <= limit for n, limit in limits.items()) for one in found)
        row["goodput"] = {
            "limits_ms": dict(limits), "share": round(kept / len(answers), 4),
            "requests_per_second": round(kept / seconds, 4),
        }  # fmt: skip
    return row


def statistics(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean and percentiles (linear between ranks) of the values there are."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    ranks = dict(zip(PERCENTILES, np.percentile(known, PERCENTILES).tolist(), strict=True))
    named = {"mean": float(np.mean(known))} | {f"p{rank}": value for rank, value in ranks.items()}
    return {name: round(value, 4) for name, value in named.items()}


def request_rows(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Each request, for plots over time."""
    rows = []
    for answer in answers:
        row: dict[str, Any] = {"start": round(answer.start, 4)}
        if answer.error is None:
            times = latencies_ms(answer)
            row |= {f"{n}_ms": None if x is None else round(x, 3) for n, x in times.items()}
            row |= {"prompt_tokens": answer.prompt_tokens, "tokens": answer.tokens}
        else:
            row["error"] = answer.error
        rows.append(row)
    return rows


def speculation_counters(metrics: str | None) -> Counters:
    """The spec_decode counters of a Prometheus text, summed over other labels."""
    counters: dict[tuple[str, int], float] = {}
    for line in (metrics or "").splitlines():
        sample = _SAMPLE.match(line)
        if sample is not None:
            position = _POSITION.search(sample[2] or "")
            key = sample[1], -1 if position is None else int(position[1])
            counters[key] = counters.get(key, 0.0) + float(sample[3])
    return counters


def acceptance(before: Counters, after: Counters) -> dict[str, Any] | None:
    """What speculation did in between; None if nothing was drafted.

    ``tokens_per_call`` holds the bonus token, ``rate`` does not.
    """
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
    drafts = grown.get(("num_drafts", -1), 0.0)
    accepted, drafted = (grown.get((f"num_{n}_tokens", -1), 0.0) for n in ("accepted", "draft"))
    if drafts <= 0 or drafted <= 0:
        return None
    by_depth = {at: n for (name, at), n in grown.items() if name == "num_accepted_tokens_per_pos"}
    return {
        "rounds": int(drafts), "tokens_per_call": round(1 + accepted / drafts, 4),
        "rate": round(accepted / drafted, 4),
        "accepted_by_depth": [round(by_depth[at] / drafts, 4) for at in sorted(by_depth)],
    }  # fmt: skip
