"""``aquiline serve``: what keeps it from serving is one line and exit code 2."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from aquiline.cli.main import main
from aquiline.engine.async_llm import AsyncLLM
from tests.tiny_checkpoint import write_target

MAIN = "from aquiline.cli.main import main; main()"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("serve") / "target")


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN, "serve", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-model",), "model 'no-model': not found"),
        (("TARGET", "--speculative-config", "[]"), "--speculative-config []: give a JSON object"),
        (("TARGET", "--speculative-config", "{"), "--speculative-config {: not JSON"),
        (("TARGET", "--allowed-origins", "x"), "--allowed-origins x: give a JSON list"),
        (("TARGET", "--max-num-seqs", "0"), "max_num_seqs=0"),
        (("TARGET", "--max-num-batched-tokens", "0"), "max_num_batched_tokens=0"),
        (("TARGET", "--tool-call-parser", "x"), "tool_call_parser='x': one of auto"),
    ],
)
def test_bad_flags(
    arguments: tuple[str, ...],
    message: str,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(target) if one == "TARGET" else one for one in arguments]
    monkeypatch.setattr(sys, "argv", ["aquiline", "serve", *given])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "budget", "caching"),
    [
        ((), None, True),
        (("--max-num-batched-tokens", "64", "--no-enable-prefix-caching"), 64, False),
        (("--enable-prefix-caching",), None, True),
    ],
)
def test_flags_that_reach_the_engine(
    flags: tuple[str, ...],
    budget: int | None,
    caching: bool,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: list[AsyncLLM] = []
    monkeypatch.setattr("aquiline.server.run.run", lambda llm, settings: served.append(llm))
    monkeypatch.setattr(sys, "argv", ["aquiline", "serve", str(target), *flags])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    config = served[0].config
    assert (config.max_num_batched_tokens, config.enable_prefix_caching) == (budget, caching)


def test_a_port_that_is_taken(target: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(target, "--port", port)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert f"error: port={port}: 127.0.0.1 cannot be listened on" in err.splitlines()[-1]


def test_sigterm_while_loading(target: Path) -> None:
    process = start(target, "--port", 0)
    assert process.stderr is not None
    while "Uvicorn running" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
