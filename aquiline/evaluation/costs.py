"""Cost of a decoding round on this machine: the terms of the dispatcher's cost model, measured.

A round's time depends on the batch, the tree and the cached tokens, not on what the tokens are, so
the state is synthetic: random roots and features, a cache of zeros, every request at the same
length.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch

from aquiline.core.params import SamplingParams, VerificationRule
from aquiline.decoding.models import DecoderModels, Planes
from aquiline.decoding.round import decode_round
from aquiline.decoding.state import DecodeState
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.tree import TreeShape

PAGE_SIZE = 128
WARM_UP, LEAST_REPEATS = 2, 3
TYPICAL_TOKENS = 3  # a round's, so pairs that wait to be fed to the draft


def pages_of(tree: TreeShape, batch: int, context: int, page_size: int = PAGE_SIZE) -> int:
    """Pages that a measurement needs, the dustbin included."""
    return 1 + batch * -(-(context + tree.size) // page_size)


def available_bytes(device: torch.device) -> int:
    """Memory that a cache may take: what is free on the device now."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_round_ms(
    models: DecoderModels,
    planes: Planes,
    tree: TreeShape,
    batch: int,
    context: int,
    rule: VerificationRule = "coupled",
    temperature: float = 0.0,
    repeats: int = 20,
    seconds: float = 2.0,
) -> float:
    """Median milliseconds of one round of ``batch`` requests with ``context`` cached tokens each.

    Args:
        planes: a cache of at least ``pages_of(tree, batch, context)`` pages.
        repeats: rounds to time; fewer (3 at least) once ``seconds`` have passed.
    """
    device = models.device
    tables = tree.tables(device)
    pages = (pages_of(tree, batch, context, planes.target.page_size) - 1) // batch
    page_table = 1 + torch.arange(batch * pages, device=device).view(batch, pages)
    params = SamplingParams(temperature=temperature)
    sampling = SamplingBatch.of([params] * batch, range(batch), device)
    state = _synthetic_state(models, tree, batch, context)

    def one_round() -> None:
        decode_round(models, planes, tables, rule, page_table, state, sampling)

    for _ in range(WARM_UP):
        one_round()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < repeats:
        times.append(_milliseconds(one_round, device))
        if len(times) >= LEAST_REPEATS and time.perf_counter() - started > seconds:
            break
    return statistics.median(times)


def _synthetic_state(
    models: DecoderModels, tree: TreeShape, batch: int, context: int
) -> DecodeState:
    """Random roots and pending pairs, ``context`` committed tokens a row."""
    device, config = models.device, models.target.config
    generator = torch.Generator().manual_seed(0)
    pending = tree.depth + 1
    tokens = torch.randint(config.vocab_size, (batch, pending), generator=generator)
    features = torch.randn(batch, pending, config.hidden_size, generator=generator)
    counts = torch.full((batch,), min(pending, TYPICAL_TOKENS), device=device)
    return DecodeState(
        lengths=torch.full((batch,), context, device=device),
        roots=tokens[:, 0].to(device),
        pending_tokens=tokens.to(device),
        pending_features=features.to(device, models.dtype),
        pending_counts=counts,
    )


def _milliseconds(work: Callable[[], None], device: torch.device) -> float:
    """Of one call: between CUDA events, or by the clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
