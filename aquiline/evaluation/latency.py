"""Latency through the real engine: TTFT, TTIT, tokens per second, TPC of batches of one size.

    add ---- prefill ---- first tokens | round | round | ... | round in which a request ends
    |------------- TTFT --------------|------------- steady window -------------|

The window begins when every request of the batch has its first token and closes with the first
request that ends, so every round in it serves the whole batch; capturing graphs, prefill and the
tail of a batch are outside. TTIT is the windows' time over the tokens of one request in them: time
per round / tokens per round.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from aquiline.core.errors import AquilineError
from aquiline.core.heap import settled_heap
from aquiline.core.outputs import RequestOutput
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM

WARM_UP_TOKENS = 12


@dataclass(frozen=True)
class Latency:
    """One batch size.

    Attributes:
        batch: requests decoded together.
        rounds: in all windows.
        seconds: of all windows.
        tokens: that all requests got in them.
        first_token_seconds: from adding a batch to each request's first token, in sum.
        token_ids: of every prompt, up to the end of its window.
    """

    batch: int
    rounds: int
    seconds: float
    tokens: int
    first_token_seconds: float
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def ttft_ms(self) -> float:
        return 1e3 * self.first_token_seconds / len(self.token_ids)

    @property
    def ttit_ms(self) -> float:
        return 1e3 * self.seconds * self.batch / max(self.tokens, 1)

    @property
    def round_ms(self) -> float:
        return 1e3 * self.seconds / max(self.rounds, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_call(self) -> float:
        return self.tokens / max(self.rounds * self.batch, 1)


def measure_decoding(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams, batch: int
) -> Latency:
    """Decode the prompts (token ids), ``batch`` at a time; what is left over by that is not used.

    End tokens are ignored. A seed is that of the first prompt, the next one has the next seed. One
    short batch goes ahead to warm up.

    Raises AquilineError if there are fewer prompts than ``batch``, or rows than that.
    """
    if not 1 <= batch <= min(len(prompts), llm.engine.runner.max_rows):
        raise AquilineError(
            f"batch {batch}: give 1 to the number of prompts ({len(prompts)}) and of the engine's "
            f"max_num_seqs ({llm.engine.runner.max_rows})"
        )
    if params.max_tokens is None or params.max_tokens < 3:
        raise AquilineError(f"max_tokens={params.max_tokens}: give at least 3; prefill draws one")
    short = replace(params, max_tokens=min(WARM_UP_TOKENS, params.max_tokens))
    _window(llm, prompts[:batch], short, 0)
    with settled_heap():
        windows = [
            _window(llm, prompts[start : start + batch], params, start)
            for start in range(0, len(prompts) - batch + 1, batch)
        ]
    return Latency(
        batch,
        sum(window.rounds for window in windows),
        sum(window.seconds for window in windows),
        sum(window.tokens for window in windows),
        sum(window.first_token_seconds for window in windows),
        tuple(ids for window in windows for ids in window.token_ids),
    )


def _window(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams, index: int
) -> Latency:
    """One batch; ``index`` is its first prompt's."""
    engine, latest = llm.engine, dict[int, RequestOutput]()
    started, firsts = time.perf_counter(), list[float]()
    ids = [engine.add_request(p, _seeded(params, index + i)) for i, p in enumerate(prompts)]
    while len(latest) < len(ids):
        new = {output.request_id: output for output in engine.step()}
        firsts += [time.perf_counter() - started] * len(new.keys() - latest.keys())
        latest |= new
    opened, before = time.perf_counter(), {i: latest[i].speculation for i in ids}
    while not any(output.finished for output in latest.values()):
        latest |= {output.request_id: output for output in engine.step()}
    seconds = time.perf_counter() - opened
    for request in ids:
        engine.abort(request)
    for _ in range(engine.runner.ahead + 1):  # what was in flight is read and void
        engine.step()
    after = {i: latest[i].speculation for i in ids}
    rounds = [after[i].rounds - before[i].rounds for i in ids]
    tokens = [after[i].tokens - before[i].tokens for i in ids]
    texts = tuple(latest[i].outputs[0].token_ids for i in ids)
    return Latency(len(ids), max(rounds), seconds, sum(tokens), sum(firsts), texts)


def _seeded(params: SamplingParams, index: int) -> SamplingParams:
    seed = None if params.seed is None else params.seed + index
    return replace(params, seed=seed, ignore_eos=True, stop=(), stop_token_ids=())
