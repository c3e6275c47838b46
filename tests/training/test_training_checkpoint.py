"""Checkpoints: a run cut anywhere ends as if it had not been; nothing damaged is used."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import uniform
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aquiline.core.errors import CheckpointError
from aquiline.training.checkpoint import start_from
from aquiline.training.parallel import World
from aquiline.training.progress import Progress
from aquiline.training.trainer import Trainer
from tests.training.processes import start
from tests.training.tiny_run import BATCH, Setting, assert_same, ignore, weights


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("checkpoint"))


class Stopped(Exception):
    """The power cut of these tests."""


def stop_at(step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.step == step:
            raise Stopped

    return report


def cut(run: Trainer, out: Path, step: int) -> None:
    with pytest.raises(Stopped):
        run.run(out, stop_at(step))


def drafts(*folders: Path) -> list[bytes]:
    return [(folder / "draft/model.safetensors").read_bytes() for folder in folders]


# -------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [5, 10])
def test_resumed_run_is_the_run_that_never_stopped(
    stop: int, dtype: torch.dtype, setting: Setting, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"feature_noise": 0.2, "tokens": 12 * BATCH}
    whole = setting.trainer(dtype, **changes)
    expected = whole.run(tmp_path / "whole", ignore)
    cut(setting.trainer(dtype, **changes), tmp_path / "cut", stop)
    torch.manual_seed(99)  # nothing may hang on the global state
    resumed = setting.trainer(dtype, **changes)
    steps: list[int] = []
    finished = resumed.run(tmp_path / "cut", lambda progress: steps.append(progress.step))
    assert steps[0] > stop
    assert finished == expected
    assert_same(weights(resumed), weights(whole))
    assert_same(resumed.optimizer.state(), whole.optimizer.state())
    first, second = drafts(tmp_path / "whole", tmp_path / "cut")
    assert first == second


def train_deterministically(root: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    run = Setting(root).trainer(feature_noise=0.1, eval_every=2, eval_prompts=1, tokens=30 * BATCH)
    run.run(out, ignore)
    run.save_masters(out / "masters.safetensors")


def test_killed_at_a_random_moment_it_ends_bit_for_bit_the_same(
    setting: Setting, tmp_path: Path
) -> None:
    """SIGKILL: no handler runs, a checkpoint may be half written."""
    process = start(train_deterministically, setting.root, tmp_path / "cut")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cut").glob("step-*[0-9]")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(uniform(0.0, 0.5))
    process.kill()
    process.join()
    assert process.exitcode == -9, "it had finished: kill sooner"
    for name in ("cut", "whole"):
        again = start(train_deterministically, setting.root, tmp_path / name)
        again.join(60)
        assert again.exitcode == 0
    whole, resumed = (load_file(tmp_path / n / "masters.safetensors") for n in ("whole", "cut"))
    assert_same(resumed, whole)
    assert not list((tmp_path / "cut").glob("*.partial"))


def test_finished_run_is_not_trained_further(setting: Setting, tmp_path: Path) -> None:
    first = setting.trainer(tokens=5 * BATCH)
    first.run(tmp_path, ignore)
    again = setting.trainer(tokens=5 * BATCH)
    assert again.run(tmp_path, ignore).best == first.mark.best
    assert_same(weights(again), weights(first))


# ----------------------------------------------------------------------- what must not be loaded


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-4}, {"layers": 2}, {"seed": 9}, {"feature_noise": 0.1},
        {"data": "elsewhere"}, {"intermediate_size": 16}, {"holdout": 7},
    ],
)  # fmt: skip
def test_checkpoint_of_another_configuration_is_refused(
    change: dict[str, Any], setting: Setting, tmp_path: Path
) -> None:
    cut(setting.trainer(), tmp_path, 5)
    with pytest.raises(CheckpointError, match=f"written with {next(iter(change))}="):
        setting.trainer(**change).run(tmp_path, ignore)


def truncate(folder: Path) -> None:
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-64])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated data": truncate,
    "no data": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "no index": lambda folder: (folder / ".metadata").unlink(),
    "no description": lambda folder: (folder / "run.json").unlink(),
    "half a description": lambda folder: (folder / "run.json").write_text('{"mark": {'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_with_a_warning(
    damage: str, setting: Setting, tmp_path: Path
) -> None:
    cut(setting.trainer(), tmp_path, 10)
    DAMAGES[damage](tmp_path / "step-10")
    run, steps = setting.trainer(), []
    with pytest.warns(UserWarning, match=r"step-10: damaged.*before it") as caught:
        run.run(tmp_path, lambda progress: steps.append(progress.step))
    assert steps == [10, 15, 20]
    assert "\n" not in str(caught[0].message)
    whole = setting.trainer()
    whole.run(tmp_path / "whole", ignore)
    assert_same(weights(run), weights(whole))


def test_only_damaged_checkpoints_are_an_error(setting: Setting, tmp_path: Path) -> None:
    """Beginning again from nothing must be the user's choice."""
    setting.trainer(tokens=5 * BATCH).run(tmp_path, ignore)
    truncate(tmp_path / "step-5")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match=r"step-5: damaged.*remove it"),
    ):
        setting.trainer().run(tmp_path, ignore)


