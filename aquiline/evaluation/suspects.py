"""Suspects: what a draft would be if one thing about its folder were otherwise.

Low acceptance has few causes, and most can be undone in the files: the draft is built again with
one of them changed and measured on the same text. If that accepts clearly more, the cause is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aquiline.core.errors import CheckpointError
from aquiline.models.config import LlamaConfig
from aquiline.models.diagnosis import STATED_NOTHING
from aquiline.models.draft_checkpoint import read_shape
from aquiline.models.draft_files import SPECULATORS_SHAPE, DraftFiles
from aquiline.models.eagle3_checkpoint import TAPS, tapped_layers
from aquiline.models.eagle3_diagnosis import holds_ids


@dataclass(frozen=True)
class Suspect:
    """A cause, the remedy should it be the one, and the draft without it."""

    cause: str
    remedy: str
    files: DraftFiles


def suspects(files: DraftFiles, target: LlamaConfig) -> Iterator[Suspect]:
    """What can be tried on this draft; nothing that would change nothing."""
    yield from _ropes(files, target)
    if files.method == "eagle":
        if files.vocabulary is not None:
            yield Suspect(
                "the reduced vocabulary is too small for such text",
                "enlarge it, or choose its tokens by their counts in such text",
                replace(files, vocabulary=None),
            )
        yield Suspect(
            "the halves of fc are swapped", "store fc.weight as [embedding ; hidden]",
            _with_tensors(files, lambda name: name == "fc.weight", _swap_halves),
        )  # fmt: skip
        return
    yield Suspect(
        "the halves of the first layer's input are swapped",
        "store its q, k and v as [embedding ; hidden]",
        _with_tensors(files, _first_qkv, _swap_halves),
    )
    yield from _taps(files, target)
    yield Suspect(
        "the tapped layers are stored in descending order", "store fc.weight as [low, mid, high]",
        _with_tensors(files, lambda name: name == "fc.weight", _reverse_thirds),
    )  # fmt: skip
    yield _residual(files)
    yield from _maps(files, target.vocab_size)


def _with_config(files: DraftFiles, changes: dict[str, Any]) -> DraftFiles:
    return replace(files, config={**files.config, **changes})


def _with_tensors(
    files: DraftFiles, chosen: Callable[[str], bool], change: Callable[[Tensor], Tensor]
) -> DraftFiles:
    tensors = {n: change(t) if chosen(n) else t for n, t in files.tensors.items()}
    return replace(files, tensors=tensors)


def _swap_halves(weight: Tensor) -> Tensor:
    return torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)


def _reverse_thirds(weight: Tensor) -> Tensor:
    return torch.cat(weight.chunk(3, dim=1)[::-1], dim=1)


def _first_qkv(name: str) -> bool:
    first = name.startswith(("midlayer.", "layers.0."))
    return first and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))


def _ropes(files: DraftFiles, target: LlamaConfig) -> Iterator[Suspect]:
    """The target's rope, and the one of a config that states none."""
    try:
        own = read_shape(files, target)
    except CheckpointError:
        return
    plain: dict[str, Any] = {"rope_theta": STATED_NOTHING, "rope_scaling": None}
    stated = target.to_hf()
    ropes = {
        "the target's": {name: stated[name] for name in plain},
        f"theta {STATED_NOTHING:g}, unscaled": plain,
    }
    for name, rope in ropes.items():
        changed = {**files.shape, "rope_parameters": None, **rope}
        nested = SPECULATORS_SHAPE in files.config
        config = {SPECULATORS_SHAPE: changed} if nested else changed
        other = _with_config(files, config)
        shape = read_shape(other, target)
        if (shape.rope_theta, shape.rope_scaling) != (own.rope_theta, own.rope_scaling):
            yield Suspect(
                f"the draft was trained with another rope: {name}",
                "write rope_theta and rope_scaling as in training into the config", other,
            )  # fmt: skip


def _taps(files: DraftFiles, target: LlamaConfig) -> Iterator[Suspect]:
    """One layer up and down, and what is tapped by default."""
    try:
        taps = list(tapped_layers(files.source, files.config, target))
    except CheckpointError:
        taps = []
    count = target.num_layers
    default = [2, count // 2, count - 3]
    others = {"one too low": [t + 1 for t in taps], "one too high": [t - 1 for t in taps]}
    if default != taps:
        others["not the usual ones"] = default
    for what, layers in others.items():
        if layers and layers == sorted(set(layers)) and 0 <= layers[0] <= layers[-1] <= count:
            other = {TAPS: layers, "eagle_config": None}
            yield Suspect(
                f"the tapped layers are {what}",
                f"write {TAPS} {layers} (inputs of layers) and eagle_config.{TAPS} "
                f"{[layer - 1 for layer in layers]} (outputs)",
                _with_config(files, other),
            )


def _residual(files: DraftFiles) -> Suspect:
    stated = files.config.get("norm_before_residual", SPECULATORS_SHAPE in files.config)
    return Suspect(
        f"norm_before_residual is {not stated}", f"write norm_before_residual {not stated}",
        _with_config(files, {"norm_before_residual": not stated}),
    )  # fmt: skip


def _maps(files: DraftFiles, vocab: int) -> Iterator[Suspect]:
    """Ids for offsets; rows pinned to ascending tokens."""
    offsets = files.tensors.get("d2t")
    if offsets is None or offsets.is_floating_point():
        return
    rows = torch.arange(len(offsets))
    if int(offsets.min()) >= 0 and int(offsets.max()) < vocab and offsets.any():
        marks = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, offsets.long(), True)
        if int(marks.sum()) == len(offsets):
            maps = {"d2t": offsets - rows, "t2d": marks}
            yield Suspect(
                "d2t holds token ids, not offsets", "store d2t[i] = id - i",
                replace(files, tensors={**files.tensors, **maps}),
            )  # fmt: skip
    ids = offsets + rows
    ascending = ids.sort().values
    if not torch.equal(ids, ascending) and not holds_ids(offsets, files.tensors.get("t2d"), vocab):
        maps = {"d2t": ascending - rows}
        yield Suspect(
            "rows of lm_head are in the order of ascending tokens, d2t is not",
            "sort d2t's tokens", replace(files, tensors={**files.tensors, **maps}),
        )  # fmt: skip
