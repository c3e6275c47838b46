"""Report: where the figures of a run go.

``log.jsonl`` in the run's folder always; of what ``aquiline[boards]`` installs, TensorBoard's files
in ``out/tensorboard`` if it is there, and Weights & Biases if WANDB_PROJECT names a project too.
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class Report:
    """A context manager; ``write`` takes one line of figures of one step."""

    def __init__(self, out: Path, config: dict[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._file = (out / "log.jsonl").open("a")
        self._board = self._wandb = None
        if find_spec("tensorboard") is not None:
            board: Any = import_module("torch.utils.tensorboard")
            self._board = board.SummaryWriter(out / "tensorboard")
        if find_spec("wandb") is not None and os.environ.get("WANDB_PROJECT"):
            self._wandb = import_module("wandb").init(
                name=out.name, id=out.name, config=config, dir=out, resume="allow"
            )

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """``figures`` may nest; numbers are plotted under their path, lists by index."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        flat = _flat("", figures)
        if self._board is not None:
            for name, value in flat.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)


def _flat(prefix: str, value: Any) -> dict[str, float]:
    """Every number in ``value`` by its path, joined with "/"."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value, 1)
        return {
            name: number
            for key, inner in pairs
            for name, number in _flat(f"{prefix}/{key}" if prefix else str(key), inner).items()
        }
    return {prefix: float(value)} if isinstance(value, (int, float)) else {}
