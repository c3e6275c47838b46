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
from dataclasses import replace

import torch

from aquiline.core.params import SamplingParams
from aquiline.decoding.graph import capture
from aquiline.decoding.models import DecoderModels, Planes
from aquiline.decoding.rows import DeviceRows, Emitted, advance
from aquiline.decoding.state import DecodeState
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.tree import TreeShape
from aquiline.speculation.verification.rules import RULES, RuleFactory

PAGE_SIZE = 128
WARM_UP, LEAST_REPEATS = 2, 3
IN_A_ROW = 5
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


@torch.inference_mode()
def measure_round_ms(
    models: DecoderModels,
    planes: Planes,
    tree: TreeShape,
    batch: int,
    context: int,
    rule: RuleFactory = RULES["coupled"],
    temperature: float = 0.0,
    repeats: int = 20,
    seconds: float = 2.0,
    pending: int | None = None,
    capacity: int | None = None,
    sampling: SamplingBatch | None = None,
) -> float:
    """Median milliseconds of one round of ``batch`` requests with ``context`` cached tokens each.

    On CUDA the captured graph, replayed back to back as the engine does.

    Args:
        planes: a cache of at least ``pages_of(tree, batch, context)`` pages.
        repeats: rounds to time; fewer (3 at least) once ``seconds`` have passed.
        pending: pairs that a row has room for, which a graph feeds to the draft whole: one more
            than the depth of the deepest tree that an engine can choose; None: of this tree.
        capacity: tokens that a page table has room for, by which kernels cut their work; None:
            what this measurement needs.
        sampling: of the batch, in place of one at ``temperature``.
    """
    device, page_size = models.device, planes.target.page_size
    tables = tree.tables(device)
    rows = synthetic_rows(
        models, pending or tree.depth + 1, batch, context, temperature,
        (pages_of(tree, batch, context, page_size) - 1) // batch,
        -(-(capacity or 0) // page_size),
    )  # fmt: skip

    if sampling is not None:
        rows = replace(rows, sampling=sampling)

    def one_round() -> Emitted:
        return advance(models, planes, tables, rule, rows)

    again_at_once = capture(one_round)[0].replay if device.type == "cuda" else one_round

    def again() -> None:
        rows.state.lengths.fill_(context)
        again_at_once()

    for _ in range(WARM_UP):
        again()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < repeats:
        times.append(_milliseconds(again, device))
        if len(times) >= LEAST_REPEATS and time.perf_counter() - started > seconds:
            break
    return statistics.median(times)


def synthetic_rows(
    models: DecoderModels,
    pending: int,
    batch: int,
    context: int,
    temperature: float,
    pages: int,
    columns: int = 0,
) -> DeviceRows:
    """Random roots and pending pairs, ``context`` committed tokens a row on ``pages`` pages; a page
    table of ``columns``, or just as wide as it must be."""
    device, vocab = models.device, models.target.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (batch, pending), generator=generator).to(device)
    features = torch.randn(batch, pending, models.feature_size, generator=generator)
    state = DecodeState(
        lengths=torch.full((batch,), context, device=device),
        roots=tokens[:, 0].clone(),
        pending_tokens=tokens,
        pending_features=features.to(device, models.dtype),
        pending_counts=torch.full((batch,), min(pending, TYPICAL_TOKENS), device=device),
    )
    params = [SamplingParams(temperature=temperature)] * batch
    sampling = SamplingBatch.of(params, range(batch), device)
    page_table = torch.zeros(batch, max(pages, columns), dtype=torch.int64, device=device)
    page_table[:, :pages] = 1 + torch.arange(batch * pages, device=device).view(batch, pages)
    return DeviceRows(state, sampling, page_table, torch.ones(batch, dtype=torch.bool).to(device))


def _milliseconds(work: Callable[[], None], device: torch.device) -> float:
    """Of one call: by the clock, or on CUDA of several in a row between events."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(IN_A_ROW):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / IN_A_ROW
