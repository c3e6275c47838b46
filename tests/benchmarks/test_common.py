"""Results carry what a reader needs to compare them, and can be drawn."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from benchmarks import common, plots

CPU = torch.device("cpu")


def test_the_stamp_names_device_versions_commit_and_date():
    stamp = common.stamp(CPU)
    assert set(stamp) == {"device", "versions", "commit", "date"}
    assert stamp["versions"]["torch"] == torch.__version__
    assert {"python", "triton"} <= set(stamp["versions"])
    assert all(isinstance(stamp[key], str) and stamp[key] for key in ("device", "commit", "date"))
    assert common.fingerprint(CPU) == {"device": stamp["device"]}


def test_without_git_the_commit_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "ROOT", tmp_path)  # no checkout
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("AQUILINE_COMMIT", "abc1234")
    assert common.commit() == "abc1234"
    monkeypatch.delenv("AQUILINE_COMMIT")
    assert common.commit() == "unknown"

    def no_git(*args, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert common.commit() == "unknown"


def test_a_result_is_written_and_ends_in_one_line(tmp_path, capsys):
    payload = {"rows": [{"batch": 1}]}
    common.write_result(tmp_path / "x.json", payload)
    assert json.loads((tmp_path / "x.json").read_text()) == payload
    common.write_result(None, payload)
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [payload, payload]


@pytest.mark.gpu
def test_the_fingerprint_of_a_card():
    print_ = common.fingerprint()
    assert print_["copy_tb_s"] > 0.1
    assert print_["linear_us"] > 1


ROUNDS = [
    {"context": c, "batch": b, "draft": d, "round_ms": 6.0 + b, "limit_ms": 5.5}
    for c, b, d in [(8192, 1, "none"), (8192, 1, "chain-3"), (1024, 64, "chain-5")]
]
CURVES = [
    {
        "batch": b, "tree": tree, "temperature": t, "tokens_per_call": 2.0, "ttit_ms": 3.0,
        "speedup": 1.5,
    }
    for b in (1, 4) for tree in ("plain", "auto") for t in (0, 1)
]  # fmt: skip


QUALITY = [
    {
        "draft": f"d{number}", "layers": layers, "tokens": tokens, "objective": objective,
        "task": task, "temperature": t, "chain": 3, "tokens_per_call": 2.0 + number / 10,
    }
    for number, (layers, tokens, objective) in enumerate(
        [(3, 10**6, "eagle"), (3, 10**7, "eagle"), (1, 10**7, "eagle"), (3, 10**7, "kl"),
         (3, None, None)]
    )
    for task in ("mt-bench", "gsm8k") for t in (0.0, 1.0)
]  # fmt: skip


@pytest.mark.parametrize("rows", [ROUNDS, CURVES, QUALITY, QUALITY[-2:]])
def test_a_result_is_drawn_beside_itself(rows, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"device": "H100", "commit": "abc", "date": "d", "rows": rows}))
    out = plots.plot(file)
    assert out == tmp_path / "result.png"
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("field", "drafts"),
    [("tokens", ["d0", "d1"]), ("layers", ["d1", "d2"]), ("objective", ["d1", "d3"])],
)
def test_a_curve_compares_drafts_that_differ_in_one_thing(field, drafts):
    rows = plots._differ_in(field, QUALITY)
    assert sorted({row["draft"] for row in rows}) == drafts
