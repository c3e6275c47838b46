"""``aquiline demo``: the main promise in a minute: the same text, sooner."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console

from aquiline.cli import options
from aquiline.cli.colour import DEPTH_STYLES, coloured
from aquiline.core.outputs import RequestOutput
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM

# Written for this demo, one for each of MT-Bench's categories.
PROMPTS = {
    "writing": "Write a short letter to a friend about a week spent in a mountain cabin.",
    "roleplay": "You are the captain of an old sailing ship. Explain to a new sailor how you steer "
    "by the stars.",
    "reasoning": "A shop opens at nine and closes at five. It is closed for one hour at noon. How "
    "many hours is it open in six days? Explain step by step.",
    "math": "A rectangle is 12 metres long and 7 metres wide. What are its area and perimeter?",
    "coding": "Write a Python function that returns the longest word in a sentence, and explain "
    "how it works.",
    "extraction": "List the names, places and dates in this sentence: On 4 May 1931, Clara Jensen "
    "left Bergen by train and met Otto Brandt in Oslo the next morning.",
    "stem": "Explain how a refrigerator keeps food cold.",
    "humanities": "What were the main causes of the Industrial Revolution, and how did it change "
    "daily life?",
}


@dataclass(frozen=True)
class Timed:
    """One answer and the seconds from its first token to its last."""

    output: RequestOutput
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return (len(self.output.outputs[0].token_ids) - 1) / self.seconds


def demo(
    model: options.Model = options.BUILT_IN,
    max_tokens: options.MaxTokens = 128,
    draft: options.Draft = None,
    method: options.Method = "eagle",
    tree: options.Tree = None,
    verification: options.Verification = "coupled",
    dtype: options.Dtype = "float32",
    quiet: Annotated[bool, typer.Option(help="Only the summary.")] = False,
    json_output: options.Json = False,
) -> None:
    """Answer eight prompts greedily, without and with speculation, and compare."""
    config = options.speculative_config(model, draft, tree, verification, method)
    plain = LLM(model, dtype, None, max_num_seqs=1)  # type: ignore[arg-type]
    fast = LLM(model, dtype, config, max_num_seqs=1)  # type: ignore[arg-type]
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    console = Console(stderr=json_output, highlight=False)
    for llm in (plain, fast):
        timed(llm, "Hello", SamplingParams(temperature=0, max_tokens=8))
    pairs: list[tuple[Timed, Timed]] = []
    for category, prompt in PROMPTS.items():
        pair = timed(plain, prompt, params), timed(fast, prompt, params)
        pairs.append(pair)
        if not quiet:
            _show(console, fast, category, prompt, pair)
    summary = summarise(pairs)
    summary |= {
        "model": model, "dtype": dtype, "tree": tree or "chain-3", "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    if json_output:
        print(json.dumps(summary))
        return
    legend = " ".join(f"[{style}]depth {d}[/]" for d, style in enumerate(DEPTH_STYLES) if d)
    console.print(f"accepted draft tokens: {legend}")
    for key, value in summary.items():
        console.print(f"{key:>20}: {value}")


def timed(llm: LLM, prompt: str, params: SamplingParams) -> Timed:
    """Answer one chat prompt; the clock runs from the first token to the last."""
    started, last = 0.0, None
    for output in llm.stream([{"role": "user", "content": prompt}], params):
        started = started or time.perf_counter()
        last = output
    assert last is not None
    return Timed(last, max(time.perf_counter() - started, 1e-9))


def summarise(pairs: list[tuple[Timed, Timed]]) -> dict[str, object]:
    """Texts compared, acceptance, speed; the speed-up is the ratio of total decoding times."""
    same = [a.output.outputs[0].token_ids == b.output.outputs[0].token_ids for a, b in pairs]
    stats = [fast.output.speculation for _, fast in pairs]
    rounds = sum(s.rounds for s in stats)
    depth = max(len(s.accepted_by_depth) for s in stats)
    reached = [sum(s.accepted_by_depth[d] for s in stats) for d in range(depth)]
    tokens = sum(len(plain.output.outputs[0].token_ids) - 1 for plain, _ in pairs)
    fast_tokens = sum(len(fast.output.outputs[0].token_ids) - 1 for _, fast in pairs)
    seconds = sum(plain.seconds for plain, _ in pairs)
    fast_seconds = sum(fast.seconds for _, fast in pairs)
    return {
        "prompts": len(pairs),
        "identical": all(same),
        "identical_texts": sum(same),
        "tokens_per_call": round(sum(s.tokens for s in stats) / max(rounds, 1), 3),
        "accepted_by_depth": [round(count / max(rounds, 1), 3) for count in reached],
        "plain_tokens_per_second": round(tokens / seconds, 2),
        "tokens_per_second": round(fast_tokens / fast_seconds, 2),
        "speedup": round((fast_tokens / fast_seconds) / (tokens / seconds), 3),
    }


def _show(
    console: Console, llm: LLM, category: str, prompt: str, pair: tuple[Timed, Timed]
) -> None:
    plain, fast = pair
    answer, stats = fast.output.outputs[0], fast.output.speculation
    console.print(f"[bold]{category}[/bold]: {prompt}")
    console.print(coloured(llm.tokenizer, answer.token_ids, stats.depths), soft_wrap=True)
    same = "same text" if answer.token_ids == plain.output.outputs[0].token_ids else "TEXT DIFFERS"
    console.print(
        f"{same}, {stats.tokens_per_call:.2f} tokens per call, "
        f"{plain.tokens_per_second:.1f} -> {fast.tokens_per_second:.1f} tokens/s\n",
        style="dim",
    )
