"""Checkpoints of a run: complete or absent, written beside the training, only for their own run.

    out/step-500/           torch distributed checkpoint: masters, moments (resharded when loaded)
        run.json            where the run stands, its settings, the size of every file
    out/step-1000.partial/  being written; renamed when complete, or the rest of a crash

What is random in a run (order of data, noise) is a function of the seed and the batch's number, so
the step is all the random state there is. ``masters.safetensors`` is the small form: fp32 weights
without moments, from which another run can start.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from aquiline.core.errors import CheckpointError
from aquiline.training.config import TrainConfig
from aquiline.training.optimizer import HostCopies
from aquiline.training.parallel import World

# Said by every single-process save and load, which is what they are meant to be.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

RUN = "run.json"
# What may differ between a run and its continuation: how long it goes, how it is watched, and how
# it is laid out over devices as long as a step reads the same batches.
FREE_FIELDS = {
    "tokens", "decay_tokens", "final_rate", "rewarm_tokens", "log_every", "eval_every",
    "eval_prompts", "eval_tokens", "eval_tree", "patience", "keep", "device", "shard", "recompute",
    "accumulate",
}  # fmt: skip
# What must be equal to start another run from a checkpoint: what its tensors mean. (Where only
# serving reads draft_vocab_size it is free; an EAGLE-3 head of another size does not fit anyway.)
SHAPE_FIELDS = {"method", "layers", "intermediate_size"}


@dataclass(frozen=True)
class Mark:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        batches: packed batches of one step, all ranks together.
        restarted: the step at which it started from masters without moments; None if it never did.
        best: step and tokens per call of the best check.
        checks: tokens per call and mean loss of the last checks, oldest first.
    """

    step: int = 0
    batches: int = 1
    restarted: int | None = None
    best: tuple[int, float] | None = None
    checks: tuple[tuple[float, float], ...] = ()


class Checkpoints:
    """The checkpoints in the folder of one run; a context manager."""

    def __init__(self, folder: Path, config: TrainConfig, world: World) -> None:
        self.folder, self.config, self.world = folder, config, world
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Completes the checkpoint in the making, whatever ended the run."""
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def save(self, copies: HostCopies, mark: Mark) -> None:
        """Write in a thread; waits for the checkpoint before, if that is not complete yet."""
        self.wait()
        partial = self.folder / f"step-{mark.step}.partial"
        if self.world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.world.agree(None)  # the folder is there
        self._writing = self._thread.submit(self._write, copies, partial, mark)

    def _write(self, copies: HostCopies, partial: Path, mark: Mark) -> None:
        """Together with the other ranks; rank 0 then describes and renames, and drops old ones."""
        copies.wait()
        single = self.world.mesh is None
        save(copies.tensors, checkpoint_id=partial, process_group=self.world.saving, no_dist=single)
        if self.world.rank != 0:
            return
        files = {file.name: file.stat().st_size for file in partial.iterdir()}
        about = {"mark": asdict(mark), "config": asdict(self.config), "files": files}
        (partial / RUN).write_text(json.dumps(about, indent=2) + "\n")
        whole = partial.with_suffix("")
        shutil.rmtree(whole, ignore_errors=True)
        partial.rename(whole)
        for folder in self._folders()[self.config.keep :]:
            if mark.best is None or _step(folder) != mark.best[0]:
                shutil.rmtree(folder)

    def wait(self) -> None:
        """Until the checkpoint in the making is complete; raises what went wrong with it."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def resume(self, state: dict[str, Tensor], batches: int) -> Mark | None:
        """Overwrite ``state`` with the newest whole checkpoint's; None if there is none yet.

        Raises CheckpointError if all are damaged, or belong to another configuration.
        """
        found, damaged = None, None
        if self.world.rank == 0:
            for rest in self.folder.glob("*.partial"):  # of a crash
                shutil.rmtree(rest, ignore_errors=True)
        for folder in self._folders() if self.world.rank == 0 else []:
            damaged = _damage(folder)
            if damaged is None:
                found = folder
                break
            warnings.warn(f"{damaged}; trying the checkpoint before it", stacklevel=2)
        found, damaged = self.world.agree((found, damaged))
        if found is None:
            if damaged is not None:
                raise CheckpointError(f"{damaged}; remove it or choose another --out")
            return None
        mark, config = read_mark(found)
        refuse_other(found, config, self.config, set(asdict(self.config)) - FREE_FIELDS)
        if mark.batches != batches:
            raise CheckpointError(
                f"{found}: a step was {mark.batches} batches, here it is accumulate="
                f"{self.config.accumulate} x {self.world.size} ranks; choose accumulate so that "
                "the product is the same"
            )
        load(found, state, self.world)
        return mark

    def _folders(self) -> list[Path]:
        """The complete checkpoints, newest first."""
        return sorted(filter(_is_step, self.folder.glob("step-*")), key=_step, reverse=True)


