"""Greedy text of SmolLM2 on the card: in fp32 the CPU's; in bf16, where it parts and why.

    python -m benchmarks.fp32_identity --out benchmarks/results/fp32_identity.json

fp32: plain and a chain of 3 on the card against plain decoding on the CPU. A difference counts only
if the two leading logits, in fp32 on the CPU, differ by more than 1e-3 where the texts part. bf16:
a chain of 3 against plain decoding, both on the card; the gap of the two leading fp32 logits is set
beside the largest error that bf16 makes there: a near tie is a gap that two such errors can close.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from aquiline import LLM, SamplingParams
from aquiline.attention.packed import PackedAttention
from aquiline.cli.options import BUILT_IN
from aquiline.cli.tune import prompt_texts
from aquiline.engine.loader import choose_device
from aquiline.models.llama import Llama
from benchmarks.common import fingerprint, stamp, write_result

TOLERANCE = 1e-3
LEADING = 8  # tokens over which bf16's error is taken

Text = tuple[int, ...]
Perturb = Callable[[int, int, Tensor], Tensor]  # prompt's number, position, [V] -> [V] fp32


@torch.inference_mode()
def next_logits(target: Llama, prefix: Sequence[int]) -> Tensor:
    """[V] fp32 on the CPU: the logits after ``prefix``, by one pass over it."""
    device, count = target.embed_tokens.weight.device, len(prefix)
    edges = torch.tensor([0, count], dtype=torch.int32, device=device)
    tokens = torch.tensor([list(prefix)], device=device)
    positions = torch.arange(count, device=device)[None]
    output = target(tokens, positions, PackedAttention(edges, count))
    return target.logits(output.features[:, -1:])[0, 0].float().cpu()


@dataclass(frozen=True)
class Divergence:
    """Where two texts of a prompt part.

    Attributes:
        tokens: common tokens before.
        ours, expected: the tokens there.
        gap: between the two leading (perturbed) logits, in fp32.
        error: the largest of the low-precision model among the leading logits; 0 in fp32.
        leading: whether the two tokens are the two leading ones.
    """

    prompt: int
    tokens: int
    ours: int
    expected: int
    gap: float
    error: float
    leading: bool


def divergences(
    exact: Llama, low: Llama | None, prompts: Sequence[list[int]], ours: Sequence[Text],
    expected: Sequence[Text], perturb: Perturb | None = None,
) -> list[Divergence]:  # fmt: skip
    """``exact`` prices each in fp32; ``low`` is the model in low precision, if that is at issue.

    Texts that were sampled part where ``perturb`` makes of the logits what the draw compared.
    """
    found = []
    for number, (prompt, a, b) in enumerate(zip(prompts, ours, expected, strict=True)):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if at is None:
            if len(a) != len(b):
                raise ValueError(f"prompt {number}: one text is the beginning of the other")
            continue
        prefix = [*prompt, *a[:at]]
        logits = next_logits(exact, prefix)
        if perturb is not None:
            logits = perturb(number, len(prefix), logits)
        top = logits.topk(LEADING)
        gap = float(top.values[0] - top.values[1])
        error = 0.0
        if low is not None:
            error = float((next_logits(low, prefix) - logits)[top.indices].abs().max())
        leading = {a[at], b[at]} == set(top.indices[:2].tolist())
        found.append(Divergence(number, at, a[at], b[at], gap, error, leading))
        print(found[-1], flush=True)
    return found


def texts_of(llm: LLM, prompts: Sequence[list[int]], tokens: int) -> list[Text]:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    print(f"  {time.perf_counter() - started:.1f} s", flush=True)
    return [output.outputs[0].token_ids for output in outputs]


def summary(prompts: int, found: Sequence[Divergence]) -> dict[str, object]:
    apart = [one.tokens for one in found]
    return {
        "identical": prompts - len(found), "prompts": prompts,
        "median_tokens_to_divergence": statistics.median(apart) if apart else None,
        "divergences": [asdict(one) for one in found],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=None)
    parser.add_argument("--device", default="auto", help="what is compared with the CPU")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    device = choose_device(options.device)
    torch.set_num_threads(options.threads)
    assert not torch.backends.cuda.matmul.allow_tf32
    mark = fingerprint(device)
    print(mark, flush=True)
    chain = {"method": "eagle", "num_speculative_tokens": 3}

    def make(dtype: str, config: dict[str, object] | None, where: str, rows: int) -> LLM:
        print(f"{dtype} {'plain' if config is None else 'chain-3'} on {where}", flush=True)
        return LLM(BUILT_IN, dtype, config, device=where, max_num_seqs=rows, max_model_len=2048,
                   kv_cache_tokens=65536)  # type: ignore[arg-type]  # fmt: skip

    cpu = make("float32", None, "cpu", options.prompts)
    texts = prompt_texts(options.prompts, None)
    encode = cpu.tokenizer.encode_chat
    prompts = [encode([{"role": "user", "content": text}]) for text in texts]
    expected = texts_of(cpu, prompts, options.tokens)
    exact = cpu.engine.runner.models.target
    fp32 = {}
    for name, config in {"none": None, "chain-3": chain}.items():
        ours = texts_of(make("float32", config, device.type, options.batch), prompts,
                        options.tokens)  # fmt: skip
        found = divergences(exact, None, prompts, ours, expected)
        count = sum(one.gap > TOLERANCE for one in found)
        fp32[name] = {**summary(len(prompts), found), "counted": count}
        print(f"fp32 {name}: {len(found)} of {len(prompts)} part, {count} count", flush=True)
    plain = make("bfloat16", None, device.type, options.batch)
    said = texts_of(plain, prompts, options.tokens)
    ours = texts_of(make("bfloat16", chain, device.type, options.batch), prompts, options.tokens)
    low = plain.engine.runner.models.target
    found = divergences(exact, low, prompts, ours, said)
    near = sum(one.gap <= 2 * one.error for one in found)
    print(f"bf16: {len(found)} of {len(prompts)} part, {near} at a near tie", flush=True)
    bf16 = {**summary(len(prompts), found), "near_ties": near}
    write_result(
        options.out,
        {
            **stamp(device), "fingerprint": mark, "model": BUILT_IN, "tokens": options.tokens,
            "batch": options.batch, "ok": all(one["counted"] == 0 for one in fp32.values())
            and near == len(found), "fp32": fp32, "bf16": bf16,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