def test_what_a_crash_left_half_written_is_not_looked_at(setting: Setting, tmp_path: Path) -> None:
    setting.trainer(tokens=5 * BATCH).run(tmp_path, ignore)
    shutil.copytree(tmp_path / "step-5", tmp_path / "step-9.partial")
    truncate(tmp_path / "step-9.partial")
    run = setting.trainer()
    run.run(tmp_path, ignore)
    assert run.mark.step == 20
    assert not list(tmp_path.glob("*.partial"))


# ------------------------------------------------------------------- cool-downs and extensions


def test_a_trunk_cools_down_from_any_checkpoint_and_goes_on(
    setting: Setting, tmp_path: Path
) -> None:
    trunk: dict[str, Any] = {"decay_tokens": 0, "keep": 9}
    short = setting.trainer(tokens=10 * BATCH, **trunk)
    short.run(tmp_path / "trunk", ignore)
    rates: list[float] = []
    branch = setting.trainer(tokens=11 * BATCH, decay_tokens=6 * BATCH, log_every=1)
    finished = branch.run(
        tmp_path / "branch", lambda progress: rates.append(progress.learning_rate),
        tmp_path / "trunk/step-5",
    )  # fmt: skip
    assert rates == pytest.approx([3e-3 * left / 6 for left in (6, 5, 4, 3, 2, 1)])
    assert finished.best is not None
    assert finished.best[0] > 5, "the trunk's scores are not the branch's"
    longer = setting.trainer(tokens=15 * BATCH, **trunk)
    longer.run(tmp_path / "trunk", ignore)
    straight = setting.trainer(tokens=15 * BATCH, **trunk)
    straight.run(tmp_path / "straight", ignore)
    assert_same(weights(longer), weights(straight))


def test_masters_alone_carry_a_run_on(setting: Setting, tmp_path: Path) -> None:
    """Weights exactly, data where they stood, moments anew and the rate warmed up for them."""
    first = setting.trainer(tokens=10 * BATCH, decay_tokens=0)
    first.run(tmp_path / "first", ignore)
    file = tmp_path / "masters.safetensors"
    first.save_masters(file)
    assert file.stat().st_size < sum(p.numel() for p in first.student.parameters()) * 4 + 8000
    seen: list[Progress] = []
    second = setting.trainer(tokens=13 * BATCH, decay_tokens=0, log_every=1)
    second.run(tmp_path / "second", seen.append, file)
    assert [one.step for one in seen] == [11, 12, 13]
    assert [one.learning_rate for one in seen] == pytest.approx([1.5e-3, 3e-3, 3e-3])
    assert [one.epoch for one in seen] == [second.packer.batch(n).epoch for n in (10, 11, 12)]
    assert second.optimizer.steps == 3
    # Twice as many batches a step: the position is counted in tokens.
    third = setting.trainer(tokens=12 * BATCH, accumulate=2, log_every=1)
    third.run(tmp_path / "third", seen.append, file)
    assert [one.tokens for one in seen[3:]] == [12 * BATCH]
    fresh = setting.trainer()
    start_from(file, fresh.optimizer.state(), fresh.config, 1, World())
    assert_same(fresh.optimizer.weights(), first.optimizer.weights())
    with pytest.raises(CheckpointError, match="tokens=2560 leaves nothing to train"):
        setting.trainer(tokens=10 * BATCH).run(tmp_path / "none", ignore, file)


def test_a_start_that_does_not_fit_is_refused(setting: Setting, tmp_path: Path) -> None:
    run = setting.trainer(tokens=5 * BATCH)
    run.run(tmp_path / "run", ignore)
    run.save_masters(tmp_path / "masters.safetensors")
    wide: dict[str, Any] = {"layers": 2}
    with pytest.raises(CheckpointError, match="layers"):
        setting.trainer(**wide).run(tmp_path / "a", ignore, tmp_path / "run/step-5")
    with pytest.raises(CheckpointError, match="not masters of this draft"):
        setting.trainer(**wide).run(tmp_path / "b", ignore, tmp_path / "masters.safetensors")
    with pytest.raises(CheckpointError, match="nowhere"):
        setting.trainer().run(tmp_path / "c", ignore, tmp_path / "nowhere")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not masters of this draft"):
        setting.trainer().run(tmp_path / "d", ignore, tmp_path / "x.safetensors")
    about = json.loads((tmp_path / "run/step-5/run.json").read_text())
    assert about["mark"]["step"] == 5
