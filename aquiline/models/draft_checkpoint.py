"""Draft checkpoints in the public layouts: load, save, and refuse what would fail silently.

One door for both wirings: the keys say which one a folder holds (the rest of EAGLE-3 is in
eagle3_checkpoint.py). A folder holds config.json and model.safetensors. ``embed_tokens.weight`` may
be there (the public layout has it) or not (the draft shipped in this package). EAGLE-1 uses the
target's own either way, and keeps a reduced draft vocabulary in a side file that other engines
ignore. A draft turns positions as its target does: rope block and context are the target's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aquiline.core.errors import CheckpointError
from aquiline.core.params import DraftMethod
from aquiline.distributed.ranks import SINGLE
from aquiline.models.config import LlamaConfig
from aquiline.models.draft import Draft, DraftHead, EagleDraft, Head, draft_views
from aquiline.models.eagle3_checkpoint import (
    build_eagle3,
    eagle3_config,
    eagle3_tensors,
    layer_config,
)
from aquiline.models.llama import Llama
from aquiline.models.names import fill

VOCABULARY_FILE = "draft_vocabulary.safetensors"
EAGLE3_KEYS = ("midlayer.", "d2t", "t2d", "hidden_norm")
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")


@dataclass(frozen=True)
class LoadedDraft:
    """A draft of either wiring and its head."""

    draft: Draft
    head: Head

    @property
    def token_ids(self) -> Tensor | None:
        """[Vd] target token ids of a reduced vocabulary, None for the whole one."""
        return self.head.token_ids


def load_draft(
    folder: Path, target: Llama, max_positions: int, method: DraftMethod | None = None
) -> LoadedDraft:
    """The draft in ``folder`` for ``target``, in its dtype and on its device, frozen.

    ``method`` is the wiring that the folder must hold; None takes either. Raises CheckpointError if
    the folder is incomplete, holds another wiring, or does not fit.
    """
    raw = _read_config(folder)
    tensors = _read_tensors(folder / "model.safetensors")
    _check_wiring(folder, tensors, method)
    if _eagle3_key(tensors) is not None:
        embedding = tensors.get("embed_tokens.weight")
        config = _read_shape(folder, layer_config(raw), target.config, embedding)
        return LoadedDraft(*build_eagle3(str(folder), raw, config, tensors, target, max_positions))
    return _load_eagle1(folder, raw, tensors, target, max_positions)


def _eagle3_key(tensors: Mapping[str, Tensor]) -> str | None:
    """A tensor that only EAGLE-3 has."""
    return next((name for name in tensors if any(mark in name for mark in EAGLE3_KEYS)), None)


def _check_wiring(folder: Path, tensors: Mapping[str, Tensor], method: DraftMethod | None) -> None:
    """One wiring's weights under the other's name draft nonsense, silently."""
    name = _eagle3_key(tensors)
    if method == "eagle" and name is not None:
        raise CheckpointError(
            f"{folder}: tensor {name!r} belongs to an EAGLE-3 draft, method 'eagle' is EAGLE-1; "
            "give method 'eagle3'"
        )
    if method == "eagle3" and name is None:
        raise CheckpointError(
            f"{folder}: the draft's keys are EAGLE-1 (no midlayer, hidden_norm, d2t or t2d); give "
            "method 'eagle'"
        )


def _load_eagle1(
    folder: Path,
    raw: Mapping[str, Any],
    tensors: dict[str, Tensor],
    target: Llama,
    max_positions: int,
) -> LoadedDraft:
    if "layers.0.input_layernorm.weight" in tensors or "norm.weight" in tensors:
        raise CheckpointError(
            f"{folder}: an input norm on layer 0 or a final norm is not the EAGLE-1 layout; give a "
            "draft without them"
        )
    embedding = tensors.pop("embed_tokens.weight", None)
    config = _read_shape(folder, raw, target.config, embedding)
    weight = target.embed_tokens.weight
    with torch.device(weight.device):
        draft = EagleDraft(config, max_positions, fc_bias="fc.bias" in tensors)
    views = draft_views(draft)
    for name, tensor in tensors.items():
        fill(views, name, tensor, SINGLE, str(folder))
    if views:
        raise CheckpointError(f"{folder}: tensor {min(views)!r} is missing; export the draft again")
    token_ids = _read_vocabulary(folder, config.vocab_size)
    draft = draft.to(weight.dtype).requires_grad_(False).eval()
    token_ids = None if token_ids is None else token_ids.to(weight.device)
    return LoadedDraft(draft, DraftHead(target, token_ids))


def _read_shape(
    folder: Path, raw: Mapping[str, Any], target: LlamaConfig, embedding: Tensor | None
) -> LlamaConfig:
    """The draft's shape with the target's rope: stock configs carry a wrong one, and 2048."""
    raw = {name: value for name, value in raw.items() if name not in ROPE_FIELDS}
    context = target.max_position_embeddings
    try:
        config = LlamaConfig.from_hf(raw | {"max_position_embeddings": context})
        _check_fit(config, target, embedding)
        return replace(config, rope_theta=target.rope_theta, rope_scaling=target.rope_scaling)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def save_draft(
    folder: Path,
    draft: Draft,
    head: Head | None,
    embedding: Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the public layout; without ``embedding`` only this package can load it.

    ``head`` may be None for EAGLE-1 with the whole vocabulary; an EAGLE-3 head's own embedding goes
    before ``embedding``. The files are complete or absent: weights first, config.json last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {} if embedding is None else {"embed_tokens.weight": embedding}
    if isinstance(draft, EagleDraft):
        tensors |= {name: view.tensor for name, view in draft_views(draft).items()}
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "bias": draft.fc.bias is not None,
        }
        if head is not None and head.token_ids is not None:
            ids = head.token_ids.cpu().contiguous()
            save_file({"token_ids": ids}, folder / VOCABULARY_FILE)
    else:
        tensors |= eagle3_tensors(draft, head)
        config = eagle3_config(draft, head)
    stored = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = (
        draft.config.to_hf()
        | config
        | {
            "model_type": "llama",
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no config.json there; give the folder of a draft"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{folder}/config.json: {error}; export the draft again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{folder}/config.json: not an object; export the draft again")
    return raw


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; export the draft again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: {error}; the file is damaged, copy or export it again"
        ) from None


def _read_vocabulary(folder: Path, vocab: int) -> Tensor | None:
    path = folder / VOCABULARY_FILE
    if not path.exists():
        return None
    token_ids = _read_tensors(path).get("token_ids")
    if token_ids is None or token_ids.dim() != 1 or len(token_ids) == 0:
        raise CheckpointError(f"{path}: no 'token_ids' list; export the draft again")
    if int(token_ids.min()) < 0 or int(token_ids.max()) >= vocab:
        raise CheckpointError(
            f"{path}: a token is outside the vocabulary of {vocab}; export the draft again"
        )
    if len(set(token_ids.tolist())) != len(token_ids):
        raise CheckpointError(f"{path}: a token is listed twice; export the draft again")
    return token_ids.to(torch.int64)


def _check_fit(draft: LlamaConfig, target: LlamaConfig, embedding: Tensor | None) -> None:
    for field in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(draft, field), getattr(target, field)
        if ours != theirs:
            raise CheckpointError(
                f"{field} is {ours}, the target's is {theirs}; give a draft trained for this target"
            )
    expected = (target.vocab_size, target.hidden_size)
    if embedding is not None and tuple(embedding.shape) != expected:
        raise CheckpointError(
            f"embed_tokens.weight has shape {tuple(embedding.shape)}, the target's is "
            f"{expected}; give a draft trained for this target"
        )
