"""The client against a server of known pace, and the figures made of what it saw."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from aquiline.core.errors import AquilineError
from aquiline.evaluation.client import Answer, Endpoint, only_model, page, put_load
from aquiline.evaluation.load import Planned, arriving
from aquiline.evaluation.serving import (
    acceptance,
    parse_limits,
    request_rows,
    speculation_counters,
    statistics,
    summary,
)
from tests.evaluation.fake_openai import Fake, serving

HELLO = Planned(({"role": "user", "content": "hello"},))
SLACK = 0.25  # seconds that a busy machine may add


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serving(Fake()) as server:
        yield server


def sent(fake: Fake, requests: Sequence[Planned], concurrency: int, **fields: object):
    endpoint = Endpoint(fake.url + "/v1/", "fake-1", "secret", 32, fields)
    return asyncio.run(put_load(endpoint, requests, concurrency))


# -------------------------------------------------------------------------------------- the client


def test_arrivals_are_those_of_the_chunks_and_tokens_those_of_the_usage(fake: Fake) -> None:
    (answer,) = sent(fake, [HELLO], 1, temperature=0.5)
    assert (answer.tokens, answer.prompt_tokens, answer.error) == (12, 7, None)
    assert len(answer.arrivals) == 4, "the role alone is no token"
    assert fake.first <= answer.ttft < fake.first + SLACK
    assert answer.ttit is not None
    window = answer.arrivals[-1] - answer.arrivals[0]
    assert window >= 3 * fake.gap - 0.02
    assert answer.ttit == pytest.approx(window / 11)
    assert answer.end >= answer.arrivals[-1]
    (body,), (headers,) = fake.bodies, fake.headers
    assert body["model"] == "fake-1"
    assert (body["stream"], body["max_tokens"], body["temperature"]) == (True, 32, 0.5)
    assert headers["Authorization"] == "Bearer secret"


def test_without_usage_chunks_are_counted(fake: Fake) -> None:
    fake.usage = False
    (answer,) = sent(fake, [Planned((5, 6, 7), max_tokens=9)], 1)
    assert (answer.tokens, answer.prompt_tokens) == (4, 0)
    assert fake.bodies[0]["prompt"] == [5, 6, 7]
    assert fake.bodies[0]["max_tokens"] == 9


def test_what_goes_wrong_is_said_request_by_request(fake: Fake) -> None:
    words = ["fine", "refuse", "break", "silent"]
    answers = sent(fake, [Planned(word) for word in words], 4)
    errors = [answer.error for answer in answers]
    assert errors[0] is None
    for error, said in zip(errors[1:], ("top_q: no such field", "engine died", "no text"),
                           strict=True):  # fmt: skip
        assert error is not None
        assert said in error
    row = summary(answers)
    assert (row["requests"], row["failed"], row["tokens"]) == (4, 3, 12)
    gone = Endpoint("http://127.0.0.1:9", "x")
    assert "ConnectError" in str(asyncio.run(put_load(gone, [HELLO], 1))[0].error)
    with pytest.raises(AquilineError, match=r"--base-url http://127.0.0.1:9"):
        asyncio.run(only_model(gone))
    assert asyncio.run(page(gone, "/metrics")) is None


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_than_allowed_are_in_flight(fake: Fake, concurrency: int) -> None:
    fake.first, fake.gap = 0.03, 0.001
    answers = sent(fake, [HELLO] * 6, concurrency)
    assert fake.most == concurrency
    assert len(fake.bodies) == 6
    starts = sorted(answer.start for answer in answers)
    assert starts[-1] >= (6 / concurrency - 1) * fake.first, "a closed load waits for its answers"
    assert max(answer.ttft for answer in answers) < fake.first + SLACK


def test_in_an_open_load_waiting_for_a_place_counts(fake: Fake) -> None:
    """Due every 10 ms, each takes 100 ms and one runs at a time: the n-th waits n times 90 ms."""
    fake.first, fake.gap, fake.chunks = 0.1, 0.0, 2
    answers = sent(fake, arriving([HELLO] * 4, 100.0, "fixed", 0), 1)
    assert [answer.start for answer in answers] == pytest.approx([0, 0.01, 0.02, 0.03])
    for number, answer in enumerate(answers):
        waited = (number + 1) * 0.1 - number * 0.01
        assert waited - 1e-3 <= answer.ttft < waited + SLACK


def test_acceptance_is_what_the_counters_grew_by(fake: Fake) -> None:
    endpoint = Endpoint(fake.url)
    fake.rounds = 100
    before = speculation_counters(asyncio.run(page(endpoint, "/metrics")))
    sent(fake, [HELLO] * 3, 3)
    after = speculation_counters(asyncio.run(page(endpoint, "/metrics")))
    assert acceptance(before, after) == {
        "rounds": 12, "tokens_per_call": 3.0, "rate": 0.6667,
        "accepted_by_depth": [1.0, 0.75, 0.25],
    }  # fmt: skip
    assert acceptance(after, after) is None
    assert acceptance({}, speculation_counters("up 1\n")) is None
    assert asyncio.run(only_model(endpoint)) == "fake-1"


def test_counters_are_summed_over_engines_under_any_prefix() -> None:
    text = """
