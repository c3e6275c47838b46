"""Engines of tiny checkpoints for tests: one for each target and shape, in two paces.

``clean`` recites the alphabet and its draft is perfect; ``mixed`` depends on its whole context and
the same draft is right now and then, so that rounds of every length occur. All in float64.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aquiline.core.outputs import RequestOutput
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from tests.tiny_checkpoint import CYCLE, write_draft, write_eagle3, write_target

CHAIN: dict[str, Any] = {"num_speculative_tokens": 3}
TREE: dict[str, Any] = {"tree": [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]}
SHAPES = {
    "plain": None,
    "chain": CHAIN,
    "tree": TREE,
    "eagle-25": {"tree": "eagle-25"},
    "retrieving": {**TREE, "retrieval": 5},
}
GREEDY = SamplingParams(temperature=0, max_tokens=20)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z ]{0,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tag": {"enum": ["a", "be", None]},
    },
    "required": ["name", "tag"],
}
LETTERS = r"[a-z]{3}(b|c[d-m]+)(nop|q)*r"
FORMS: list[dict[str, Any]] = [
    {"json": SCHEMA},
    {"regex": LETTERS},
    {"choice": ["abc", "abd", "b", "abcdef"]},
    {"grammar": 'root ::= "(" root ")" | [x-z] root | "o"'},
    {"json_object": True},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engine")
    return {
        "clean": write_target(root / "clean"),
        "mixed": write_target(root / "mixed", mix=0.15),
        "draft": write_draft(root / "draft"),
        "eagle3": write_eagle3(root / "eagle3", foresees=root / "clean"),
        "bad-eagle3": write_eagle3(root / "bad-eagle3", layers=2, draft_vocab=90),
        "bad-draft": write_draft(root / "bad-draft", layers=2, copies=False),
    }


class Make:
    """Builds engines by target and shape, each once."""

    def __init__(self, folders: dict[str, Path], ahead: int) -> None:
        self.folders, self.ahead = folders, ahead
        self.made: dict[str, LLM] = {}

    def __call__(
        self,
        target: str,
        shape: dict[str, Any] | None,
        draft: str = "draft",
        **options: Any,
    ) -> LLM:
        options = {"max_num_seqs": 4, "page_size": 8, "max_model_len": 96, **options}
        key = repr((target, shape, draft, options))
        if key not in self.made:
            speculation = None if shape is None else {"model": str(self.folders[draft]), **shape}
            self.made[key] = LLM(str(self.folders[target]), "float64", speculation, **options)
            self.made[key].engine.runner.ahead = self.ahead
        return self.made[key]


@pytest.fixture(scope="module", params=[0, 1], ids=["in step", "a round ahead"])
def make(folders: dict[str, Path], request: pytest.FixtureRequest) -> Make:
    """Engines that read each round at once (the CPU's way), or while the next one runs (CUDA's)."""
    return Make(folders, request.param)


def prompts(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random prompts of 1 to 30 tokens."""
    draw = random.Random(seed)
    return [
        {"prompt_token_ids": [draw.choice(CYCLE) for _ in range(draw.randint(1, 30))]}
        for _ in range(count)
    ]


def mixed_params(count: int) -> list[SamplingParams]:
    """Greedy and seeded, with every filter, penalty, bias and ban, of different lengths."""
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(
            temperature=1.5, presence_penalty=1.5, frequency_penalty=0.7, repetition_penalty=1.4
        ),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=2.5, top_k=7),
        SamplingParams(temperature=0, frequency_penalty=2.0, presence_penalty=-1.0),
        SamplingParams(temperature=1.5, top_p=0.8, logit_bias={CYCLE[3]: 4.0, CYCLE[9]: -100.0}),
        SamplingParams(
            temperature=1.5, allowed_token_ids=tuple(CYCLE[:20]), banned_token_ids=(CYCLE[4],),
            stop_token_ids=(CYCLE[6], CYCLE[12]), min_tokens=6,
        ),
        SamplingParams(temperature=3.0, min_p=0.02, top_k=20),
        SamplingParams(
            temperature=2.0, top_p=0.9, min_p=0.01, top_k=30, presence_penalty=0.5,
            frequency_penalty=0.5, repetition_penalty=0.8, logit_bias={CYCLE[5]: 2.5, 3: 1.5},
            banned_token_ids=(CYCLE[0],), stop_token_ids=(CYCLE[7],), min_tokens=8, logprobs=2,
        ),
    ]  # fmt: skip
    lengths = [1 + 7 * i % 32 for i in range(count)]
    return [
        replace(
            kinds[i % len(kinds)], seed=100 + i, max_tokens=length, ignore_eos=True,
            min_tokens=min(kinds[i % len(kinds)].min_tokens, length),
        )
        for i, length in enumerate(lengths)
    ]  # fmt: skip


def forms_and_none(count: int, limit: int = 70) -> list[SamplingParams]:
    """Every form in turn, every fourth request without one, with parameters of their own."""
    found = []
    for i, params in enumerate(mixed_params(count)):
        if i % 4:
            form = FORMS[i % len(FORMS)]
            params = replace(
                params, structured_outputs=form, ignore_eos=False, min_tokens=0, logprobs=i % 3,
                allowed_token_ids=None, banned_token_ids=(), stop_token_ids=(), max_tokens=limit,
            )  # fmt: skip
        found.append(params)
    return found


def said(output: RequestOutput) -> tuple[tuple[int, ...], str, str | None]:
    return (
        output.outputs[0].token_ids, output.outputs[0].text, output.outputs[0].finish_reason
    )  # fmt: skip


def assert_idle(llm: LLM) -> None:
    """Every page and every row is free again, what the prefix cache keeps included."""
    allocator, cache = llm.engine.allocator, llm.engine.scheduler.cache
    allocator.check_integrity([])
    if cache is not None:
        cache.check_integrity()
    assert allocator.free_count == allocator.count - 1
    assert not llm.engine.has_work
    assert len(llm.engine.scheduler._rows) == llm.engine.config.max_num_seqs


def count_preemptions(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of requests as they are preempted."""
    scheduler, preempted = llm.engine.scheduler, []
    preempt = scheduler._preempt

    def spy(sequence: Any) -> None:
        preempted.append(sequence.request.id)
        preempt(sequence)

    monkeypatch.setattr(scheduler, "_preempt", spy)
    return preempted
