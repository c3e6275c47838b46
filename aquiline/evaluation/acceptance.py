"""Acceptance on benchmark tasks: TPC over whole conversations, through the engine.

Every question's first turn is answered, then its second with the first answer in the context. TPC
is tokens over rounds of all answers together: long answers weigh more, as in production.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aquiline.core.outputs import RequestOutput, SpeculationStats
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from aquiline.evaluation.tasks import TaskPrompt


@dataclass(frozen=True)
class TaskAcceptance:
    """Answers of one task.

    Attributes:
        answers: one for each turn of each question.
        by_depth: share of rounds that accepted a draft token at depth 1, 2, ...
        token_ids: token ids of every answer, to compare runs.
    """

    answers: int
    rounds: int
    tokens: int
    by_depth: tuple[float, ...]
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def tokens_per_call(self) -> float:
        return self.tokens / max(self.rounds, 1)


def task_acceptance(
    llm: LLM, prompts: Sequence[TaskPrompt], params: SamplingParams
) -> TaskAcceptance:
    """Answer every turn of every prompt; the answers of a turn are one batch."""
    conversations: list[list[dict[str, str]]] = [[] for _ in prompts]
    outputs: list[RequestOutput] = []
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        asked = [
            (prompt, conversation)
            for prompt, conversation in zip(prompts, conversations, strict=True)
            if turn < len(prompt.turns)
        ]
        for prompt, conversation in asked:
            conversation.append({"role": "user", "content": prompt.turns[turn]})
        answers = llm.chat([conversation for _, conversation in asked], params)
        for (_, conversation), answer in zip(asked, answers, strict=True):
            conversation.append({"role": "assistant", "content": answer.outputs[0].text})
        outputs += answers
    return _summary(outputs)


def _summary(outputs: Sequence[RequestOutput]) -> TaskAcceptance:
    stats: list[SpeculationStats] = [output.speculation for output in outputs]
    rounds = sum(s.rounds for s in stats)
    depth = max(len(s.accepted_by_depth) for s in stats)
    padded = [[*s.accepted_by_depth, *[0] * (depth - len(s.accepted_by_depth))] for s in stats]
    reached = [sum(column) / max(rounds, 1) for column in zip(*padded, strict=True)]
    texts = tuple(output.outputs[0].token_ids for output in outputs)
    return TaskAcceptance(len(outputs), rounds, sum(s.tokens for s in stats), tuple(reached), texts)
