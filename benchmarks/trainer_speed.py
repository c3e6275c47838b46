"""A training step against the frozen target's forward pass alone: tokens per second, and why.

    python -m benchmarks.trainer_speed --out benchmarks/results/trainer_speed.json

(a) The target forward with its LM head at every position, in chunks; (b) the trainer's own step
with a dense draft, single-step and unrolled. SmolLM2's and Llama-3.1-8B's shapes, random weights
and tokens, documents of one length; both at the batch that suits them best. The limit of (b) / (a)
is arithmetic: multiplications of the two, attention included. A profile of (b) follows: share of
the device's time by kind of work.
"""

from __future__ import annotations

import argparse
import collections
import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from aquiline.attention.packed import PackedAttention
from aquiline.models.config import LlamaConfig
from aquiline.models.llama import Llama
from aquiline.training.config import TrainConfig
from aquiline.training.feed import Feed
from aquiline.training.packing import PackedBatch
from aquiline.training.progress import Window
from aquiline.training.teacher import LlamaTeacher
from aquiline.training.trainer import Trainer
from benchmarks.common import fingerprint, machine, stamp, write_result
from benchmarks.shapes import LLAMA_31_8B, TINY, random_llama

SMOLLM2 = LlamaConfig(
    architecture="LlamaForCausalLM", vocab_size=49152, hidden_size=576, intermediate_size=1536,
    num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, rms_norm_eps=1e-5,
    rope_theta=100000.0, rope_scaling=None, max_position_embeddings=8192,
    tie_word_embeddings=True, attention_bias=False,
)  # fmt: skip
SHAPES = {"smollm2": SMOLLM2, "llama-3.1-8b": LLAMA_31_8B, "tiny": TINY}
GOALS = {"smollm2": 0.45, "llama-3.1-8b": 0.55}  # single-step objective, 3 layers
LOGIT_ROWS = 8192
PROFILED = 3  # steps
Row = dict[str, Any]


# ---------------------------------------------------------------------------------------- the data


def synthetic_batch(vocab: int, tokens: int, length: int, scored: float) -> PackedBatch:
    """Random documents of ``length``; the last share ``scored`` of each is the assistant's."""
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(tokens) % length
    edges = [*range(0, tokens, length), tokens]
    return PackedBatch(
        tokens=torch.randint(vocab, (tokens,), generator=generator),
        loss_mask=places >= (1 - scored) * length, positions=places,
        cu_seqlens=torch.tensor(edges, dtype=torch.int32), max_seqlen=min(length, tokens),
        epoch=0.0,
    )  # fmt: skip


class OneBatch:
    """Stands in for a packer: the same batch at every step."""

    def __init__(self, batch: PackedBatch) -> None:
        self._batch = batch

    def batch(self, step: int, rank: int = 0, world: int = 1) -> PackedBatch:
        return self._batch

    def held_out_prompts(self, count: int, max_prompt: int) -> list[list[int]]:
        return [[1]]


# --------------------------------------------------------------------------------- what is measured


def forward_pass(target: Llama, batch: PackedBatch) -> Callable[[], None]:
    """(a): features and, chunk by chunk, logits at every position."""
    device = target.embed_tokens.weight.device
    tokens, positions = batch.tokens.to(device)[None], batch.positions.to(device)[None]
    edges = batch.cu_seqlens.to(device)

    @torch.no_grad()
    def work() -> None:
        attention = PackedAttention(edges, batch.max_seqlen)
        features = target(tokens, positions, attention).features[0]
        for rows in features.split(LOGIT_ROWS):
            target.logits(rows)

    return work


def training_step(
    target: Llama, batch: PackedBatch, settings: Mapping[str, Any]
) -> Callable[[], None]:
    """(b): one optimiser step of the trainer on this batch."""
    tokens = len(batch.tokens)
    config = TrainConfig(
        target="", data="", max_length=min(batch.max_seqlen, tokens), tokens_per_batch=tokens,
        tokens=10**6 * tokens, eval_tokens=1, **settings,
    )  # fmt: skip
    packer: Any = OneBatch(batch)
    tokenizer: Any = None  # of no use without acceptance checks
    trainer = Trainer(config, LlamaTeacher(target), tokenizer, packer)
    feed = Feed(packer, trainer.world, 1, trainer.teacher.device)
    window = Window(trainer.world, feed, 0)

    def work() -> None:
        trainer._update(feed, window, config.learning_rate)

    return work


def tokens_per_second(work: Callable[[], None], tokens: int, repeats: int) -> float:
    """Of several runs in a row, as in a run; the first ones warm up, and may compile."""
    for _ in range(3):
        work()
    synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    return tokens * repeats / (time.perf_counter() - started)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def best(
    make: Callable[[PackedBatch], Callable[[], None]], config: LlamaConfig,
    options: argparse.Namespace,
) -> tuple[float, int]:  # fmt: skip
    """The most tokens per second over batch sizes, and that size; sizes that do not fit are
    passed over."""
    found: list[tuple[float, int]] = []
    for size in options.tokens:
        batch = synthetic_batch(config.vocab_size, size, options.length, options.scored)
        try:
            found.append((tokens_per_second(make(batch), size, options.repeats), size))
        except torch.cuda.OutOfMemoryError:
            print(f"{size} tokens do not fit", flush=True)
        free()
    if not found:
        raise SystemExit(f"--tokens {options.tokens}: no batch fits; give smaller ones")
    return max(found)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class Work:
    """Multiply-adds per token of a model's parts; attention at the mean place in a document."""

    layer: int
    attention: float
    head: int

    @classmethod
    def of(cls, config: LlamaConfig, length: int) -> Work:
        heads = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        products = 2 * heads + 2 * keys + 3 * config.intermediate_size
        return cls(
            config.hidden_size * products, heads * length, config.vocab_size * config.hidden_size
        )


