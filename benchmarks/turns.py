"""Conversations of ten turns: what the prefix cache finds again, and that the text stays the same.

    python -m benchmarks.turns --out benchmarks/results/turns.json

SmolLM2 with its draft answers MT-Bench's first questions, ten in a row a conversation. Of the
tokens that a prompt shares with the last turn, all but one could come from the cache;
``num_cached_tokens`` tells how many do. Answers are tokenised anew with the template: where that
changes them, the shared part ends. The same is done without a cache.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

from aquiline import LLM, SamplingParams
from aquiline.cli.options import BUILT_IN
from aquiline.cli.tune import prompt_texts
from aquiline.core.outputs import SpeculationStats
from aquiline.engine.loader import choose_device
from aquiline.kvcache.prefix import shared
from benchmarks.common import stamp, write_result


@dataclass(frozen=True)
class Turn:
    """One answer; ``shared`` tokens of the prompt are the last turn's, ``retokenised``: not all of
    its answer's."""

    answer: tuple[int, ...]
    shared: int
    cached: int
    retokenised: bool
    speculation: SpeculationStats


def play(llm: LLM, questions: list[list[str]], params: SamplingParams) -> list[list[Turn]]:
    """Every conversation's turns; the conversations go on side by side."""
    messages: list[list[dict[str, str]]] = [[] for _ in questions]
    before: list[tuple[int, ...]] = [()] * len(questions)
    turns: list[list[Turn]] = [[] for _ in questions]
    ends = [(token,) for token in llm.tokenizer.eos_token_ids]
    for number in range(len(questions[0])):
        for history, asked in zip(messages, questions, strict=True):
            history.append({"role": "user", "content": asked[number]})
        for i, output in enumerate(llm.chat(messages, params)):
            prompt, (answer,) = output.prompt_token_ids, output.outputs
            common = shared(before[i], prompt)
            said = len(before[i]) - (before[i][-1:] in ends)
            turns[i].append(
                Turn(answer.token_ids, common, output.num_cached_tokens, common < said,
                     output.speculation)
            )  # fmt: skip
            before[i] = (*prompt, *answer.token_ids)
            messages[i].append({"role": "assistant", "content": answer.text})
    return turns


def summary(conversations: list[list[Turn]], page_size: int) -> dict[str, Any]:
    """Sums over all turns but the first. ``missed``: shared tokens that were run again; ``worst``:
    the most of a turn; ``short``: turns that missed more than their last partial page and one
    page."""
    later = [turn for turns in conversations for turn in turns[1:]]
    every = [turn for turns in conversations for turn in turns]
    missed = [turn.shared - turn.cached for turn in later]
    return {
        "shared": sum(turn.shared for turn in later),
        "cached": sum(turn.cached for turn in later),
        "missed": sum(max(0, one) for one in missed),
        "worst": max(missed, default=0),
        "short": sum(
            one > turn.shared % page_size + page_size
            for one, turn in zip(missed, later, strict=True)
        ),
        "retokenised": sum(turn.retokenised for turn in later),
        "turns": len(later),
        "tpc": round(SpeculationStats.sum(t.speculation for t in every).tokens_per_call, 4),
    }


def measured(options: argparse.Namespace, cache: bool) -> tuple[list[list[Turn]], dict[str, Any]]:
    llm = LLM(
        BUILT_IN, options.dtype, {"tree": options.tree}, device=options.device,
        max_num_seqs=options.conversations, kv_cache_tokens=options.kv_tokens,
        enable_prefix_caching=cache,
    )  # fmt: skip
    count = options.conversations * options.turns
    texts = prompt_texts(min(count, 80), None)
    texts = [texts[i % len(texts)] for i in range(count)]
    questions = [texts[i :: options.conversations] for i in range(options.conversations)]
    params = SamplingParams(temperature=options.temperature, max_tokens=options.tokens, seed=0)
    started = time.perf_counter()
    turns = play(llm, questions, params)
    seconds = round(time.perf_counter() - started, 2)
    return turns, {**summary(turns, llm.engine.config.page_size), "seconds": seconds}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tree", default="chain-3")
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--kv-tokens", type=int, default=65536)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    with_cache, on = measured(options, True)
    without, off = measured(options, False)
    pairs = [
        pair for both in zip(with_cache, without, strict=True) for pair in zip(*both, strict=True)
    ]
    write_result(
        options.out,
        {
            **stamp(choose_device(options.device)), "model": BUILT_IN, "dtype": options.dtype,
            "tree": options.tree, "conversations": options.conversations, "turns": options.turns,
            "tokens": options.tokens, "cache": on, "no_cache": off,
            "identical": sum(a.answer == b.answer for a, b in pairs) / len(pairs),
            "tpc_ratio": round(on["tpc"] / off["tpc"], 4),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
