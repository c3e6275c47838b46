"""Training checkpoints: complete or absent, and only for the run that wrote them."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aquiline.core.errors import CheckpointError
from aquiline.training.config import TrainConfig

FILE = "training.safetensors"
# What may differ between a run and its continuation: how long it goes and how it is watched.
FREE_FIELDS = {"tokens", "decay_fraction", "eval_every", "eval_prompts", "eval_tokens", "device"}


@dataclass(frozen=True)
class TrainingState:
    """Steps done and the optimiser's tensors; data and noise are functions of the step."""

    step: int
    tensors: dict[str, Tensor]


def save_state(folder: Path, config: TrainConfig, state: TrainingState) -> None:
    """Write to a temporary file, then rename: a crash leaves the last checkpoint whole."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (FILE + ".partial")
    metadata = {"step": str(state.step), "config": json.dumps(dataclasses.asdict(config))}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.tensors.items()}
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, folder / FILE)


def load_state(folder: Path, config: TrainConfig) -> TrainingState | None:
    """The state in ``folder``, or None if there is none yet.

    Raises CheckpointError if it is damaged or belongs to another configuration.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step, written = int(metadata["step"]), json.loads(metadata["config"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: {error}; the checkpoint is damaged, remove it or choose another --out"
        ) from None
    for name, value in dataclasses.asdict(config).items():
        if name not in FREE_FIELDS and written.get(name) != value:
            raise CheckpointError(
                f"{path}: written with {name}={written.get(name)!r}, this run has {value!r}; "
                "resume with the same settings or choose another --out"
            )
    return TrainingState(step, tensors)
