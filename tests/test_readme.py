"""What the README shows, works: its Python runs, its commands and options exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from aquiline.cli.main import app

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_runs_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})
    text, stats = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert len(text) > 100
    assert float(stats.split()[0]) > 1.2


def test_the_commands_exist_with_those_options() -> None:
    blocks = "".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    lines = [shlex.split(line) for line in blocks.splitlines() if line.startswith("aquiline")]
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {line[1] for line in lines} == {
        "generate", "chat", "demo", "data", "train", "evaluate", "bench", "report", "serve"
    }  # fmt: skip
    for line in lines:
        command = commands[line[1]]
        command = getattr(command, "commands", {}).get("".join(line[2:3]), command)
        known = {name for option in command.params for name in option.opts}
        assert {word for word in line[2:] if word.startswith("--")} <= known, line
