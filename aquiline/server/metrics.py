"""Metrics for Prometheus, under vLLM's names with our prefix."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from aquiline.core.outputs import Delta, RequestOutput, SpeculationStats
from aquiline.engine.messages import Progress

LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
INTERVALS = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters of one server; ``model`` is their label."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.model = model
        self.running = self._gauge("num_requests_running", "Choices that are being generated.")
        self.waiting = self._gauge("num_requests_waiting", "Choices that wait for a row or pages.")
        self.cache = self._gauge("kv_cache_usage_perc", "Share of the KV cache taken; 1 is all.")
        self.restarts = self._gauge("engine_restarts", "Engine processes started after the first.")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.tokens = self._counter("generation_tokens", "Tokens generated.")
        self.rounds = self._counter("spec_decode_num_drafts", "Rounds that verified a draft.")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "Draft tokens verified.")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Of them, accepted.")
        self.by_depth = Counter(
            "aquiline:spec_decode_num_accepted_tokens_per_pos", "By depth, from 0.",
            ["model_name", "position"], registry=self.registry,
        )  # fmt: skip
        self.ended = Counter(
            "aquiline:request_success", "Choices that ended.",
            ["model_name", "finished_reason"], registry=self.registry,
        )  # fmt: skip
        self.first = self._histogram("time_to_first_token_seconds", LATENCIES)
        self.between = self._histogram("inter_token_latency_seconds", INTERVALS)
        self.whole = self._histogram("e2e_request_latency_seconds", LATENCIES)

    def progress(self, report: Progress) -> None:
        """The engine's load after a step."""
        self.running.set(report.load.running)
        self.waiting.set(report.load.waiting)
        self.cache.set(report.load.cache_usage)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge = Gauge(f"aquiline:{name}", text, ["model_name"], registry=self.registry)
        return gauge.labels(self.model)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"aquiline:{name}", text, ["model_name"], registry=self.registry)
        return counter.labels(self.model)

    def _histogram(self, name: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            f"aquiline:{name}", "Seconds.", ["model_name"], buckets=buckets, registry=self.registry
        )
        return histogram.labels(self.model)


class RequestMetrics:
    """Counts one request as its outputs arrive; ``started`` in seconds of time.perf_counter().

    Attributes:
        first: seconds to the first token; None before it.
    """

    def __init__(self, metrics: Metrics, prompt_tokens: int, started: float) -> None:
        self._metrics, self._started = metrics, started
        self._last: dict[int, float] = {}  # when each choice's tokens arrived
        self._counts: dict[int, SpeculationStats] = {}
        self.first: float | None = None
        metrics.prompt_tokens.inc(prompt_tokens)

    @property
    def elapsed(self) -> float:
        """Seconds since the request was queued."""
        return time.perf_counter() - self._started

    def output(self, output: RequestOutput) -> None:
        """Count what a step added."""
        for delta in output.deltas:
            self._delta(delta)
        if output.finished:
            self._metrics.whole.observe(self.elapsed)

    def _delta(self, delta: Delta) -> None:
        metrics, now, count = self._metrics, time.perf_counter(), len(delta.token_ids)
        if self.first is None:
            self.first = self.elapsed
            metrics.first.observe(self.first)
        elif delta.index in self._last and count:
            each = (now - self._last[delta.index]) / count
            for _ in range(count):
                metrics.between.observe(each)
        self._last[delta.index] = now
        metrics.tokens.inc(count)
        if delta.finish_reason is not None:
            metrics.ended.labels(metrics.model, delta.finish_reason).inc()
        before, counts = self._counts.get(delta.index, SpeculationStats()), delta.counts
        if counts.rounds < before.rounds:  # another engine has gone on
            before = SpeculationStats()
        self._counts[delta.index] = counts
        if counts.drafted > before.drafted:
            metrics.rounds.inc(counts.rounds - before.rounds)
            metrics.drafted.inc(counts.drafted - before.drafted)
        for depth, accepted in enumerate(counts.accepted_by_depth):
            more = accepted - (before.accepted_by_depth[depth : depth + 1] or (0,))[0]
            if more:
                metrics.accepted.inc(more)
                metrics.by_depth.labels(metrics.model, depth).inc(more)
