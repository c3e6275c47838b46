"""``aquiline export`` and ``aquiline doctor``, from their options to their exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from aquiline.cli.main import app
from aquiline.core.errors import AquilineError
from tests.tiny_checkpoint import write_draft, write_eagle3, write_target


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doctor")
    torch.set_num_threads(1)
    write_target(root / "target", context=640)
    write_draft(root / "draft", context=640)
    file = root / "draft/model.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():  # a matrix of zeros is what a half-written file holds
        tensor += 1e-7 * (tensor == 0)
    save_file(tensors, file)
    write_eagle3(root / "eagle3", context=640)
    shutil.copytree(root / "draft", root / "swapped")
    tensors["fc.weight"] = torch.cat(tensors["fc.weight"].chunk(2, dim=1)[::-1], dim=1)
    save_file(tensors, root / "swapped/model.safetensors")
    return root


def test_help_names_both() -> None:
    done = run("--help")
    assert all(command in done.output for command in ("export", "doctor"))


def test_export_then_doctor(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("export", root / "draft", "--target", root / "target", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"out": str(out), "format": "eagle", "dtype": "float32"}
    assert "loaded back and equal" in done.stderr
    tensors = load_file(out / "model.safetensors")
    assert tensors["embed_tokens.weight"].dtype == torch.float32
    examined = run(
        "doctor", out, "--target", root / "target", "--dtype", "float32", "--prompts", 2,
        "--max-tokens", 12, "--json",
    )  # fmt: skip
    assert examined.exit_code == 0, examined.output
    report = json.loads(examined.stdout)
    assert (report["method"], report["healthy"]) == ("eagle", True)
    greedy, sampled = report["acceptance"]["runs"]
    assert (greedy["tokens_per_call"], greedy["temperature"]) == (4.0, 0.0)
    assert sampled["temperature"] == 1.0
    checks = {one["check"]: one for one in report["checks"]}
    assert checks["wiring"]["engines"] == ["sglang"]
    assert "healthy for aquiline" in examined.stderr


def test_doctor_names_the_cause(root: Path) -> None:
    done = run(
        "doctor", root / "swapped", "--target", root / "target", "--dtype", "float32", "--prompts",
        2, "--max-tokens", 12,
    )  # fmt: skip
    assert done.exit_code == 1
    assert "it seems that the halves of fc are swapped" in done.output
    assert "[embedding ; hidden]" in done.output  # not taken for markup
    assert "not healthy for aquiline" in done.output


def test_engines_asked_for_decide(root: Path, tmp_path: Path) -> None:
    for form, healthy in (("eagle", "vllm"), ("sglang", "sglang")):
        out = tmp_path / form
        args = ("--target", root / "target", "--out", out, "--format", form)
        assert run("export", root / "draft", *args).exit_code == 0
        for engine in ("vllm", "sglang"):
            done = run(
                "doctor", out, "--target", root / "target", "--prompts", 0, "--engine",
                f"aquiline,{engine}", "--json",
            )  # fmt: skip
            assert done.exit_code == (engine != healthy), (form, engine)
            assert json.loads(done.stdout)["acceptance"] is None


def test_dtype_of_an_export(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ("--target", root / "target", "--out", out, "--dtype", "float16", "--format", "sglang")
    assert run("export", root / "draft", *args).exit_code == 0
    dtypes = {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}
    assert dtypes == {torch.float16}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"


BAD = {
    "format": ("export {root}/draft --out {out} --format gguf", "--format gguf"),
    "format of the other wiring": (
        "export {root}/draft --out {out} --format eagle3", "format='eagle3': the draft is EAGLE-1"
    ),
    "dtype": ("export {root}/draft --out {out} --dtype int4", "--dtype int4"),
    "folder in use": ("export {root}/draft --out {root}/draft", "not an empty folder"),
    "tap of the embedding": ("export {root}/eagle3 --out {out}", "0, the embedding"),
    "no draft": ("export {root}/nowhere --out {out}", "no config.json"),
    "doctor, no draft": ("doctor {root}/nowhere", "no config.json"),
    "doctor, engine": ("doctor {root}/draft --engine exllama", "--engine exllama"),
    "doctor, prompts": ("doctor {root}/draft --prompts 99", "--prompts 99"),
    "doctor, chain": ("doctor {root}/draft --chain 0", "--chain 0"),
    "doctor, max tokens": ("doctor {root}/draft --max-tokens 1", "--max-tokens 1"),
    "doctor, long text": ("doctor {root}/draft --max-tokens 640", "context of 640"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str, root: Path, tmp_path: Path) -> None:
    command, named = BAD[case]
    words = command.format(root=root, out=tmp_path / "out").split()
    done = run(*words, "--target", root / "target")
    assert isinstance(done.exception, AquilineError)
    assert named in str(done.exception)
    assert "\n" not in str(done.exception)
