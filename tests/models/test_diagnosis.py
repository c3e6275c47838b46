"""Each trap of a draft folder is found, with the engines it would hurt; a sound one has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aquiline.models.diagnosis import diagnose
from aquiline.models.draft import DraftHead
from aquiline.models.draft_checkpoint import LoadedDraft
from aquiline.models.draft_export import DraftFormat, export_draft
from aquiline.models.draft_files import DraftFiles, read_draft
from aquiline.models.eagle3 import random_eagle3
from aquiline.models.finding import Finding
from aquiline.models.llama import Llama
from tests.tiny_checkpoint import VOCAB, make_draft, tiny_config

TAPS = "eagle_aux_hidden_state_layer_ids"
ROPE: dict[str, Any] = {"rope_theta": 5e5}


@pytest.fixture(scope="module")
def target() -> Llama:
    torch.manual_seed(0)
    return Llama(tiny_config(context=4096, layers=8, **ROPE), 64).requires_grad_(False)


@pytest.fixture(scope="module")
def folders(target: Llama, tmp_path_factory: pytest.TempPathFactory) -> dict[str, DraftFiles]:
    """A sound folder of each format."""
    root = tmp_path_factory.mktemp("diagnosis")
    plain = make_draft(2, copies=False, context=4096, **ROPE)
    one = LoadedDraft(plain, DraftHead(target, None))
    three = LoadedDraft(*random_eagle3(target, 40, 2))
    forms: dict[DraftFormat, LoadedDraft] = {
        "eagle": one, "sglang": one, "eagle3": three, "speculators": three
    }  # fmt: skip
    for form, loaded in forms.items():
        export_draft(loaded, target, root / form, form, torch.float32, "t")
    return {form: read_draft(root / form) for form in forms}


def check(files: DraftFiles, target: Llama, name: str) -> Finding:
    (found,) = [one for one in diagnose(files, target) if one.check == name]
    return found


SOUND = {
    "eagle": {"wiring": ("sglang",), "fc.bias": ("sglang",)},  # SGLang has a format of its own
    "sglang": {"wiring": ("vllm",), "fc.bias": ("vllm",)},
    "eagle3": {},
    "speculators": {"wiring": ("sglang",), "taps": ("sglang",)},
}


@pytest.mark.parametrize("form", SOUND)
def test_exports_hurt_only_engines_they_are_not_for(
    form: str, folders: dict[str, DraftFiles], target: Llama
) -> None:
    found = {one.check: one.engines for one in diagnose(folders[form], target) if not one.ok}
    expected = dict(SOUND[form])
    if form == "speculators":  # the usual taps: what SGLang would take anyway
        del expected["taps"]
    assert found == expected


def config(**changes: Any) -> Callable[[DraftFiles], DraftFiles]:
    def apply(files: DraftFiles) -> DraftFiles:
        merged = {**files.config, **changes}
        kept = {name: value for name, value in merged.items() if value is not ...}
        return replace(files, config=kept)

    return apply


def tensor(name: str, edit: Callable[[Tensor], Tensor] | None) -> Callable[..., DraftFiles]:
    def apply(files: DraftFiles) -> DraftFiles:
        tensors = dict(files.tensors)
        if edit is None:
            del tensors[name]
        else:
            tensors[name] = edit(tensors.get(name, torch.ones(32)).clone())
        return replace(files, tensors=tensors)

    return apply


def spoil(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_fill(0, torch.tensor([3]), value)


NORM = "layers.1.{}.weight"
ALL = ("aquiline", "vllm", "sglang")
# format, what is done to it, check, engines, what the finding says
TRAPS: dict[str, tuple[str, Callable[..., DraftFiles], str, tuple[str, ...], str]] = {
    "EAGLE-3 under Llama's name": (
        "eagle3", config(architectures=["LlamaForCausalLM"]), "wiring", ("sglang",), "TPC 1.00"
    ),
    "EAGLE-1 under EAGLE-3's name": (
        "eagle", config(architectures=["LlamaForCausalLMEagle3"]), "wiring", ("vllm", "sglang"),
        "EAGLE-1's",
    ),
    "missing": (
        "eagle", tensor("layers.1.mlp.up_proj.weight", None), "tensors", ALL, "vLLM leaves"
    ),
    "unknown": (
        "eagle", tensor("layers.7.mlp.up_proj.weight", lambda t: t), "tensors", ALL, "SGLang skips"
    ),
    "does not load": (
        "eagle", tensor("fc.weight", lambda t: t[:, :40]), "loading", ("aquiline",), "has shape"
    ),
    "Llama 4's layout": (
        "eagle", tensor("norm.weight", lambda t: t), "loading", ("aquiline",), "Llama4"
    ),
    "NaN": ("eagle", tensor("fc.weight", spoil(float("nan"))), "values", ALL, "NaN"),
    "zeros": ("eagle3", tensor("fc.weight", torch.zeros_like), "values", ALL, "half-written"),
    "another embedding": (
        "eagle", tensor("embed_tokens.weight", lambda t: t * 1.1), "embedding",
        ("aquiline", "sglang"), "264 of 264 rows",
    ),
    "another embedding, EAGLE-3": (
        "eagle3", tensor("embed_tokens.weight", spoil(1.0)), "embedding", ("sglang",),
        "1 of 264 rows",
    ),
    "rope not stated": (
        "eagle3", config(rope_theta=..., rope_scaling=...), "rope", ("vllm", "sglang"),
        "theta 10000",
    ),
    "another rope": ("eagle", config(rope_theta=1e4), "rope", ALL, "states theta 10000, the"),
    "a scaled rope": (
        "eagle", config(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope", ALL, "scaled"
    ),
    "2048 positions": (
        "eagle3", config(max_position_embeddings=2048), "context", ("sglang",), "2048"
    ),
    "a bias promised": ("eagle", config(bias=True), "fc.bias", ("sglang",), "the file has none"),
    "a bias": ("sglang", tensor("fc.bias", spoil(1.0)), "fc.bias", ("vllm",), "not zero"),
    "taps as outputs": (
        "eagle3", config(**{TAPS: [1, 3, 4], "eagle_config": None}), "taps", ("aquiline", "vllm"),
        "one too early",
    ),
    "nested taps alone": ("eagle3", config(**{TAPS: None}), "taps", ("vllm",), "one too early"),
    "unusual taps, not nested": (
        "eagle3", config(**{TAPS: [1, 3, 7], "eagle_config": None}), "taps", ("sglang",),
        "ignores it",
    ),
    "taps that disagree": ("eagle3", config(**{TAPS: [1, 3, 4]}), "taps", ALL, "disagree"),
    "residual": (
        "eagle3", config(norm_before_residual=True), "norm_before_residual", ("sglang",), "true"
    ),
    "residual not stated": (
        "speculators", config(norm_before_residual=...), "norm_before_residual", ("sglang",),
        "not stated",
    ),
    "d2t of ids": (
        "eagle3", tensor("d2t", lambda t: t + torch.arange(40)), "d2t", ALL, "holds token ids"
    ),
    "d2t of another head": (
        "eagle3", tensor("d2t", lambda t: t.index_add(0, torch.tensor([39]), torch.tensor([1]))),
        "d2t", ALL, "t2d marks other tokens",
    ),
    "d2t twice": ("eagle3", tensor("d2t", lambda t: -torch.arange(40)), "d2t", ALL, "twice"),
    "d2t out of order": (
        "eagle3", tensor("d2t", lambda t: (t + torch.arange(40)).flip(0) - torch.arange(40)),
        "d2t", ALL, "not ascending",
    ),
    "d2t of a whole vocabulary": (
        "eagle3", tensor("d2t", lambda t: torch.zeros(VOCAB, dtype=torch.int64)), "d2t", ("vllm",),
        "refuses",
    ),
    "tied head": ("eagle3", config(tie_word_embeddings=True), "tied head", ("sglang",), "lm_head"),
    "tied EAGLE-1": (
        "sglang", config(tie_word_embeddings=True), "tied head", ("sglang",), "stops at start"
    ),
    "no norm for SGLang": (
        "eagle3", tensor(NORM.format("hidden_norm"), None), "later norms", ("sglang",), "all ones"
    ),
    "no norm for vLLM": (
        "eagle3", tensor(NORM.format("input_layernorm"), None), "later norms", ("vllm",), "ones"
    ),
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_trap_is_found(trap: str, folders: dict[str, DraftFiles], target: Llama) -> None:
    form, damage, name, engines, says = TRAPS[trap]
    found = check(damage(folders[form]), target, name)
    assert found.engines == engines
    assert says in found.says
    assert found.remedy
    assert "\n" not in found.says


def test_draft_of_another_target_is_said_once(
    folders: dict[str, DraftFiles], target: Llama
) -> None:
    other = Llama(tiny_config(layers=8, hidden_size=48), 64)
    found = diagnose(folders["eagle"], other)
    assert [one.check for one in found] == ["wiring", "loading"]
    assert "hidden_size is 32, the target's is 48" in found[1].says


def test_shell_is_enough(folders: dict[str, DraftFiles], target: Llama, tmp_path: Path) -> None:
    with torch.device("meta"):
        shell = Llama(target.config, 1)
    shell.embed_tokens.weight = target.embed_tokens.weight
    for files in folders.values():
        assert diagnose(files, shell) == diagnose(files, target)
    assert json.dumps([one.says for one in diagnose(folders["eagle3"], shell)])
