"""Draft checkpoints in the public EAGLE-1 layout: load, save, and refuse what would fail silently.

A folder holds config.json and model.safetensors. ``embed_tokens.weight`` may be there (the public
layout has it) or not (the draft shipped in this package): the target's own is used either way. A
reduced draft vocabulary lives in a side file that other engines ignore.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aquiline.core.errors import CheckpointError
from aquiline.distributed.ranks import SINGLE
from aquiline.models.config import LlamaConfig
from aquiline.models.draft import EagleDraft, draft_views
from aquiline.models.llama import Llama
from aquiline.models.names import fill

VOCABULARY_FILE = "draft_vocabulary.safetensors"
EAGLE3_KEYS = ("midlayer.", "d2t", "t2d", "hidden_norm")


@dataclass(frozen=True)
class LoadedDraft:
    """A draft and the target token ids [Vd] of its reduced vocabulary, None for the whole one."""

    draft: EagleDraft
    token_ids: Tensor | None


def load_draft(folder: Path, target: Llama, max_positions: int) -> LoadedDraft:
    """The draft in ``folder`` for ``target``, in its dtype and on its device, frozen.

    Raises CheckpointError if the folder is incomplete, holds another wiring, or does not fit.
    """
    raw = _read_config(folder)
    tensors = _read_tensors(folder / "model.safetensors")
    for name in tensors:
        if any(mark in name for mark in EAGLE3_KEYS):
            raise CheckpointError(
                f"{folder}: tensor {name!r} belongs to an EAGLE-3 draft; this loader reads "
                "EAGLE-1 drafts, give one of those"
            )
    if "layers.0.input_layernorm.weight" in tensors or "norm.weight" in tensors:
        raise CheckpointError(
            f"{folder}: an input norm on layer 0 or a final norm is not the EAGLE-1 layout; give a "
            "draft without them"
        )
    try:
        config = LlamaConfig.from_hf(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    _check_fit(folder, config, target.config, tensors.pop("embed_tokens.weight", None))
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
    return LoadedDraft(draft, None if token_ids is None else token_ids.to(weight.device))


def save_draft(
    folder: Path,
    draft: EagleDraft,
    token_ids: Tensor | None,
    embedding: Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the public layout; without ``embedding`` only this package can load it.

    The files are complete or absent: weights first, config.json last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: view.tensor for name, view in draft_views(draft).items()}
    if embedding is not None:
        tensors["embed_tokens.weight"] = embedding
    stored = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    if token_ids is not None:
        save_file({"token_ids": token_ids.cpu().contiguous()}, folder / VOCABULARY_FILE)
    config = draft.config.to_hf() | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bias": draft.fc.bias is not None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _read_config(folder: Path) -> dict[str, object]:
    try:
        raw = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no config.json there; give the folder of an EAGLE-1 draft"
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


def _check_fit(
    folder: Path, draft: LlamaConfig, target: LlamaConfig, embedding: Tensor | None
) -> None:
    for field in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(draft, field), getattr(target, field)
        if ours != theirs:
            raise CheckpointError(
                f"{folder}: {field} is {ours}, the target's is {theirs}; give a draft trained for "
                "this target"
            )
    expected = (target.vocab_size, target.hidden_size)
    if embedding is not None and tuple(embedding.shape) != expected:
        raise CheckpointError(
            f"{folder}: embed_tokens.weight has shape {tuple(embedding.shape)}, the target's is "
            f"{expected}; give a draft trained for this target"
        )
