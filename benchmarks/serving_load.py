"""A long load on a server: complete answers, equal ones, no page leaked, memory that stays flat.

    python -m benchmarks.serving_load --minutes 30 --out benchmarks/results/serving.json

64 clients send chats of mixed lengths, streamed or whole, to ``aquiline serve`` in fp32. Every
fifth leaves in the middle of its stream; every tenth asks for a text of a given form; of the
others, two thirds have a seed (half of those greedy). Whatever is not aborted must be complete: it
ended by itself, or has all tokens it asked for. At the end the pages that are taken are read from
``/metrics``, and some of the seeded requests are asked again, alone, for the same text. The memory
of server and engine is sampled all along.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from aquiline.cli.options import BUILT_IN
from aquiline.evaluation.client import Endpoint, events
from benchmarks.common import stamp, write_section
from benchmarks.served import Served, command_line, gauge, served

KINDS = (
    "plain",
    "aborted",
    "plain",
    "form",
    "plain",
    "plain",
    "aborted",
    "plain",
    "plain",
    "plain",
)
TEXT = (
    "the river and its old stone bridge where every morning a number of people walk to work under "
    "trees that were planted when nobody knew how tall they would grow or who would sit below them"
)
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "ok"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,12}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"},
    },
}  # fmt: skip
REGEX = r"[a-z]{3,8}( [a-z]{3,8}){2}"
CHOICES = ["yes", "no", "maybe"]
SAMPLE_SECONDS = 1.0
AROUND = 0.04  # of the samples: the nearest ones, whose median is a figure
FIGURES = (0.1, 0.5, 1.0)


@dataclass(frozen=True)
class Asked:
    """One request. ``leave_after``: chunks that its client waits for; None stays to the end."""

    kind: str
    body: Mapping[str, Any]
    leave_after: int | None = None

    @property
    def seeded(self) -> bool:
        return "seed" in self.body


@dataclass(frozen=True)
class Ended:
    """How it went: ``outcome`` is complete, aborted or failed."""

    asked: Asked
    outcome: str
    text: str = ""
    reason: str = ""
    tokens: int = 0


def request(number: int, model: str, longest: int) -> Asked:
    """The request of a number, always the same: prompts of 4 to ``longest`` words, as many tokens
    asked for."""
    draw = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    words = [draw.choice(TEXT.split()) for _ in range(round(4 * (longest / 4) ** draw.random()))]
    text = f"{number}: go on with this. {' '.join(words)}"
    body: dict[str, Any] = {
        "model": model, "messages": [{"role": "user", "content": text}],
        "max_tokens": round(8 * (longest / 8) ** draw.random()), "temperature": 0.8,
    }  # fmt: skip
    if draw.random() < 0.5 or kind == "aborted":
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if kind == "aborted":
        # Long enough to be running when its client leaves.
        body |= {"max_tokens": longest, "ignore_eos": True}
        return Asked(kind, body, draw.randrange(6))
    sampling = number // len(KINDS) % 3
    if sampling < 2:
        body |= {"seed": number, "temperature": 0.8 * sampling}
    if kind == "form":
        forms = (
            {"response_format": {"type": "json_schema",
                                 "json_schema": {"name": "person", "schema": SCHEMA}}},
            {"structured_outputs": {"regex": REGEX}},
            {"structured_outputs": {"choice": CHOICES}},
        )  # fmt: skip
        body |= {**draw.choice(forms), "max_tokens": longest}
    return Asked(kind, body)


async def ask(http: httpx.AsyncClient, asked: Asked) -> Ended:
    """Send it and read the answer, or leave."""
    route = "/v1/chat/completions"
    try:
        if "stream" not in asked.body:
            response = await http.post(route, json=asked.body)
            response.raise_for_status()
            whole = response.json()
            (choice,) = whole["choices"]
            return _judged(
                asked, choice["message"]["content"] or "", choice["finish_reason"],
                whole["usage"]["completion_tokens"],
            )  # fmt: skip
        text, reason, tokens, chunks = "", "", 0, 0
        async with http.stream("POST", route, json=asked.body) as response:
            response.raise_for_status()
            if asked.leave_after == 0:
                return Ended(asked, "aborted")
            async for event in events(response):
                if "error" in event:
                    return Ended(asked, "failed", text, str(event["error"]))
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
                    chunks += 1
                if chunks == asked.leave_after:
                    return Ended(asked, "aborted")
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
        return _judged(asked, text, reason, tokens)
    except (httpx.HTTPError, KeyError, ValueError) as error:
        return Ended(asked, "failed", reason=f"{type(error).__name__}: {error}")


def _judged(asked: Asked, text: str, reason: str, tokens: int) -> Ended:
    """Complete: it ended by itself, in its form if it has one, or holds all tokens asked for."""
    ended = reason == "stop" and (asked.kind != "form" or has_form(asked.body, text))
    full = reason == "length" and tokens == asked.body["max_tokens"]
    return Ended(asked, "complete" if ended or full else "failed", text, reason, tokens)


def has_form(body: Mapping[str, Any], text: str) -> bool:
    """Whether a text that has ended is of the form asked for."""
    form = body.get("structured_outputs", {})
    if "regex" in form:
        return re.fullmatch(form["regex"], text) is not None
    if "choice" in form:
        return text in form["choice"]
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(found, dict) and found.keys() == set(SCHEMA["required"])
        and re.fullmatch(r"[a-z]{1,12}", str(found["name"])) is not None
        and type(found["age"]) is int and 0 <= found["age"] <= 99 and type(found["ok"]) is bool
    )  # fmt: skip


async def put_load(
    server: Served, endpoint: Endpoint, options: argparse.Namespace
) -> tuple[list[Ended], list[tuple[float, dict[str, float]]]]:
    """All answers, and the memory over seconds: at least so many requests for at least so long."""
    started = time.monotonic()
    found: list[Ended] = []
    samples: list[tuple[float, dict[str, float]]] = []
    numbers = iter(range(10**9))

    async def client(http: httpx.AsyncClient) -> None:
        while (number := next(numbers)) < options.requests or (
            time.monotonic() - started < 60 * options.minutes
        ):
            found.append(await ask(http, request(number, endpoint.model, options.longest)))

    async def sample() -> None:
        said = 0.0
        while True:
            seconds = time.monotonic() - started
            samples.append((seconds, server.resident_mb()))
            if seconds >= said:
                print(f"{seconds:6.0f} s {len(found):6} ended {samples[-1][1]}", file=sys.stderr)
                said += 30
            await asyncio.sleep(SAMPLE_SECONDS)

    sampling = asyncio.create_task(sample())
    async with endpoint.client() as http:
        await asyncio.gather(*(client(http) for _ in range(options.clients)))
    sampling.cancel()
    samples.append((time.monotonic() - started, server.resident_mb()))
    return found, samples


async def drained(endpoint: Endpoint) -> dict[str, float]:
    """What the engine still holds when nobody waits for anything: given ten seconds to tell."""
    names = ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
    async with endpoint.client() as http:
        for _ in range(100):
            text = (await http.get("/metrics")).text
            left = {name: gauge(text, name) for name in names}
            if not any(left.values()):
                break
            await asyncio.sleep(0.1)
    return left


async def again(endpoint: Endpoint, ended: Sequence[Ended]) -> list[str]:
    """Ask again, one after another; what differs."""
    different = []
    async with endpoint.client() as http:
        for one in ended:
            alone = await ask(http, one.asked)
            if (alone.text, alone.reason) != (one.text, one.reason):
                seed = one.asked.body["seed"]
                different.append(f"seed {seed}: {one.text!r} ({one.reason}), alone {alone.text!r}")
    return different


def memory(samples: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, Any]:
    """MiB of each process at the FIGURES of the run, medians of the nearest samples; by how many
    percent the last is above the first, and above the middle."""
    end, count = samples[-1][0], max(1, round(AROUND * len(samples)))
    rows = {}
    for name in samples[0][1]:
        figures = []
        for share in FIGURES:
            near = sorted(samples, key=lambda sample: abs(sample[0] - share * end))
            figures.append(statistics.median(mb[name] for _, mb in near[:count]))
        first, middle, last = figures
        rows[name] = {
            "mb": [round(mb, 1) for mb in figures],
            "most_mb": round(max(mb[name] for _, mb in samples), 1),
            "drift_percent": round(100 * (last / first - 1), 2),
            "drift_from_middle_percent": round(100 * (last / middle - 1), 2),
        }
    return {"at": list(FIGURES), **rows}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=None, help="the file of sections")
    parser.add_argument("--model", default=BUILT_IN)
    parser.add_argument("--speculative-config", default="auto")
    parser.add_argument("--requests", type=int, default=1000, help="at least")
    parser.add_argument("--minutes", type=float, default=30, help="at least")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--longest", type=int, default=192, help="words of a prompt, tokens asked")
    parser.add_argument("--alone", type=int, default=100, help="seeded requests to ask again")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--kv-cache-tokens", type=int, default=16384)
    parser.add_argument("--max-model-len", type=int, default=2048)
    options = parser.parse_args(given)
    given = sys.argv[1:] if given is None else given
    flags = [
        "--dtype", "float32", "--speculative-config", options.speculative_config,
        "--max-num-seqs", options.max_num_seqs, "--kv-cache-tokens", options.kv_cache_tokens,
        "--max-model-len", options.max_model_len,
    ]  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        served(options.model, *map(str, flags), log=Path(folder) / "log") as server,
    ):
        endpoint = Endpoint(server.url, options.model, timeout=1800)
        started = time.monotonic()
        found, samples = asyncio.run(put_load(server, endpoint, options))
        seconds = time.monotonic() - started
        left = asyncio.run(drained(endpoint))
        seeded = [one for one in found if one.outcome == "complete" and one.asked.seeded]
        sample = random.Random(0).sample(seeded, min(options.alone, len(seeded)))
        different = asyncio.run(again(endpoint, sample))
        left_after = asyncio.run(drained(endpoint))
    outcomes = Counter(one.outcome for one in found)
    expected = sum(one.asked.kind != "aborted" for one in found)
    payload = {
        **stamp(torch.device("cpu")), "command": command_line("serving_load", given),
        "server": server.command,
        "clients": options.clients, "requests": len(found), "seconds": round(seconds, 1),
        "outcomes": {name: outcomes[name] for name in ("complete", "aborted", "failed")},
        "forms": sum(one.asked.kind == "form" for one in found),
        "ended_by": dict(Counter(one.reason for one in found if one.outcome == "complete")),
        "failures": [one.reason for one in found if one.outcome == "failed"][:5],
        "tokens": sum(one.tokens for one in found if one.outcome == "complete"),
        "alone": {"seeded": len(seeded), "asked_again": len(sample),
                  "equal": len(sample) - len(different), "different": different[:5]},
        "left": left, "left_after_alone": left_after, "memory": memory(samples),
        "ok": outcomes["complete"] == expected and not different and not any(left.values())
        and not any(left_after.values()),
    }  # fmt: skip
    write_section(options.out, "load", payload)


if __name__ == "__main__":
    main()
