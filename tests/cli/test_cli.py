"""The command line: bad input is one line and exit code 2; good input does what it says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
import torch
from safetensors.torch import load_file, save_file

from aquiline.cli.main import main
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from aquiline.speculation.dispatch.paths import BANDS
from aquiline.speculation.dispatch.table import DispatchTable
from tests.tiny_checkpoint import VOCAB, write_draft, write_eagle3, write_target


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class Command(Protocol):
    def __call__(self, *args: object) -> Result: ...


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def aquiline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process."""

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["aquiline", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, drafts that fit and do not, conversations."""
    root = tmp_path_factory.mktemp("cli")
    write_target(root / "target", mix=0.15, context=640)
    write_draft(root / "draft", context=640)
    write_draft(root / "wide", hidden_size=48)
    write_draft(root / "other-vocabulary", vocab_size=VOCAB + 8)
    write_draft(root / "mixed")
    tensors = load_file(root / "mixed/model.safetensors")
    save_file({**tensors, "d2t": torch.zeros(3)}, root / "mixed/model.safetensors")
    write_eagle3(root / "eagle3", context=640)
    for folder in ("target", "draft"):
        shutil.copytree(root / folder, root / f"truncated-{folder}")
        file = root / f"truncated-{folder}/model.safetensors"
        file.write_bytes(file.read_bytes()[:-500])
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"go {i}"},
                {"role": "assistant", "content": "abcdefghijklmnop"[i % 5 :]},
            ]
        }
        for i in range(30)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "data.jsonl").write_text(text)
    (root / "bad.jsonl").write_text(text + '{"messages": [}\n' + text)
    (root / "empty.txt").write_text("\n \n")
    (root / "prompts.txt").write_text("abc\n\nxyz\n")
    (root / "broken.py").write_text("def recipe():\n    return 3\n")
    return root


SMALL = (
    "--set", "layers=1", "--set", "max_length=96", "--set", "tokens_per_batch=192", "--set",
    "tokens=1152", "--set", "warmup_tokens=192", "--set", "holdout=4", "--set", "eval_every=3",
    "--set", "eval_prompts=2", "--set", "eval_tokens=8", "--set", "device=cpu",
)  # fmt: skip
GENERATE = "generate {root}/target --dtype float32 --max-tokens 4"
TRAIN = (
    "train --target {root}/target --data {root}/data.jsonl --out {out} --dtype float32 "
    "--set holdout=4 --set device=cpu"
)
TUNE = (
    "tune {root}/target --draft {root}/draft --prompts-file {root}/prompts.txt --dtype float32 "
    "--max-tokens 3 --batches 1 --contexts 20 --repeats 1 --out {out}"
)
BENCH = (
    "bench latency {root}/target --draft {root}/draft --prompts-file {root}/prompts.txt "
    "--dtype float32 "
    "--batches 1"
)
DRAFTED = GENERATE + " -p a --draft {root}/"
# command, what the line must name
BAD = {
    "unknown model": ("generate nowhere -p a", "model 'nowhere'"),
    "truncated target": (
        "generate {root}/truncated-target -p a", "truncated-target/model.safetensors"
    ),
    "truncated draft": (DRAFTED + "truncated-draft", "truncated-draft/model.safetensors"),
    "draft of another width": (DRAFTED + "wide", "hidden_size is 48, the target's is 32"),
    "draft of another vocabulary": (DRAFTED + "other-vocabulary", "vocab_size is 272"),
    "EAGLE-3 draft": (DRAFTED + "eagle3", "belongs to an EAGLE-3 draft"),
    "EAGLE-3 key": (DRAFTED + "mixed", "'d2t' belongs to an EAGLE-3 draft"),
    "EAGLE-1 draft": (DRAFTED + "draft --method eagle3", "keys are EAGLE-1"),
    "EAGLE-3, half": (DRAFTED + "mixed --method eagle3", "'d2t' is torch.float32"),
    "method": (DRAFTED + "draft --method medusa", "method='medusa'"),
    "no draft there": (DRAFTED + "nothing", "no config.json"),
    "negative temperature": (GENERATE + " -p a --temperature -1", "temperature=-1"),
    "top-p": (GENERATE + " -p a --top-p 2", "top_p=2"),
    "max tokens": ("generate {root}/target -p a --max-tokens 0", "max_tokens=0"),
    "seed": (GENERATE + " -p a --seed -1", "seed=-1"),
    "choices": (GENERATE + " -p a --n 0", "n=0"),
    "least tokens": (GENERATE + " -p a --min-tokens 999", "min_tokens=999"),
    "penalty": (GENERATE + " -p a --presence-penalty 3", "presence_penalty=3"),
    "bias, no JSON": (GENERATE + " -p a --logit-bias 5:1", "--logit-bias 5:1"),
    "bias, a list": (GENERATE + " -p a --logit-bias [5]", "--logit-bias [5]"),
    "bias, a word": (GENERATE + ' -p a --logit-bias {{"5":"x"}}', "logit_bias={5: 'x'}"),
    "log-probabilities": (GENERATE + " -p a --logprobs 1", "--logprobs 1: "),
    "dtype": ("generate {root}/target -p a --dtype int4", "dtype='int4'"),
    "verification": (DRAFTED + "draft --verification typical", "verification='typical'"),
    "empty prompt": (GENERATE + " --no-chat --prompt=", "prompt: it is empty"),
    "no prompt": (GENERATE, "--prompt"),
    "empty file": (GENERATE + " --file {root}/empty.txt", ""),
    "empty file, no chat": (GENERATE + " --no-chat --file {root}/empty.txt", "empty.txt"),
    "no such file": (GENERATE + " --file {root}/none.txt", "none.txt"),
    "long prompt": (GENERATE + " -p " + 700 * "a", "leave no room in the context of 640"),
    "unknown task": (
        "evaluate {root}/target --tasks trivia --dtype float32 --draft {root}/draft",
        "task='trivia'",
    ),
    "limit": (
        "evaluate {root}/target --tasks trivia --dtype float32 --batch 0", "max_num_seqs=0"
    ),
    "bad tree JSON": (DRAFTED + "draft --tree [[0],", "--tree [[0],"),
    "tree without a parent": (DRAFTED + "draft --tree [[0],[1,0]]", "tree: path [1, 0]"),
    "tree of strings": (DRAFTED + 'draft --tree [["x"]]', "tree="),
    "unknown tree": (DRAFTED + "draft --tree oak", "tree='oak'"),
    "endless chain": (DRAFTED + "draft --tree chain-500", "tree="),
    "malformed line": (
        "train --target {root}/target --data {root}/bad.jsonl --out {out}", "bad.jsonl:31: "
    ),
    "no data": ("train --target {root}/target --data {root}/no.jsonl --out {out}", "no.jsonl"),
    "no target": ("train --data {root}/data.jsonl --out {out}", "--target"),
    "set, unknown field": (TRAIN + " --set depth=3", "--set depth=3"),
    "set, no value": (TRAIN + " --set layers", "--set layers"),
    "set, bad value": (TRAIN + " --set layers=0", "layers=0"),
    "set, a word": (TRAIN + " --set layers=many", "layers"),
    "set, a fraction": (TRAIN + " --set layers=1.5", "layers"),
    "set, a word late": (TRAIN + " --set warmup_tokens=many", "warmup_tokens"),
    "set, device": (TRAIN + " --set device=banana", "device"),
    "train dtype": (
        "train --target {root}/target --data {root}/data.jsonl --out {out} --dtype int4", "dtype"
    ),
    "no recipe": ("train --recipe {root}/none.py --out {out}", "none.py"),
    "not a recipe": ("train --recipe {root}/broken.py --out {out}", "broken.py"),
    "chat": ("chat nowhere", "model 'nowhere'"),
    "demo": ("demo {root}/target --draft {root}/wide", "hidden_size is 48"),
    "tune, no draft": ("tune {root}/target --prompts-file {root}/prompts.txt --out {out}", "draft"),
    "tune, batches": (TUNE + " --batches 1,0", "--batches 1,0"),
    "tune, contexts": (TUNE + " --contexts many", "--contexts many"),
    "tune, rules": (TUNE + " --rules typical", "--rules typical"),
    "tune, repeats": (TUNE + " --repeats 0", "--repeats 0"),
    "tune, no round": (TUNE + " --max-tokens 1", "--max-tokens 1"),
    "tune, long text": (TUNE + " --max-tokens 640", "--max-tokens 640"),
    "tune, nowhere to write": (TUNE + "/no/table.json", "/no/table.json"),
    "bench, batches": (BENCH + " --batches 1,0", "--batches 1,0"),
    "bench, max tokens": (BENCH + " --max-tokens 2", "max_tokens=2"),
    "bench, long text": (BENCH + " --max-tokens 640", "--max-tokens 640"),
    "bench, a table without auto": (BENCH + " --table t.json", "dispatch_table='t.json'"),
    "data": ("data --out {out}/d.jsonl --source {root}/no.jsonl", "no.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, aquiline: Command, root: Path, tmp_path: Path
) -> None:
    command, named = BAD[case]
    args = [arg.format(root=root, out=tmp_path / "out") for arg in command.split()]
    result = aquiline(*args)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    assert named in result.err


def test_process_exits_with_2_and_no_traceback(root: Path) -> None:
    script = [sys.executable, "-c", "from aquiline.cli.main import main; main()"]
    done = subprocess.run(
        [*script, "generate", str(root / "truncated-target"), "-p", "a"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


# -------------------------------------------------------------------------------------- generate


def test_generate_json_has_one_object_a_prompt(aquiline: Command, root: Path) -> None:
    base = [
        "generate", root / "target", "--file", root / "prompts.txt", "--dtype", "float32",
        "--max-tokens", 12, "--temperature", 0, "--ignore-eos", "--json",
    ]  # fmt: skip
    fast = aquiline(*base, "--draft", root / "draft")
    plain = aquiline(*base, "--no-speculate")
    assert (fast.code, plain.code) == (0, 0)
    records = [[json.loads(line) for line in r.out.splitlines()] for r in (fast, plain)]
    for with_draft, without in zip(*records, strict=True):
        assert with_draft["token_ids"] == without["token_ids"]
        assert with_draft["text"] == without["text"]
        assert len(with_draft["token_ids"]) == 12
        assert with_draft["finish_reason"] == "length"
        assert without["speculation"]["tokens_per_call"] == 1.0
    assert sum(record["speculation"]["rounds"] for record in records[0]) < 22
    assert [record["prompt"] for record in records[0]] == ["abc", "xyz"]


def test_generate_streams_what_the_batch_says(aquiline: Command, root: Path) -> None:
    args = [
        "generate", root / "target", "-p", "abc", "--dtype", "float32", "--max-tokens", 10,
        "--temperature", 1.5, "--seed", 3, "--draft", root / "draft", "--ignore-eos",
    ]  # fmt: skip
    streamed, record = aquiline(*args), aquiline(*args, "--json")
    assert streamed.out == json.loads(record.out)["text"] + "\n"
    assert aquiline(*args, "--tree", "[[0],[1],[0,0]]").out == streamed.out
    assert aquiline(*args, "--no-speculate").out == streamed.out


def test_generate_gives_every_parameter_to_the_engine(aquiline: Command, root: Path) -> None:
    args = [
        "generate", root / "target", "-p", "abc", "--no-chat", "--dtype", "float32",
        "--max-tokens", 8, "--temperature", 1.5, "--seed", 3, "--n", 2, "--min-tokens", 2,
        "--presence-penalty", 1, "--frequency-penalty", 0.5, "--repetition-penalty", 1.5,
        "--logit-bias", '{"5": -100, "70": 3}', "--draft", root / "draft",
    ]  # fmt: skip
    params = SamplingParams(
        max_tokens=8, temperature=1.5, seed=3, n=2, min_tokens=2, presence_penalty=1,
        frequency_penalty=0.5, repetition_penalty=1.5, logit_bias={5: -100, 70: 3}, logprobs=1,
    )  # fmt: skip
    (expected,) = LLM(str(root / "target"), "float32").generate("abc", params)
    assert aquiline(*args).out == "".join(f"{choice.text}\n" for choice in expected.outputs)
    records = [
        json.loads(line) for line in aquiline(*args, "--logprobs", 1, "--json").out.splitlines()
    ]
    for record, choice in zip(records, expected.outputs, strict=True):
        assert (record["index"], record["token_ids"]) == (choice.index, list(choice.token_ids))
        assert [list(map(int, shown)) for shown in record["logprobs"]] == [
            list(shown) for shown in choice.logprobs or ()
        ]
        assert record["cumulative_logprob"] == pytest.approx(choice.cumulative_logprob, abs=1e-3)


def test_generate_with_eagle3_says_the_same(aquiline: Command, root: Path) -> None:
    args = [
        "generate", root / "target", "-p", "abc", "--dtype", "float32", "--max-tokens", 10,
        "--temperature", 0, "--ignore-eos",
    ]  # fmt: skip
    fast = aquiline(*args, "--draft", root / "eagle3", "--method", "eagle3", "--json")
    assert fast.code == 0, fast.err
    record = json.loads(fast.out)
    assert record["speculation"]["drafted"] > 0
    plain = aquiline(*args, "--no-speculate", "--json")
    assert record["token_ids"] == json.loads(plain.out)["token_ids"]


def test_generate_stop_and_raw_prompt(aquiline: Command, root: Path) -> None:
    args = [
        "generate", root / "target", "-p", "abc", "--no-chat", "--dtype", "float32", "--max-tokens",
        20, "--temperature", 0, "--ignore-eos",
    ]  # fmt: skip
    whole = aquiline(*args).out.rstrip("\n")
    stop = whole[4:6]
    assert aquiline(*args, "--stop", stop).out == whole.partition(stop)[0] + "\n"


# ------------------------------------------------------------------------------------------ demo


def test_demo_says_the_same_sooner(aquiline: Command, root: Path) -> None:
    result = aquiline(
        "demo", root / "target", "--draft", root / "draft", "--max-tokens", 16, "--json",
    )  # fmt: skip
    assert result.code == 0
    summary = json.loads(result.out)
    assert summary["identical"] is True
    assert (summary["prompts"], summary["identical_texts"]) == (8, 8)
    assert 1.0 < summary["tokens_per_call"] <= 4.0
    assert summary["tokens_per_call"] == pytest.approx(
        1 + sum(summary["accepted_by_depth"]), abs=0.005
    )
    assert summary["speedup"] > 0
    assert "same text" in result.err
    assert "TEXT DIFFERS" not in result.err


# ----------------------------------------------------------------------------------------- train


def test_train_writes_a_draft_that_generate_loads(
    aquiline: Command, root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train = [
        "train", "--target", root / "target", "--data", root / "data.jsonl", "--out", out,
        "--dtype", "float32", *SMALL, "--json",
    ]  # fmt: skip
    result = aquiline(*train)
    assert result.code == 0, result.err
    summary = json.loads(result.out.splitlines()[-1])
    assert summary["draft"] == str(out / "draft")
    assert summary["config"]["layers"] == 1
    assert 1.0 <= summary["tokens_per_call"] <= 4.0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [3, 6]
    generated = aquiline(
        "generate", root / "target", "-p", "go", "--draft", out / "draft", "--dtype", "float32",
        "--max-tokens", 5, "--json",
    )  # fmt: skip
    assert generated.code == 0
    assert json.loads(generated.out)["speculation"]["drafted"] > 0

    again = aquiline(*train, "--set", "tokens=1728")  # resumes
    assert again.code == 0, again.err
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [3, 6, 9]
    other = aquiline(*train, "--set", "learning_rate=0.5")
    assert other.code == 2
    assert "learning_rate" in other.err

    nothing = aquiline(*train, "--out", tmp_path / "nothing", "--from", out / "step-6")
    assert nothing.code == 2
    assert "tokens=1152" in nothing.err
    at = train.index("tokens=1152")
    del train[at - 1 : at + 1]
    branch = aquiline(  # cools down from where the trunk stood after six steps
        *train, "--out", tmp_path / "branch", "--from", out / "step-6", "--masters",
        "--set", "decay_tokens=960",
    )  # fmt: skip
    assert branch.code == 0, branch.err
    assert json.loads(branch.out)["tokens"] == 6 * 192 + 960
    masters = tmp_path / "branch/masters.safetensors"
    more = aquiline(
        *train, "--out", tmp_path / "more", "--from", masters, "--set", "decay_tokens=192"
    )
    assert json.loads(more.out)["tokens"] == 6 * 192 + 960 + 192


def test_corpus_of_another_tokenizer_is_refused(
    aquiline: Command, root: Path, tmp_path: Path
) -> None:
    """The vocabulary is as large, so only the fingerprint tells."""
    train = ["train", "--target", root / "target", "--out", tmp_path, "--dtype", "float32", *SMALL]
    assert aquiline(*train, "--data", root / "data.jsonl").code == 0
    about = json.loads((tmp_path / "corpus/meta.json").read_text())
    (tmp_path / "corpus/meta.json").write_text(json.dumps({**about, "tokenizer": "0" * 64}))
    result = aquiline(*train, "--data", tmp_path / "corpus", "--out", tmp_path / "other")
    assert result.code == 2
    assert "another tokenizer" in result.err
    assert result.err.count("\n") == 1


def test_training_beyond_a_sliding_window_is_refused(
    aquiline: Command, root: Path, tmp_path: Path
) -> None:
    for window, code in ((103, 2), (104, 0)):  # 96 tokens of a conversation and 8 of an answer
        target = write_target(
            tmp_path / f"{window}", architecture="MistralForCausalLM", sliding_window=window
        )
        result = aquiline(
            "train", "--target", target, "--data", root / "data.jsonl", "--dtype", "float32",
            "--out", tmp_path / f"run-{window}", *SMALL, "--set", "tokens=192",
        )  # fmt: skip
        assert result.code == code
        if code:
            line = result.err.splitlines()[-1]
            assert "max_length=96" in line
            assert "sliding_window=103" in line


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", [path.name for path in RECIPES.glob("*.py")])
def test_dry_run_of_a_recipe_needs_no_weights(
    name: str, aquiline: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = aquiline("train", "--recipe", RECIPES / name, "--dry-run", "--gpus", 8, "--json")
    assert result.code == 0, result.err
    figures = json.loads(result.out)
    assert figures["fits"]
    assert figures["cost"] == pytest.approx(figures["hours"] * 8 * 2.5)
    for word in ("parameters", "tokens", "FLOPs/token", "GB per rank", "H100", "cost"):
        assert word in result.err


def test_dry_run_reads_only_the_targets_config(
    aquiline: Command, root: Path, tmp_path: Path
) -> None:
    shutil.copy(root / "target/config.json", tmp_path)
    run = ["train", "--target", tmp_path, "--data", "none.jsonl", "--dry-run", "--json"]
    assert json.loads(aquiline(*run).out)["teacher"] > 0
    wrong = aquiline(*run, "--card", "abacus")
    assert wrong.code == 2
    assert "abacus" in wrong.err


def test_tune_writes_a_table_that_a_dispatcher_is_made_of(
    aquiline: Command, root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "table.json"
    result = aquiline(
        "tune", root / "target", "--draft", root / "draft", "--prompts-file", root / "prompts.txt",
        "--dtype", "float32", "--max-tokens", 12, "--batches", "1,3", "--contexts", "20,9999",
        "--repeats", 3, "--rules", "multi-round,coupled", "--out", out, "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    table = DispatchTable.load(out)
    measured = {(one.rule, one.band) for one in table.paths.measured}
    assert measured == {(r, b) for r in ("coupled", "multi-round") for b in BANDS}
    assert all(one.rounds > 0 for one in table.paths.measured)
    loads = {(point.batch, point.kv_tokens) for point in table.costs.points}
    assert loads == {(1, 20), (1, 640), (3, 60), (3, 1920)}  # the model's context is 640
    assert len(table.costs.points) == 4 * len(table.trees)
    dispatcher = table.dispatcher()
    assert dispatcher.candidates == table.trees
    assert 0 <= dispatcher.choose(2, 500, "low") < len(table.trees)
    summary = json.loads(result.out)
    assert summary["trees"] == len(table.trees)
    assert len(summary["picks"]) == 4 * 3
    assert all(pick["gain"] >= 1 for pick in summary["picks"])


def test_bench_times_plain_and_speculative_batches(aquiline: Command, root: Path) -> None:
    base = [
        "bench", "latency", root / "target", "--prompts-file", root / "prompts.txt",
        "--dtype", "float32",
        "--batches", "1,3", "--max-tokens", 12, "--json",
    ]  # fmt: skip
    result = aquiline(*base, "--draft", root / "draft")
    assert result.code == 0, result.err
    rows = json.loads(result.out)["rows"]
    loads = [(row["tree"], row["batch"]) for row in rows]
    assert loads == [("none", 1), ("none", 3), ("chain-3", 1), ("chain-3", 3)]
    for row in rows:
        assert row["ttit_ms"] > 0
        assert row["ttft_ms"] > 0
        assert row["tokens_per_second"] > 0
    assert [row["tokens_per_call"] for row in rows[:2]] == [1.0, 1.0]
    assert all(1 < row["tokens_per_call"] <= 4 for row in rows[2:])
    assert [row["speedup"] for row in rows[:2]] == [1.0, 1.0]
    auto = aquiline(*base, "--draft", root / "draft", "--tree", "auto")
    assert json.loads(auto.out)["rows"][2]["tree"] == "auto"
    alone = json.loads(aquiline(*base).out)
    assert {row["tree"] for row in alone["rows"]} == {"none"}


def test_other_data_in_an_old_run_folder_is_refused(
    aquiline: Command, root: Path, tmp_path: Path
) -> None:
    """The corpus of a run is built once; it must not stand in for other data later."""
    out, data = tmp_path / "run", tmp_path / "other.jsonl"
    data.write_text("".join((root / "data.jsonl").read_text().splitlines(True)[:12]))
    train = ["train", "--target", root / "target", "--out", out, "--dtype", "float32", *SMALL]
    stopped = aquiline(*train, "--data", root / "data.jsonl", "--set", "holdout=1000")
    assert stopped.code == 2  # after the corpus was built, before any checkpoint
    assert "holdout=1000" in stopped.err
    result = aquiline(*train, "--data", data)
    assert result.code == 2, result.out
    assert "corpus" in result.err
    assert result.err.count("\n") == 1


def test_help_names_every_command(aquiline: Command) -> None:
    result = aquiline("--help")
    assert result.code == 0
    for command in (
        "generate",
        "chat",
        "demo",
        "data",
        "train",
        "evaluate",
        "tune",
        "bench",
        "report",
    ):
        assert command in result.out
