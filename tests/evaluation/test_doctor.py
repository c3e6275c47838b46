"""The doctor finds what was done to a good draft, and leaves a good one alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aquiline.evaluation.doctor import Acceptance, Examination, Measurement, examine
from aquiline.evaluation.suspects import suspects
from aquiline.models.checkpoint import open_checkpoint
from aquiline.models.draft_checkpoint import read_shape
from aquiline.models.draft_files import DraftFiles, read_draft
from aquiline.models.eagle3_checkpoint import TAPS
from aquiline.models.llama import Llama, load_llama
from tests.tiny_checkpoint import CYCLE, IM_END, VOCAB, write_draft, write_eagle3, write_target

LAYERS, D = 5, 32
LOUD = 1e4
EXAMINATION = Examination([CYCLE[3:9], CYCLE[10:20]], 20, 3, frozenset({IM_END + 1}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that recites the alphabet whatever its layers 3 and 4 whisper; drafts for it."""
    root = tmp_path_factory.mktemp("doctor")
    torch.set_num_threads(1)
    folder = write_target(root / "target", mix=1e-4, layers=LAYERS)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        whispers = ".3." in name or ".4." in name
        if name.endswith(("o_proj.weight", "down_proj.weight")) and not whispers:
            tensors[name].zero_()
    save_file(tensors, folder / "model.safetensors")
    write_draft(root / "eagle", layers=1)
    write_eagle3(root / "eagle3", foresees=folder, layers=1)
    return root


@pytest.fixture(scope="module")
def target(root: Path) -> Llama:
    checkpoint = open_checkpoint(root / "target")
    return load_llama(checkpoint, torch.float32, torch.device("cpu"), 128)


def with_tensors(files: DraftFiles, **changes: Tensor) -> DraftFiles:
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return replace(files, tensors={**files.tensors, **named})


def with_config(files: DraftFiles, **changes: Any) -> DraftFiles:
    return replace(files, config={**files.config, **changes})


@pytest.fixture(scope="module")
def eagle(root: Path) -> DraftFiles:
    return read_draft(root / "eagle")


@pytest.fixture(scope="module")
def eagle3(root: Path) -> DraftFiles:
    """It reads its first tap; the other two must be equal, or it hears nothing else."""
    one = torch.eye(D)
    fc = torch.cat((one, -LOUD * one, LOUD * one), dim=1)
    files = with_tensors(read_draft(root / "eagle3"), fc__weight=fc)
    return with_config(files, **{TAPS: [1, 2, 3], "eagle_config": None})


def seen(files: DraftFiles, target: Llama) -> Acceptance:
    return examine(files, target, EXAMINATION)


def test_good_draft_is_healthy(eagle: DraftFiles, target: Llama) -> None:
    found = seen(eagle, target)
    assert found.greedy is not None
    assert found.greedy.tokens_per_call == 4.0
    assert found.greedy.by_depth == (1.0, 1.0, 1.0)
    assert found.greedy.covered == 1.0
    assert found.sampled is not None
    assert 1.0 < found.sampled.tokens_per_call < 4.0
    assert (found.complaints, found.causes) == ((), [])
    assert found.healthy


def test_swapped_halves_of_fc(eagle: DraftFiles, target: Llama) -> None:
    halves = eagle.tensors["fc.weight"].chunk(2, dim=1)
    found = seen(with_tensors(eagle, fc__weight=torch.cat(halves[::-1], dim=1)), target)
    assert found.greedy is not None
    assert found.greedy.tokens_per_call < 1.5
    assert [one.cause for one in found.causes] == ["the halves of fc are swapped"]
    assert found.causes[0].tokens_per_call == 4.0
    assert "low" in found.complaints[0]
    assert not found.healthy


def test_vocabulary_that_misses_half_the_text(eagle: DraftFiles, target: Llama) -> None:
    found = seen(replace(eagle, vocabulary=torch.tensor(sorted(CYCLE[::2]))), target)
    assert found.greedy is not None
    assert 0.4 < found.greedy.covered < 0.6
    assert found.causes[0].cause == "the reduced vocabulary is too small for such text"