aquiline:spec_decode_num_drafts_total{engine="0"} 10
aquiline:spec_decode_num_drafts_total{engine="1"} 20.0
aquiline:spec_decode_num_draft_tokens_total 90
spec_decode_num_accepted_tokens_total 45
"""
    found = acceptance({}, speculation_counters(text))
    assert found is not None
    assert (found["rounds"], found["tokens_per_call"], found["rate"]) == (30, 2.5, 0.5)


# ------------------------------------------------------------------------------------- the figures


def made(count: int = 200, seed: int = 0) -> list[Answer]:
    """Answers of random times, one of them a single token."""
    draw = np.random.default_rng(seed)
    answers = []
    for number in range(count):
        tokens = 1 if number == 0 else int(draw.integers(2, 40))
        gaps = draw.exponential(0.02, size=tokens)
        arrivals = 0.1 + np.cumsum(gaps)
        answers.append(
            Answer(0.05 * number, tuple(arrivals.tolist()), float(arrivals[-1]) + 0.01, tokens, 10)
        )
    return answers


def test_percentiles_are_those_of_numpy_on_the_whole_sample() -> None:
    answers = made()
    row = summary(answers)
    for name, values in (
        ("ttft", [a.arrivals[0] for a in answers]),
        ("ttit", [(a.arrivals[-1] - a.arrivals[0]) / (a.tokens - 1) for a in answers[1:]]),
        ("e2e", [a.end for a in answers]),
    ):
        for rank in (50, 95, 99):
            exact = float(np.percentile(1e3 * np.array(values), rank))
            assert row[f"{name}_ms"][f"p{rank}"] == pytest.approx(exact, abs=1e-4)
        assert row[f"{name}_ms"]["mean"] == pytest.approx(1e3 * np.mean(values), abs=1e-4)
    assert statistics([1.0, None, 2.0, 3.0, 4.0]) == {
        "mean": 2.5, "p50": 2.5, "p95": 3.85, "p99": 3.97
    }  # fmt: skip
    assert statistics([None]) is None


def test_rates_and_goodput_by_hand() -> None:
    """Four requests in 2 s; two keep both limits, one is too slow, one failed."""
    fine = Answer(0.0, (0.1, 0.2, 0.3), 0.35, 5, 8)  # TTIT 50 ms
    late = replace(fine, start=0.5, arrivals=(0.6, 0.7), end=0.8)
    single = Answer(1.0, (0.2,), 1.0, 1, 8)
    failed = Answer(0.2, (), 0.1, 0, 0, "ReadError: gone")
    limits = parse_limits("ttft:500,ttit:60")
    row = summary([fine, late, single, failed], limits)
    assert row["seconds"] == 2.0
    assert row["tokens_per_second"] == 5.5
    assert row["requests_per_second"] == 1.5
    assert row["goodput"] == {
        "limits_ms": {"ttft": 500.0, "ttit": 60.0}, "share": 0.5, "requests_per_second": 1.0
    }  # fmt: skip
    each = request_rows([fine, failed, single])
    assert each[0] == {
        "start": 0.0, "ttft_ms": 100.0, "ttit_ms": 50.0, "e2e_ms": 350.0, "prompt_tokens": 8,
        "tokens": 5,
    }  # fmt: skip
    assert each[1] == {"start": 0.2, "error": "ReadError: gone"}
    assert each[2]["ttit_ms"] is None


@pytest.mark.parametrize("text", ["fast", "ttft", "ttft:x", "tpot:5", "ttft:-1", "ttft:1:2", ""])
def test_bad_limits_are_refused_by_name(text: str) -> None:
    with pytest.raises(AquilineError, match=re.escape(f"--goodput {text}: give limits")):
        parse_limits(text)