def forward_work(config: LlamaConfig, length: int) -> float:
    """(a), multiply-adds per token."""
    work = Work.of(config, length)
    return config.num_layers * (work.layer + work.attention) + work.head


def training_work(
    config: LlamaConfig, length: int, layers: int, unroll: int = 1, scored: float = 1.0
) -> float:
    """(b), EAGLE-1: the target without its head; its head at scored positions; in every unrolled
    step the draft forward and backward (attention's backward is 2.5 forwards), its logits, and the
    gradient through the frozen head."""
    work = Work.of(config, length)
    target = config.num_layers * (work.layer + work.attention) + scored * work.head
    draft = 3 * (layers * work.layer + 2 * config.hidden_size**2) + 3.5 * layers * work.attention
    return target + unroll * (draft + 2 * scored * work.head)


# ----------------------------------------------------------------------------------------- profile

KINDS = {  # the first that matches a kernel's or an operation's name
    "attention": r"flash|fmha|scaled_dot_product|^_chain",
    "optimiser": r"multi_tensor|adam|foreach",
    "matmul": r"gemm|cutlass|nvjet|cublas|xmma|aten::(mm|addmm|bmm|linear|matmul)$|mkldnn",
    "laws": r"^_divergence",
}


def kind_of(name: str) -> str:
    """ "elementwise" is all that is nothing else: norms, rotary, SiLU, casts, copies."""
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, "elementwise")


def time_shares(work: Callable[[], None], vocab: int) -> dict[str, float]:
    """Share of the device's time by kind of work. The vocabulary loss is products with a side as
    long as the vocabulary, and what compares the two laws; "busy" is the share of the wall time in
    which the device worked."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    synchronize()
    started = time.perf_counter()
    with profile(activities=activities, record_shapes=True) as trace:
        for _ in range(PROFILED):
            work()
        synchronize()
    wall_us = 1e6 * (time.perf_counter() - started)
    clock = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = trace.key_averages(group_by_input_shape=True)
    on_host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    names = {e.key for e in on_host}  # a region of the host is no kernel, though the trace has both
    kernels = [e for e in events if e.key not in names] if cuda else on_host
    sums: dict[str, float] = collections.defaultdict(float)
    for event in kernels:
        sums[kind_of(event.key)] += getattr(event, clock)
    for event in on_host:
        sides = {side for shape in event.input_shapes for side in shape}
        if kind_of(event.key) == "matmul" and vocab in sides:
            sums["vocabulary"] += getattr(event, clock)
    sums["matmul"] -= sums["vocabulary"]
    sums["vocabulary"] += sums.pop("laws", 0.0)
    total = sum(sums.values())
    shares = {kind: round(spent / total, 4) for kind, spent in sorted(sums.items())}
    print(trace.key_averages().table(sort_by=clock, row_limit=15, max_name_column_width=60))
    return {**shares, "busy": round(min(1.0, total / wall_us), 4)}


# --------------------------------------------------------------------------------------------- all


def measured(name: str, options: argparse.Namespace) -> Iterator[Row]:
    """A row for each number of unrolled steps."""
    config, length = SHAPES[name], options.length
    target = random_llama(config, length + 1024, options.device)
    alone, alone_size = best(lambda batch: forward_pass(target, batch), config, options)
    work = forward_work(config, length)
    print(f"{name}: target alone {alone:,.0f} tokens/s in batches of {alone_size}", flush=True)
    for unroll in options.unroll:
        settings = {"layers": options.layers, "objective": options.objective, "unroll": unroll}
        limit = work / training_work(config, length, options.layers, unroll, options.scored)
        print(f"limit: {limit:.3f} of the target alone", flush=True)
        speed, size = best(
            lambda batch, s=settings: training_step(target, batch, s), config, options
        )
        row = {
            "model": name, **settings, "length": length, "scored": options.scored,
            "target_tokens_per_second": round(alone), "target_batch": alone_size,
            "training_tokens_per_second": round(speed), "training_batch": size,
            "ratio": round(speed / alone, 4), "limit": round(limit, 4),
            "goal": GOALS.get(name) if unroll == 1 and options.layers == 3 else None,
            "target_tflops": round(2e-12 * alone * work, 1),
            "training_tflops": round(2e-12 * speed * work / limit, 1),
        }  # fmt: skip
        print(row, flush=True)
        batch = synthetic_batch(config.vocab_size, size, length, options.scored)
        step = training_step(target, batch, settings)
        for _ in range(2):
            step()
        yield {**row, "time": time_shares(step, config.vocab_size)}
        del step
        free()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=None)
    parser.add_argument("--device", default=machine().type)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["smollm2", "llama-3.1-8b"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--length", type=int, default=1024, help="of a document")
    parser.add_argument("--scored", type=float, default=1.0, help="share of positions in the loss")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--objective", default="eagle")
    parser.add_argument("--unroll", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--repeats", type=int, default=10)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    mark = fingerprint(device)
    print(mark, flush=True)
    free()
    rows: list[Row] = []
    for name in options.models:
        rows += measured(name, options)
        free()
    write_result(options.out, {**stamp(device), "fingerprint": mark, "rows": rows})


if __name__ == "__main__":
    main()
