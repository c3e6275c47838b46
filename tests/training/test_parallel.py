"""Several processes: they are one run, however the weights are laid over them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from aquiline.cli.main import main
from aquiline.core.errors import CheckpointError
from aquiline.training.parallel import World, join
from tests.training.processes import start_ranks
from tests.training.tiny_run import BATCH, CPU, Setting

STEPS = 20
EAGLE3: dict[str, Any] = {
    "method": "eagle3", "objective": "lk", "unroll": 2, "draft_vocab_size": 30,
}  # fmt: skip
# How two ranks lie, and the run of one process that they are compared with.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("alone", {"shard": "none"}),
    "student": ("alone", {"shard": "student", "recompute": True}),
    "full": ("alone", {"shard": "full"}),
    "eagle3": ("eagle3 alone", {"shard": "full", "recompute": True, **EAGLE3}),
}


def curve(setting: Setting, out: Path, world: World, **changes: Any) -> None:
    """Train as this rank; rank 0 writes the losses."""
    losses = []
    run = setting.trainer(
        world=world, layers=2, tokens=STEPS * 2 * BATCH, accumulate=2 // world.size,
        log_every=1, eval_every=STEPS, feature_noise=0.1, warmup_tokens=0, **changes,
    )  # fmt: skip
    sharded = [
        any(isinstance(parameter, DTensor) for parameter in module.parameters())
        for module in (run.student, run.teacher.model)
    ]
    parts = run.config.shard if world.size > 1 else "none"
    assert sharded == [parts != "none", parts == "full"]
    finished = run.run(out, lambda progress: losses.append(progress.loss))
    run.save_masters(out / "masters.safetensors")
    if world.rank == 0:
        assert finished.best is not None
        (out / "curve.json").write_text(json.dumps([losses, finished.best[1]]))


def all_layouts(root: Path) -> None:
    torch.set_num_threads(1)
    setting, world = Setting(root), join(CPU)
    for name, (_, changes) in LAYOUTS.items():
        curve(setting, root / name, world, **changes)
    dist.destroy_process_group()


def command(*args: str) -> None:
    torch.set_num_threads(1)
    sys.argv = ["aquiline", "train", *args]
    main()


def test_the_command_runs_as_the_ranks_of_torchrun(tmp_path: Path) -> None:
    """From conversations, which one rank tokenises; one log, one draft."""
    setting = Setting(tmp_path)
    lines = [
        {"messages": [{"role": "user", "content": f"go {i}"},
                      {"role": "assistant", "content": "abcdefghijklmnop"[i % 5 :]}]}
        for i in range(40)
    ]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sets = (
        "layers=1", "max_length=96", "tokens_per_batch=192", "tokens=1536", "holdout=4",
        "eval_every=2", "eval_prompts=2", "eval_tokens=8", "device=cpu", "shard=full",
    )  # fmt: skip
    start_ranks(
        2, command, "--target", str(setting.folder), "--data", str(tmp_path / "data.jsonl"),
        "--out", str(tmp_path / "run"), "--dtype", "float32",
        *(word for one in sets for word in ("--set", one)),
    )  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 4]
    assert (tmp_path / "run/draft/config.json").exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    setting = Setting(root, num_layers=7, mix=0.03)
    curve(setting, root / "alone", World())
    curve(setting, root / "eagle3 alone", World(), **EAGLE3)
    start_ranks(2, all_layouts, root)
    return root


def losses(folder: Path) -> list[float]:
    found: list[float] = json.loads((folder / "curve.json").read_text())[0]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_give_the_loss_curve_of_one(layout: str, runs: Path) -> None:
    alone, together = losses(runs / LAYOUTS[layout][0]), losses(runs / layout)
    assert len(alone) == STEPS
    assert alone[-1] < 0.9 * alone[0]
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_end_with_the_same_weights_and_acceptance(layout: str, runs: Path) -> None:
    folders = [runs / LAYOUTS[layout][0], runs / layout]
    alone, together = (load_file(folder / "masters.safetensors") for folder in folders)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-5)
    first, second = (load_file(folder / "draft/model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    scores = [json.loads((folder / "curve.json").read_text())[1] for folder in folders]
    assert scores[0] == pytest.approx(scores[1], abs=0.1)


def test_a_sharded_checkpoint_goes_on_in_one_process(runs: Path) -> None:
    """Resharded when loaded; the step reads the same batches, two in turn instead of at once."""
    setting = Setting(runs)
    changes: dict[str, Any] = {
        "layers": 2, "feature_noise": 0.1, "warmup_tokens": 0, "log_every": 1, "eval_every": STEPS,
    }  # fmt: skip
    more = (STEPS + 2) * 2 * BATCH
    found = []
    for folder in ("alone", "student"):
        run = setting.trainer(accumulate=2, tokens=more, **changes)
        run.run(runs / folder, lambda progress: found.append(progress.loss))
    assert len(found) == 4
    assert found[2:] == pytest.approx(found[:2], rel=1e-5)
    with pytest.raises(CheckpointError, match="a step was 2 batches"):
        setting.trainer(accumulate=1, tokens=more, **changes).run(runs / "none", found.append)
