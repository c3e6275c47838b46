"""Schemathesis over the server's own OpenAPI document: no 5xx, whatever fits or breaks it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.http_server import Running

OPERATIONS = 4  # that take a body; the others have few cases to try


def run(server: Running, folder: Path, cases: int) -> str:
    """Its report on ``cases`` generated requests, texts held to a few tokens."""
    hooks = folder / "hooks.py"
    hooks.write_text(
        "import schemathesis\n"
        "@schemathesis.hook\n"
        "def before_call(context, case, kwargs):\n"
        "    if isinstance(case.body, dict):\n"
        "        if isinstance(case.body.get('model'), str):\n"
        "            case.body['model'] = 'tiny'\n"
        "        for name in ('max_tokens', 'max_completion_tokens'):\n"
        "            if type(case.body.get(name, 8)) is int and case.body.get(name, 8) > 8:\n"
        "                case.body[name] = 8\n"
        "        if case.path.startswith('/v1/') and 'max_completion_tokens' not in case.body:\n"
        "            case.body.setdefault('max_tokens', 8)\n"
        "        if type(case.body.get('n')) is int and case.body['n'] > 4:\n"
        "            case.body['n'] = 4\n"
    )
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
        "--checks", "not_a_server_error", "--mode", "all", "--phases", "fuzzing",
        "--max-examples", str(cases // OPERATIONS), "--seed", "1", "--no-color",
        "--suppress-health-check", "all",
    ]  # fmt: skip
    environment = {"SCHEMATHESIS_HOOKS": str(hooks), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def check(server: Running, folder: Path, cases: int) -> None:
    report = run(server, folder, cases)
    print(server.metric("request_success_total"))
    (generated,) = re.findall(r"(\d+) generated", report)
    assert int(generated) >= cases * 0.8, report
    assert server.metric("engine_restarts") == 0
    assert server.get("/health").status_code == 200


def test_some_cases(server: Running, tmp_path: Path) -> None:
    check(server, tmp_path, 90)


@pytest.mark.slow
def test_two_thousand_cases(server: Running, tmp_path: Path) -> None:
    check(server, tmp_path, 2500)