def test_taps_off_by_one(eagle3: DraftFiles, target: Llama) -> None:
    good = seen(eagle3, target)
    assert good.greedy is not None
    assert good.greedy.by_depth[0] == 1.0
    assert good.causes == []
    found = seen(with_config(eagle3, **{TAPS: [2, 3, 4]}), target)
    assert found.greedy is not None
    assert found.greedy.by_depth[0] < 0.5
    assert found.causes[0].cause == "the tapped layers are one too high"
    assert f"{TAPS} [1, 2, 3]" in found.causes[0].remedy


def test_step_that_does_not_carry_on(eagle3: DraftFiles, target: Llama) -> None:
    """This draft's second level is always wrong."""
    found = seen(eagle3, target)
    assert found.greedy is not None
    assert found.greedy.by_depth[1] == 0.0
    assert ["rarely goes on" in text for text in found.complaints] == [True]


def test_ids_for_offsets(eagle3: DraftFiles, target: Llama) -> None:
    """It does not even load; the doctor still finds the reason."""
    ids = torch.tensor(sorted(CYCLE))
    reduced = with_config(
        with_tensors(eagle3, lm_head__weight=eagle3.tensors["lm_head.weight"][ids]),
        draft_vocab_size=len(ids),
    )
    marks = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, ids, True)
    good = with_tensors(reduced, d2t=ids - torch.arange(len(ids)), t2d=marks)
    base = seen(good, target)
    assert base.greedy is not None
    assert base.greedy.by_depth[0] == 1.0
    found = seen(with_tensors(good, d2t=ids), target)
    assert (found.greedy, found.sampled, found.complaints) == (None, None, ())
    assert [one.cause for one in found.causes] == ["d2t holds token ids, not offsets"]
    assert not found.healthy


def causes(files: DraftFiles, target: Llama) -> dict[str, DraftFiles]:
    return {one.cause: one.files for one in suspects(files, target.config)}


def test_rope_is_tried_where_it_would_differ(eagle3: DraftFiles, target: Llama) -> None:
    assert not any("rope" in cause for cause in causes(eagle3, target))  # it is 10000 everywhere
    other = with_config(eagle3, rope_theta=77.0)
    tried = [files for cause, files in causes(other, target).items() if "rope" in cause]
    assert [read_shape(files, target.config).rope_theta for files in tried] == [1e4, 1e4]


def test_nested_rope_is_tried(eagle3: DraftFiles, target: Llama) -> None:
    """Of a speculators folder."""
    shape = {**eagle3.config, "rope_theta": 77.0, "architectures": ["LlamaForCausalLM"]}
    files = with_config(eagle3, transformer_layer_config=shape)
    tried = [other for cause, other in causes(files, target).items() if "rope" in cause]
    assert {read_shape(other, target.config).rope_theta for other in tried} == {1e4}


def test_eagle3_suspects_change_what_they_name(eagle3: DraftFiles, target: Llama) -> None:
    tried = causes(eagle3, target)
    query = eagle3.tensors["midlayer.self_attn.q_proj.weight"]
    swapped = tried["the halves of the first layer's input are swapped"].tensors
    assert torch.equal(swapped["midlayer.self_attn.q_proj.weight"][:, :D], query[:, D:])
    assert (
        swapped["midlayer.self_attn.o_proj.weight"]
        is eagle3.tensors["midlayer.self_attn.o_proj.weight"]
    )
    reversed_ = tried["the tapped layers are stored in descending order"].tensors["fc.weight"]
    assert torch.equal(reversed_[:, :D], eagle3.tensors["fc.weight"][:, 2 * D :])
    assert tried["norm_before_residual is True"].config["norm_before_residual"] is True
    shifted = tried["the tapped layers are one too low"]
    assert shifted.config[TAPS] == [2, 3, 4]
    unordered = torch.zeros(VOCAB, dtype=torch.int64)
    unordered[0], unordered[1] = 1, -1  # rows 0 and 1 say tokens 1 and 0
    cause = "rows of lm_head are in the order of ascending tokens, d2t is not"
    sorted_ = causes(with_tensors(eagle3, d2t=unordered), target)[cause]
    assert not sorted_.tensors["d2t"].any()


def test_tokens_per_call_counts_the_bonus_token() -> None:
    assert Measurement(0.0, 10, (0.5, 0.25), 1.0).tokens_per_call == 1.75
