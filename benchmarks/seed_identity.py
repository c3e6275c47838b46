"""Same seed, same text: SmolLM2 at T=0.8, top-p 0.95 in fp32, without speculation and with it.

    python -m benchmarks.seed_identity --out benchmarks/results/seed_identity.json

Every prompt (MT-Bench's first turns) has a seed of its own. The text of plain decoding, one request
at a time, is set beside plain decoding in batches and beside a chain of 3 and a tree of 25 nodes,
one request at a time and in batches. A difference counts only if, where the texts part, the two
leading perturbed logits (logits / T within the nucleus, plus the seed's noise) differ by more than
1e-3; each is printed. A run is good only if the perturbed logits name what plain decoding said.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from aquiline import LLM, SamplingParams
from aquiline.cli.options import BUILT_IN
from aquiline.cli.tune import prompt_texts
from aquiline.engine.loader import choose_device
from aquiline.models.llama import Llama
from aquiline.sampling.batch import SamplingBatch
from aquiline.sampling.draw import position_noise
from aquiline.sampling.filters import probabilities
from benchmarks.common import stamp, write_result
from benchmarks.fp32_identity import TOLERANCE, Perturb, Text, divergences, next_logits

FORMS = {"none": None, "chain-3": {"tree": "chain-3"}, "eagle-25": {"tree": "eagle-25"}}
NAMED = 8  # texts whose last token is drawn anew from the perturbed logits


def perturbing(params: Sequence[SamplingParams]) -> Perturb:
    """What a draw compares: the scores of the tokens that the filters keep, with noise; logits if
    it is greedy."""

    def perturb(number: int, position: int, logits: Tensor) -> Tensor:
        seed = params[number].seed
        if params[number].temperature == 0:
            return logits
        assert seed is not None
        row, at = SamplingBatch.of([params[number]], [seed], logits.device), logits[None, None]
        noise = position_noise(row, torch.tensor([[position]]), len(logits))
        assert noise is not None
        # logits / T up to a constant, -inf if filtered
        return probabilities(at, row).log()[0, 0] + noise.table[0, 0]

    return perturb


def texts_of(
    llm: LLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams], batch: int
) -> list[Text]:
    """``batch`` requests at a time, in groups."""
    found: list[Text] = []
    for start in range(0, len(prompts), batch):
        group = slice(start, start + batch)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts[group]]
        found += [out.outputs[0].token_ids for out in llm.generate(asked, params[group])]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=int, default=50, help="prompts of MT-Bench's 80")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    options = parser.parse_args()
    device = choose_device(options.device)
    assert not torch.backends.cuda.matmul.allow_tf32
    base = SamplingParams(
        temperature=options.temperature, top_p=options.top_p, max_tokens=options.tokens,
        ignore_eos=True,
    )  # fmt: skip
    params = [replace(base, seed=seed) for seed in range(options.limit)]
    perturb = perturbing(params)
    prompts: list[list[int]] = []
    expected: list[Text] = []
    rows = []
    for form, config in FORMS.items():
        llm = LLM(BUILT_IN, "float32", config, device=device.type, max_model_len=2048,
                  max_num_seqs=max(options.batches), kv_cache_tokens=32768,
                  enable_prefix_caching=False)  # fmt: skip
        if not prompts:
            exact = llm.engine.runner.models.target
            prompts = [
                llm.tokenizer.encode_chat([{"role": "user", "content": text}])
                for text in prompt_texts(options.limit, None)
            ]
            expected = texts_of(llm, prompts, params, 1)
        for batch in options.batches:
            if form == "none" and batch == 1:
                continue  # the reference
            started = time.perf_counter()
            ours = texts_of(llm, prompts, params, batch)
            seconds = time.perf_counter() - started
            found = divergences(exact, None, prompts, ours, expected, perturb)
            rows.append(
                {"form": form, "batch": batch, "prompts": len(prompts),
                 "identical": len(prompts) - len(found),
                 "counted": sum(one.gap > TOLERANCE for one in found),
                 "seconds": round(seconds, 2), "differences": [asdict(one) for one in found]}
            )  # fmt: skip
            print(rows[-1], flush=True)
    named = drawn_anew(exact, prompts, expected, perturb)
    write_result(
        options.out,
        {
            **stamp(device), "model": BUILT_IN, "dtype": "float32", "tokens": options.tokens,
            "temperature": options.temperature, "top_p": options.top_p,
            "ok": named and not any(row["counted"] for row in rows), "rows": rows,
        },
    )  # fmt: skip


def drawn_anew(
    exact: Llama, prompts: Sequence[list[int]], texts: Sequence[Text], perturb: Perturb
) -> bool:
    """Whether the perturbed logits name what was said last in the first texts."""
    for number, (prompt, text) in enumerate(zip(prompts[:NAMED], texts, strict=False)):
        prefix = [*prompt, *text[:-1]]
        scores = perturb(number, len(prefix), next_logits(exact, prefix))
        first, second = scores.topk(2).values.tolist()
        if int(scores.argmax()) != text[-1] and first - second > TOLERANCE:
            return False
    return True


if __name__ == "__main__":
    main()
