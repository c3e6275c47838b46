"""EAGLE-3 checkpoints: the public layout and speculators', to modules and back.

Both hold the same tensors; speculators calls the first layer ``layers.0`` instead of ``midlayer``
and nests the layer's shape. What is not a parameter is checked here: which layers are tapped, the
two maps between vocabularies (``d2t`` holds offsets: target id = i + d2t[i]; ``t2d`` marks the
target's tokens that have a row), and an embedding that may or may not be the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aquiline.core.errors import CheckpointError
from aquiline.distributed.ranks import SINGLE
from aquiline.models.config import LlamaConfig
from aquiline.models.draft import Draft, Head
from aquiline.models.draft_files import SPECULATORS_SHAPE
from aquiline.models.eagle3 import Eagle3Draft, Eagle3Head, default_taps, eagle3_views
from aquiline.models.llama import Llama
from aquiline.models.names import fill

TAPS = "eagle_aux_hidden_state_layer_ids"
# Variants of the wiring that the module does not compute.
UNIMPLEMENTED = ("norm_before_fc", "fc_norm", "norm_output")
EMBEDDING_TOLERANCE = 1e-2  # relative, row by row: a rounding to bf16 is not a difference
CHUNK = 8192  # embedding rows compared at once


def build_eagle3(
    source: str,
    raw: Mapping[str, Any],
    config: LlamaConfig,
    tensors: Mapping[str, Tensor],
    target: Llama,
    max_positions: int,
) -> tuple[Eagle3Draft, Eagle3Head]:
    """Draft and head in the target's dtype and on its device, every tensor accounted for.

    Args:
        source: the folder, for messages; ``raw`` its config.json, ``config`` the shape within.
        tensors: the checkpoint.
    """
    for field in UNIMPLEMENTED:
        if raw.get(field):
            raise CheckpointError(f"{source}: {field}={raw[field]!r}: not implemented")
    tensors = dict(tensors)
    weight, vocab = target.embed_tokens.weight, target.config.vocab_size
    draft_vocab = _draft_vocab_size(source, raw, vocab)
    offsets, marks = tensors.pop("d2t", None), tensors.pop("t2d", None)
    token_ids = _token_ids(source, offsets, marks, draft_vocab, vocab)
    embedding = _own_embedding(tensors.pop("embed_tokens.weight", None), weight)
    with torch.device(weight.device):
        taps, normed = tapped_layers(source, raw, target.config), _norm_before_residual(source, raw)
        draft = Eagle3Draft(config, taps, max_positions, normed)
        head = Eagle3Head(target, config, draft_vocab, token_ids, embedding)
    first = "layers.0." if any(name.startswith("layers.0.") for name in tensors) else "midlayer."
    views = eagle3_views(draft, head, first)
    for name, tensor in _one_norm_a_layer(source, tensors, config.num_layers).items():
        fill(views, name, tensor, SINGLE, source)
    if views:
        raise CheckpointError(f"{source}: tensor {min(views)!r} is missing; export the draft again")
    for module in (draft, head):
        module.to(weight.device, weight.dtype).requires_grad_(False).eval()
    return draft, head


def eagle3_tensors(draft: Draft, head: Head | None) -> dict[str, Tensor]:
    """Every tensor of the public layout, the draft's own embedding included if it has one.

    Later layers' norm goes under both of its names: engines differ in which one they read.
    """
    assert isinstance(draft, Eagle3Draft)
    assert isinstance(head, Eagle3Head), "an EAGLE-3 draft is saved with its head"
    tensors: dict[str, Tensor] = {n: view.tensor for n, view in eagle3_views(draft, head).items()}
    for index in range(1, draft.config.num_layers):
        norm = tensors[f"layers.{index}.input_layernorm.weight"]
        tensors[f"layers.{index}.hidden_norm.weight"] = norm.clone()
    if head.embed_tokens is not None:
        tensors["embed_tokens.weight"] = head.embed_tokens.weight
    ids = None if head.token_ids is None else head.token_ids.cpu()
    if ids is not None:  # vLLM has no place for the maps of a whole vocabulary
        vocab = draft.config.vocab_size
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True)
    return tensors


def eagle3_config(draft: Draft, head: Head | None) -> dict[str, Any]:
    """What config.json says beside the shape; the taps in both of their meanings."""
    assert isinstance(draft, Eagle3Draft)
    assert isinstance(head, Eagle3Head)
    fields: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": head.lm_head.weight.shape[0],
        "norm_before_residual": draft.norm_before_residual,
        TAPS: list(draft.taps),
    }
    if min(draft.taps) > 0:  # the embedding is no layer's output
        outputs = [tap - 1 for tap in draft.taps]
        fields["eagle_config"] = {TAPS: outputs, "use_aux_hidden_state": True}
    return fields


def tapped_layers(source: str, raw: Mapping[str, Any], target: LlamaConfig) -> tuple[int, ...]:
    """Layers whose inputs are tapped: as listed (twice, one apart, by some), or the default."""
    nested = raw.get("eagle_config") or {}
    if nested.get("use_aux_hidden_state") is False:
        raise CheckpointError(
            f"{source}: eagle_config.use_aux_hidden_state=False: not implemented; give a draft "
            "that reads tapped layers"
        )
    inputs = _layer_list(source, TAPS, raw.get(TAPS))
    outputs = _layer_list(source, f"eagle_config.{TAPS}", nested.get(TAPS))
    after = None if outputs is None else tuple(layer + 1 for layer in outputs)
    if inputs is not None and after is not None and inputs != after:
        raise CheckpointError(
            f"{source}: {TAPS}={list(inputs)} (inputs of layers) and eagle_config.{TAPS}="
            f"{list(outputs or ())} (outputs of layers) disagree; the second must be one less"
        )
    try:
        taps = inputs or after or default_taps(target)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    if list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] <= target.num_layers:
        raise CheckpointError(
            f"{source}: {TAPS}={list(taps)}: give ascending layers of the target's "
            f"{target.num_layers}"
        )
    return taps


def _layer_list(source: str, field: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(type(layer) is int for layer in value):
        raise CheckpointError(f"{source}: {field}={value!r}: give a list of layers")
    return tuple(value)


def _norm_before_residual(source: str, raw: Mapping[str, Any]) -> bool:
    """Absent is False in the public layout and True in speculators', as their readers have it."""
    value = raw.get("norm_before_residual", SPECULATORS_SHAPE in raw)
    if not isinstance(value, bool):
        raise CheckpointError(f"{source}: norm_before_residual={value!r}: give true or false")
    return value


