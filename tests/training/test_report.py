"""The report: a line of JSON always; boards where they are installed."""

from __future__ import annotations

import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aquiline.training import report
from aquiline.training.report import Report

FIGURES = {"loss": 1.5, "terms": {"top1": [0.5, 0.25]}, "tree": None}


def test_every_reading_is_a_line_at_once(tmp_path: Path) -> None:
    with Report(tmp_path, {}) as log:
        log.write(10, FIGURES)
        assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 10, **FIGURES}
    with Report(tmp_path, {}) as log:
        log.write(20, FIGURES)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]


def test_boards_get_every_number_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board: list[tuple[str, float, int]] = []
    wandb: list[tuple[dict[str, float], int]] = []

    class SummaryWriter:
        def __init__(self, folder: Path) -> None:
            assert folder == tmp_path / "tensorboard"

        def add_scalar(self, name: str, value: float, step: int) -> None:
            board.append((name, value, step))

        def close(self) -> None:
            board.append(("closed", 0, 0))

    def log(figures: dict[str, float], step: int) -> None:
        wandb.append((figures, step))

    modules: dict[str, Any] = {
        "torch.utils.tensorboard": SimpleNamespace(SummaryWriter=SummaryWriter),
        "wandb": SimpleNamespace(
            init=lambda **_: SimpleNamespace(log=log, finish=lambda: wandb.append(({}, -1)))
        ),
    }
    monkeypatch.setattr(report, "import_module", modules.__getitem__)
    monkeypatch.setattr(report, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setenv("WANDB_PROJECT", "drafts")
    with Report(tmp_path, {}) as log_:
        log_.write(3, FIGURES)
    flat = {"loss": 1.5, "terms/top1/1": 0.5, "terms/top1/2": 0.25}
    assert board == [*((name, value, 3) for name, value in flat.items()), ("closed", 0, 0)]
    assert wandb == [(flat, 3), ({}, -1)]