def load(folder: Path, state: dict[str, Tensor], world: World) -> None:
    """Overwrite ``state`` with the tensors of a step folder; CheckpointError if they do not fit."""
    try:
        load_distributed(state, checkpoint_id=folder, no_dist=world.mesh is None)
    except (CheckpointException, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(
            f"{folder}: {reason}; remove the checkpoint or choose another --out"
        ) from None


def read_mark(folder: Path) -> tuple[Mark, dict[str, Any]]:
    """Where the run of a step folder stood, and its settings."""
    try:
        about = json.loads((folder / RUN).read_text())
        mark = Mark(**about["mark"])
        best = (int(mark.best[0]), float(mark.best[1])) if mark.best else None
        checks = tuple((float(a), float(b)) for a, b in mark.checks)
        return replace(mark, best=best, checks=checks), dict(about["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: not a whole checkpoint ({error}); give a step-N folder of a run"
        ) from None


def refuse_other(
    path: Path, written: dict[str, Any], config: TrainConfig, names: Iterable[str]
) -> None:
    """CheckpointError naming the first of ``names`` in which the settings differ."""
    ours = json.loads(json.dumps(asdict(config)))
    for name in (name for name in ours if name in set(names)):
        if written.get(name) != ours[name]:
            raise CheckpointError(
                f"{path}: written with {name}={written.get(name)!r}, this run has {ours[name]!r}; "
                "use the same settings or another --out"
            )


def start_from(
    origin: Path, state: dict[str, Tensor], config: TrainConfig, batches: int, world: World
) -> Mark:
    """Overwrite ``state`` from a step folder or masters of another run; where ours begins.

    The data go on where the other run stood, counted in tokens.
    """
    if origin.is_dir():
        mark, written = read_mark(origin)
        if damaged := _damage(origin):
            raise CheckpointError(f"{damaged}; give another checkpoint")
        refuse_other(origin, written, config, SHAPE_FIELDS)
        load(origin, state, world)
    else:
        weights = {k: v for k, v in state.items() if k.startswith("master.") or k == "token_ids"}
        mark, written = load_masters(origin, weights)
        mark = replace(mark, restarted=mark.step)
    theirs, ours = mark.batches * written["tokens_per_batch"], batches * config.tokens_per_batch
    if mark.step * theirs >= config.tokens:
        raise CheckpointError(
            f"{origin}: {mark.step * theirs} tokens are behind it, so tokens={config.tokens} "
            "leaves nothing to train; raise it"
        )
    restarted = None if mark.restarted is None else mark.restarted * theirs // ours
    return Mark(mark.step * theirs // ours, batches, restarted)


def tokens_done(origin: Path) -> int:
    """Tokens behind a step folder or masters."""
    mark, written = read_mark(origin) if origin.is_dir() else load_masters(origin, {})
    return mark.step * mark.batches * int(written["tokens_per_batch"])


def save_masters(
    path: Path, weights: dict[str, Tensor], config: TrainConfig, mark: Mark, world: World
) -> None:
    """Write fp32 weights alone, whole or not at all; every rank calls, rank 0 writes."""
    whole = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()
        for name, tensor in weights.items()
    }
    about = {"mark": json.dumps(asdict(mark)), "config": json.dumps(asdict(config))}
    if world.rank == 0:
        partial = path.with_suffix(".partial")
        save_file(whole, partial, metadata=about)
        partial.rename(path)


def load_masters(path: Path, weights: dict[str, Tensor]) -> tuple[Mark, dict[str, Any]]:
    """Overwrite ``weights``; where the run stood and its settings. CheckpointError if unfit."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            mark, config = Mark(**json.loads(about["mark"])), json.loads(about["config"])
            for name, ours in weights.items():
                theirs = file.get_tensor(name)
                if theirs.shape != ours.shape:
                    raise ValueError(f"{name} is {tuple(theirs.shape)}, here {tuple(ours.shape)}")
                if isinstance(ours, DTensor):
                    theirs = distribute_tensor(theirs, ours.device_mesh, ours.placements)
                ours.copy_(theirs)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not masters of this draft ({error}); give a file written with --masters"
        ) from None
    return mark, config


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint by its list of files; None if it is whole."""
    try:
        read_mark(folder)
        files = json.loads((folder / RUN).read_text())["files"]
    except (CheckpointError, KeyError) as error:
        return f"{folder}: damaged ({error})"
    for name, size in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{folder}: damaged, {name} is missing or not of {size} bytes"
    return None


def _is_step(folder: Path) -> bool:
    return folder.name.removeprefix("step-").isdigit()


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
