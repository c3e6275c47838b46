"""The paper's inference techniques that apply to one GPU: each with and without, in one run.

    python -m benchmarks.paper --out benchmarks/results/paper.json [--table T.json]

Rows of technique, paper_claim, on, off, unit, ratio (off / on), note. Kernels and rounds at the
shapes of Llama-3.1-8B with random weights; what needs a whole engine on SmolLM2 with the shipped
draft and MT-Bench prompts. A row that fails names its error and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aquiline import LLM, SamplingParams
from aquiline.cli.options import BUILT_IN
from aquiline.cli.tune import prompt_texts
from aquiline.decoding.models import DecoderModels
from aquiline.decoding.round import Round
from aquiline.decoding.rows import advance
from aquiline.evaluation.costs import measure_round_ms, pages_of, synthetic_rows
from aquiline.evaluation.latency import measure_decoding
from aquiline.kernels import ops, reference_sampling
from aquiline.speculation.dispatch.default import default_tree
from aquiline.speculation.tree import TreeShape
from aquiline.speculation.verification.rules import RULES
from benchmarks.common import fingerprint, graph_ms, machine, stamp, write_result
from benchmarks.shapes import DRAFT_VOCAB, models_for

CHAIN = TreeShape.chain(3)
Row = dict[str, Any]


def row(technique: str, claim: str, on: float, off: float, unit: str, note: str) -> Row:
    found = {
        "technique": technique, "paper_claim": claim, "on": round(on, 4), "off": round(off, 4),
        "unit": unit, "ratio": round(off / on, 3), "note": note,
    }  # fmt: skip
    print(found, flush=True)
    return found


def work_ms(work: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of device work: of its graph on a card."""
    with torch.inference_mode():
        return graph_ms(work) if device.type == "cuda" else clock_ms(work, device, 3)


