"""``bench serve`` against a server of known pace, and ``report`` of what it stored."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from aquiline.cli.main import main
from tests.evaluation.fake_openai import Fake, serving


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(5)))
    return file


def aquiline(monkeypatch: pytest.MonkeyPatch, *args: object) -> object:
    """The exit code of a command run in this process."""
    monkeypatch.setattr(sys, "argv", ["aquiline", *map(str, args)])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.mark.usefixtures("capsys")
def test_a_load_is_measured_stored_and_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompts: Path
) -> None:
    out, html = tmp_path / "serving.json", tmp_path / "report.html"
    with serving(Fake(first=0.02, gap=0.01)) as fake:
        base = ("bench", "serve", "--base-url", fake.url, "--out", out)
        code = aquiline(
            monkeypatch, *base, "--prompts", prompts, "--requests", 5, "--concurrency", "1,4",
            "--goodput", "ttft:5000,ttit:500", "--warm-up", 2, "--api-key", "secret-1", "--seeded",
        )  # fmt: skip
        assert code == 0
        assert len(fake.bodies) == 2 + 2 * 5
        assert all("ignore_eos" not in body for body in fake.bodies)
        assert sorted(body["seed"] for body in fake.bodies[-5:]) == [0, 1, 2, 3, 4]
        result = json.loads(out.read_text())
        assert result["model"] == "fake-1"
        assert "bench serve --base-url" in result["command"]
        assert fake.headers[-1]["Authorization"] == "Bearer secret-1"
        assert "secret-1" not in out.read_text()
        assert "9.9" in result["server"]
        assert result["versions"].keys() == {"aquiline", "httpx", "python"}
        for row, size in zip(result["rows"], (1, 4), strict=True):
            assert row["concurrency"] == size
            assert (row["requests"], row["failed"], row["tokens"]) == (5, 0, 60)
            assert row["ttft_ms"]["p50"] >= 20
            assert row["goodput"]["share"] == 1.0
            assert row["acceptance"]["tokens_per_call"] == 3.0
            assert len(row["each"]) == 5
        one, four = result["rows"]
        assert four["tokens_per_second"] > 1.5 * one["tokens_per_second"]

        trace = tmp_path / "trace.jsonl"
        trace.write_text(
            "".join(
                json.dumps({"at": 7 + at, "prompt_tokens": 3, "output_tokens": 4}) + "\n"
                for at in (0, 0.1, 0.2)
            )
        )
        fake.bodies.clear()
        code = aquiline(
            monkeypatch, *base, "--trace", trace, "--concurrency", 8, "--warm-up", 0
        )  # fmt: skip
        assert code == 0
        assert [len(body["prompt"]) for body in fake.bodies] == [3] * 3
        assert not any("seed" in body for body in fake.bodies)
        assert all(body["ignore_eos"] and body["max_tokens"] == 4 for body in fake.bodies)
        starts = [one["start"] for one in json.loads(out.read_text())["rows"][0]["each"]]
        assert starts == pytest.approx([0, 0.1, 0.2])
    assert aquiline(monkeypatch, "report", out, "-o", html) == 0
    assert html.read_text().count("<svg") == 3


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--concurrency", "0"), "--concurrency 0"),
        (("--rate", "-1"), "rate=-1"),
        (("--rate", "1", "--arrivals", "bursts"), "arrivals='bursts'"),
        (("--goodput", "tpot:5"), "--goodput tpot:5"),
        (("--prompts", "absent.jsonl"), "absent.jsonl"),
        (("--requests", "0"), "--requests"),
        ((), "--base-url http://127.0.0.1:9"),
        (("--model", "x", "--warm-up", "0"), "no request was answered"),
    ],
)
def test_bad_loads_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prompts: Path,
    args: tuple[str, ...],
    named: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    base = ("bench", "serve", "--base-url", "http://127.0.0.1:9", "--prompts", prompts)
    code = aquiline(monkeypatch, *base, *args)
    error = capsys.readouterr().err
    assert code == 2, error
    assert named in error
    assert error.count("\n") == 1