def _draft_vocab_size(source: str, raw: Mapping[str, Any], vocab: int) -> int:
    value = raw.get("draft_vocab_size")
    value = vocab if value is None else value
    if type(value) is not int or not 1 <= value <= vocab:
        raise CheckpointError(
            f"{source}: draft_vocab_size={value!r}: give a number from 1 to the target's {vocab}"
        )
    return value


def _token_ids(
    source: str, offsets: Tensor | None, marks: Tensor | None, draft_vocab: int, vocab: int
) -> Tensor | None:
    """Target id of every draft token; None if they are the same."""
    rows = torch.arange(draft_vocab)
    if offsets is None and draft_vocab < vocab:
        raise CheckpointError(f"{source}: tensor 'd2t' is missing; export the draft again")
    if offsets is not None and (offsets.is_floating_point() or offsets.shape != rows.shape):
        raise CheckpointError(
            f"{source}: tensor 'd2t' is {offsets.dtype} {tuple(offsets.shape)}, the config says "
            f"{draft_vocab} integers; check that config.json belongs to these weights"
        )
    ids = rows if offsets is None else rows + offsets.cpu().to(torch.int64)
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise CheckpointError(
            f"{source}: 'd2t' leads outside the vocabulary of {vocab}; export the draft again"
        )
    if len(set(ids.tolist())) != draft_vocab:
        raise CheckpointError(
            f"{source}: 'd2t' leads to one token twice (it holds offsets: target id = i + d2t[i]); "
            "export the draft again"
        )
    if marks is not None:
        expected = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True)
        if marks.shape != expected.shape or not torch.equal(marks.cpu() != 0, expected):
            raise CheckpointError(
                f"{source}: 't2d' does not mark the tokens that 'd2t' leads to; export the draft "
                "again"
            )
    return None if torch.equal(ids, torch.arange(vocab)) else ids


def _own_embedding(own: Tensor | None, target: Tensor) -> Tensor | None:
    """``own``, of the target's shape, unless it is the target's within rounding."""
    if own is None or not rows_differ(own, target):
        return None
    return own.to(target.device, target.dtype)


def rows_differ(own: Tensor, target: Tensor) -> int:
    """How many rows of an embedding are not the target's, roundings to bf16 aside."""
    count = 0
    for mine, theirs in zip(torch.split(own, CHUNK), torch.split(target, CHUNK), strict=True):
        theirs = theirs.float()
        gap = (mine.to(theirs.device).float() - theirs).norm(dim=-1)
        count += int((gap > EMBEDDING_TOLERANCE * theirs.norm(dim=-1)).sum())
    return count


def _one_norm_a_layer(source: str, tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Later layers have one input norm: stored as input_layernorm, as hidden_norm, or as both."""
    tensors = dict(tensors)
    for index in range(1, layers):
        name, other = (f"layers.{index}.{n}.weight" for n in ("input_layernorm", "hidden_norm"))
        second = tensors.pop(other, None)
        if second is None:
            continue
        if name in tensors and not torch.equal(tensors[name], second):
            raise CheckpointError(
                f"{source}: tensors {name!r} and {other!r} differ; they are one norm, export the "
                "draft again"
            )
        tensors[name] = second
    return tensors