def clock_ms(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median milliseconds by the clock, each call waited for."""
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 2):
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[2:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------- kernels


def tree_attention(options: argparse.Namespace) -> Iterator[Row]:
    """Our split prefix pass and masked suffix against torch's attention under one dense mask."""
    device, dtype = torch.device(options.device), torch.bfloat16
    batch, context, nodes, heads, kv, size, page = 16, options.context, 4, 32, 8, 128, 128
    columns = -(-(context + nodes) // page)
    q = torch.randn(batch, nodes, heads, size, dtype=dtype, device=device)
    cache = torch.randn(2, (1 + batch * columns) * page, kv, size, dtype=dtype, device=device)
    page_table = 1 + torch.randperm(batch * columns, device=device).view(batch, columns)
    lengths = torch.full((batch,), context, device=device)
    tables = TreeShape.of([(0,), (0, 0), (1,)]).tables(device)

    def merged() -> Tensor:
        return ops.tree_attention(
            q, cache[0], cache[1], page_table, page, lengths, nodes, tables.ancestors
        )

    # One pass: every key of a request under one mask; the queries of a key head are rows.
    keys = -(-(context + nodes) // 8) * 8
    positions = torch.arange(keys, device=device).repeat(batch, 1)
    slots = ops.slots_at(page_table, positions, page)
    seen = torch.zeros(nodes, keys, dtype=torch.bool, device=device)
    seen[:, :context] = True
    seen[:, context : context + nodes] = tables.ancestors
    group = heads // kv
    bias = torch.zeros(nodes, keys, dtype=dtype, device=device).masked_fill(~seen, float("-inf"))
    bias = bias.repeat_interleave(group, 0).expand(batch, kv, -1, -1)
    rows = q.view(batch, nodes, kv, group, size).permute(0, 2, 1, 3, 4).flatten(2, 3)

    def gathered() -> tuple[Tensor, Tensor]:
        k, v = (one[slots].transpose(1, 2) for one in cache)
        return k, v

    k, v = gathered()

    def masked() -> Tensor:
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=bias)

    def masked_paged() -> Tensor:
        return F.scaled_dot_product_attention(rows, *gathered(), attn_mask=bias)

    with torch.inference_mode():
        ours = merged().view(batch, nodes, kv, group, size).permute(0, 2, 1, 3, 4).flatten(2, 3)
        theirs = masked().float()
        error = float((ours.float() - theirs).abs().max() / theirs.abs().max())
    assert error < 0.05, f"the two differ by {error} of the largest"
    on, off = work_ms(merged, device), work_ms(masked, device)
    paged = work_ms(masked_paged, device)
    yield row(
        "tree attention in two merged passes", "prefix needs no mask; graphs replay", on, off,
        "ms a layer",
        f"batch {batch}, {context} context, {nodes} nodes; off is torch SDPA with a dense mask "
        f"over keys already gathered; gathering them from pages first: {paged:.4f} ms",
    )  # fmt: skip


def batched_sampling(options: argparse.Namespace) -> Iterator[Row]:
    """One batched call against the loop over requests that its torch twin is the body of."""
    device, batch, vocab = torch.device(options.device), 16, options.vocab
    draft_vocab = min(DRAFT_VOCAB, vocab)
    draft_ids = torch.arange(draft_vocab, device=device) * (vocab // draft_vocab)
    columns = torch.full((vocab,), -1, device=device)
    columns[draft_ids] = torch.arange(draft_vocab, device=device)
    for name, tree in (
        ("chain of 3", CHAIN), ("16-node tree", default_tree("multi-round", "high", 15, 5))
    ):  # fmt: skip
        tables = tree.tables(device)
        parents = int((tables.children[:, 0] >= 0).sum())
        generator = torch.Generator(device).manual_seed(0)
        target = 3 * torch.randn(batch, tree.size, vocab, device=device, generator=generator)
        draft = 3 * torch.randn(batch, parents, draft_vocab, device=device, generator=generator)
        # siblings differ: the best of the parent's row, by rank; what is accepted does not matter
        tokens = torch.zeros(batch, tree.size, dtype=torch.int64, device=device)
        for node in range(tree.size):
            for rank, child in enumerate(tree.children[node]):
                best = draft[:, int(tables.expanded_index[node])].topk(rank + 1).indices[:, rank]
                tokens[:, child] = draft_ids[best]
        temperature = torch.ones(batch, device=device)
        seeds = torch.arange(batch, device=device)
        positions = 100 + torch.arange(tree.depth + 1, device=device).repeat(batch, 1)

        def accept(
            routine: Callable[..., Any], part: slice, target: Tensor = target,
            draft: Tensor = draft, tokens: Tensor = tokens, temperature: Tensor = temperature,
            seeds: Tensor = seeds, positions: Tensor = positions, tables: Any = tables,
        ) -> Any:  # fmt: skip
            keys = (
                ops.NoiseKey(seeds[part], seeds[part] * 0, positions[part], stream, vocab)
                for stream in (ops.Stream.ACCEPT, ops.Stream.RESIDUAL)
            )
            return routine(
                target[part], None, draft[part], None, tokens[part], temperature[part],
                tables.children, tables.expanded_index, columns, *keys,
            )  # fmt: skip

        def batched(accept: Callable[..., Any] = accept) -> Any:
            return accept(ops.multi_round_accept, slice(None))

        def loop(accept: Callable[..., Any] = accept) -> Any:
            return [
                accept(reference_sampling.multi_round_accept, slice(i, i + 1)) for i in range(batch)
            ]

        def twin(accept: Callable[..., Any] = accept) -> Any:
            return accept(reference_sampling.multi_round_accept, slice(None))

        on = clock_ms(batched, device, 5)
        graph = work_ms(batched, device)
        off, together = clock_ms(loop, device, 3), clock_ms(twin, device, 3)
        yield row(
            f"batched multi-round sampling, {name}", "1.5x over nested loops", on, off, "ms",
            f"batch {batch}, vocabulary {vocab}, by the clock; in a graph {graph:.4f}; the torch "
            f"twin over the whole batch at once {together:.4f}",
        )  # fmt: skip


# ---------------------------------------------------------------------------------------- rounds


def resync(options: argparse.Namespace, models: DecoderModels) -> Iterator[Row]:
    """The first draft pass over one pending pair against the whole room of D + 1."""
    device = models.device
    tables = CHAIN.tables(device)
    for batch in options.round_batches:
        count = pages_of(CHAIN, batch, options.context)
        planes = models.planes(count, 128)
        times = []
        for width in (1, CHAIN.depth + 1):
            rows = synthetic_rows(models, width, batch, options.context, 0.0, (count - 1) // batch)

            def work(rows: Any = rows, planes: Any = planes) -> Any:
                return Round(models, planes, tables, RULES["coupled"], rows.page_table,
                                    rows.state, rows.sampling).run()  # fmt: skip

            times.append(work_ms(work, device))
        del planes
        free(device)
        yield row(
            f"draft re-sync by the last token alone, batch {batch}",
            "only the last accepted token and hidden state re-sync the draft", times[0], times[1],
            "ms a round",
            "8B shapes, chain of 3; off feeds all accepted tokens, in the pass that drafts first, "
            "and is our default; TPC 2.134 with the last two pairs alone against 2.141",
        )  # fmt: skip


def whole_graph(options: argparse.Namespace, models: DecoderModels) -> Iterator[Row]:
    """A replay against the same round launched piece by piece."""
    device = models.device
    for batch in options.round_batches:
        count = pages_of(CHAIN, batch, options.context)
        planes = models.planes(count, 128)
        rows = synthetic_rows(
            models, CHAIN.depth + 1, batch, options.context, 0.0, (count - 1) // batch
        )
        tables = CHAIN.tables(device)

        def eager(rows: Any = rows, planes: Any = planes, tables: Any = tables) -> None:
            rows.state.lengths.fill_(options.context)
            advance(models, planes, tables, RULES["coupled"], rows)

        off = clock_ms(eager, device, 5)
        on = measure_round_ms(models, planes, CHAIN, batch, options.context, repeats=10)
        del planes, rows
        free(device)
        yield row(
            f"whole round in one CUDA graph, batch {batch}", "the whole model, attention included",
            on, off, "ms a round", f"8B shapes, {options.context} context, chain of 3",
        )  # fmt: skip


# --------------------------------------------------------------------------------------- engines


class Engines:
    """SmolLM2 by tree, each loaded once, and prompts for it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.loaded: dict[str, LLM] = {}
        texts = prompt_texts(options.prompts, None)
        encode = self.of("none").tokenizer.encode_chat
        self.prompts = [encode([{"role": "user", "content": text}]) for text in texts]

    def of(self, tree: str) -> LLM:
        if tree not in self.loaded:
            config: dict[str, Any] | None = None if tree == "none" else {"tree": tree}
            if tree == "auto" and self.options.table is not None:
                config = {"tree": "auto", "dispatch_table": self.options.table}
            o = self.options
            self.loaded[tree] = LLM(
                BUILT_IN, o.dtype, config, device=o.device, max_num_seqs=max(o.engine_batches),
                max_model_len=2048, kv_cache_tokens=o.kv_tokens, enable_prefix_caching=False,
            )  # fmt: skip
        return self.loaded[tree]

    def ttit_ms(self, tree: str, batch: int) -> float:
        """Of the quicker of two runs."""
        params = SamplingParams(temperature=0, max_tokens=self.options.tokens, seed=0)
        prompts = self.prompts[: max(batch, 4)]
        return min(
            measure_decoding(self.of(tree), prompts, params, batch).ttit_ms for _ in range(2)
        )

    def first_tokens_ms(self, batch: int) -> tuple[float, float]:
        """From adding a batch to its first tokens, and to those of the round after; medians."""
        engine, params = self.of("none").engine, SamplingParams(temperature=0, max_tokens=8)
        pairs = []
        for turn in range(8):
            start = (turn * batch) % max(1, len(self.prompts) - batch + 1)
            started = time.perf_counter()
            ids = [engine.add_request(p, params) for p in self.prompts[start : start + batch]]
            times: list[float] = []
            while len(times) < 2:
                if engine.step():
                    times.append(1e3 * (time.perf_counter() - started))
            for request in ids:
                engine.abort(request)
            for _ in range(engine.runner.ahead + 1):
                engine.step()
            pairs.append(times)
        first, second = zip(*pairs[2:], strict=True)
        return statistics.median(first), statistics.median(second)


def overlap(engines: Engines) -> Iterator[Row]:
    """A round in flight while the last one's answers are handled, against one at a time."""
    for batch in engines.options.engine_batches[:2]:
        runner = engines.of("chain-3").engine.runner
        found, default = {}, runner.ahead
        try:
            for ahead in (1, 0):
                runner.ahead = ahead
                found[ahead] = engines.ttit_ms("chain-3", batch)
        finally:
            runner.ahead = default
        yield row(
            f"next round launched before the last one's answers, batch {batch}",
            "TTIT -8 to -12 % (unverified)", found[1], found[0], "ms a token",
            "SmolLM2, chain of 3, through the engine",
        )  # fmt: skip


def fused_first_token(engines: Engines) -> Iterator[Row]:
    """The token that the prefill draws against one drawn by a plain round after it."""
    for batch in engines.options.engine_batches[:2]:
        on, off = engines.first_tokens_ms(batch)
        yield row(
            f"first token sampled with the prefill, batch {batch}", "TTFT -8 to -30 % (unverified)",
            on, off, "ms to the first token",
            "SmolLM2, plain; off waits for the round after the prefill, as one that samples apart "
            "would",
        )  # fmt: skip


def dispatcher(engines: Engines) -> Iterator[Row]:
    """Trees chosen by load against a chain of 3."""
    table = "a tuned table" if engines.options.table is not None else "the rule by batch size"
    for batch in sorted({engines.options.engine_batches[0], engines.options.engine_batches[-1]}):
        on, off = (engines.ttit_ms(tree, batch) for tree in ("auto", "chain-3"))
        yield row(
            f"tree pool with dispatcher, batch {batch}",
            "small batch: elaborate tree; large: a chain of about 3", on, off, "ms a token",
            f"SmolLM2, T=0, {table}; off is a chain of 3",
        )  # fmt: skip


# ------------------------------------------------------------------------------------------- all


def sections(options: argparse.Namespace) -> Iterator[Callable[[], Iterator[Row]]]:
    """In an order in which large memory is free again when the engines come."""
    device = torch.device(options.device)
    yield lambda: tree_attention(options)
    free(device)
    yield lambda: batched_sampling(options)
    free(device)
    large = [models_for(options.device)]
    yield lambda: resync(options, large[0])
    yield lambda: whole_graph(options, large[0])
    large.clear()
    free(device)
    engines = Engines(options)
    yield lambda: overlap(engines)
    yield lambda: fused_first_token(engines)
    yield lambda: dispatcher(engines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=None)
    parser.add_argument("--device", default=machine().type)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--table", default=None, help="of aquiline tune, for SmolLM2")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--round-batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--engine-batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--kv-tokens", type=int, default=131072)
    options = parser.parse_args()
    device = torch.device(options.device)
    mark = fingerprint(device)
    print(mark, flush=True)
    free(device)
    rows: list[Row] = []
    started = time.perf_counter()
    for section in sections(options):
        try:
            for found in section():
                rows.append(found)
        except Exception as error:
            traceback.print_exc()
            rows.append({"technique": "failed", "error": f"{type(error).__name__}: {error}"})
        print(f"{time.perf_counter() - started:.1f} s", flush=True)
    write_result(options.out, {**stamp(device), "fingerprint": mark, "rows": rows})


if __name__ == "__main__":
    main()
