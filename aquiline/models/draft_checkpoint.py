"""Draft checkpoints in the public layouts: load, save, and refuse what would fail silently.

One door for both wirings: the keys say which one a folder holds (the rest of EAGLE-3 is in
eagle3_checkpoint.py; what a folder may look like in draft_files.py). ``embed_tokens.weight`` may be
there (the public layout has it) or not (the draft shipped in this package). EAGLE-1 uses the
target's own either way. A draft turns positions as its config states, since it was trained so; one
that states nothing turns them as its target does. Its context is always the target's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from aquiline.core.errors import CheckpointError
from aquiline.core.params import DraftMethod
from aquiline.distributed.ranks import SINGLE
from aquiline.models.config import LlamaConfig
from aquiline.models.draft import Draft, DraftHead, EagleDraft, Head, draft_views
from aquiline.models.draft_files import VOCABULARY_FILE, DraftFiles, read_draft
from aquiline.models.eagle3_checkpoint import build_eagle3, eagle3_config, eagle3_tensors
from aquiline.models.llama import Llama
from aquiline.models.names import fill


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
    return build_draft(read_draft(folder), target, max_positions, method)


def build_draft(
    files: DraftFiles, target: Llama, max_positions: int, method: DraftMethod | None = None
) -> LoadedDraft:
    """As ``load_draft``, from files already read."""
    _check_wiring(files, method)
    tensors = {n: t for n, t in files.tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    config = read_shape(files, target.config)
    if files.method == "eagle3":
        source = files.source
        return LoadedDraft(
            *build_eagle3(source, files.config, config, tensors, target, max_positions)
        )
    return _build_eagle1(files, config, tensors, target, max_positions)


def _check_wiring(files: DraftFiles, method: DraftMethod | None) -> None:
    """One wiring's weights under the other's name draft nonsense, silently."""
    if method == "eagle" and files.method == "eagle3":
        raise CheckpointError(
            f"{files.source}: tensor {files.eagle3_key!r} belongs to an EAGLE-3 draft, method "
            "'eagle' is EAGLE-1; give method 'eagle3'"
        )
    if method == "eagle3" and files.method == "eagle":
        raise CheckpointError(
            f"{files.source}: the draft's keys are EAGLE-1 (no midlayer, hidden_norm, d2t or "
            "t2d); give method 'eagle'"
        )


def _build_eagle1(
    files: DraftFiles,
    config: LlamaConfig,
    tensors: dict[str, Tensor],
    target: Llama,
    max_positions: int,
) -> LoadedDraft:
    if "layers.0.input_layernorm.weight" in tensors or "norm.weight" in tensors:
        raise CheckpointError(
            f"{files.source}: an input norm on layer 0 or a final norm is not the EAGLE-1 layout "
            "but that of Meta's Llama 4 drafts, which only vLLM's EagleLlama4ForCausalLM runs; "
            "give a draft without them"
        )
    tensors.pop("embed_tokens.weight", None)
    weight = target.embed_tokens.weight
    with torch.device(weight.device):
        draft = EagleDraft(config, max_positions, fc_bias="fc.bias" in tensors)
    views = draft_views(draft)
    for name, tensor in tensors.items():
        fill(views, name, tensor, SINGLE, files.source)
    if views:
        raise CheckpointError(
            f"{files.source}: tensor {min(views)!r} is missing; export the draft again"
        )
    token_ids = _check_vocabulary(files, config.vocab_size)
    draft = draft.to(weight.dtype).requires_grad_(False).eval()
    token_ids = None if token_ids is None else token_ids.to(weight.device)
    return LoadedDraft(draft, DraftHead(target, token_ids))


def read_shape(files: DraftFiles, target: LlamaConfig) -> LlamaConfig:
    """The draft's shape with the rope it states, else the target's, and the target's context.

    Stock configs say 2048 positions, which limits nobody here.
    """
    shape = files.shape | {"max_position_embeddings": target.max_position_embeddings}
    try:
        config = LlamaConfig.from_hf(shape)
        _check_fit(config, target, files.tensors.get("embed_tokens.weight"))
    except CheckpointError as error:
        raise CheckpointError(f"{files.source}: {error}") from None
    if files.states_rope:
        return config
    return replace(config, rope_theta=target.rope_theta, rope_scaling=target.rope_scaling)


@dataclass(frozen=True)
class Layout:
    """What a draft folder will hold.

    Attributes:
        config: config.json without the dtype.
        tensors: by their public names.
        vocabulary: token ids of the side file, if there is one.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    vocabulary: Tensor | None


def public_layout(draft: Draft, head: Head | None, embedding: Tensor | None) -> Layout:
    """The layout in which a draft is published.

    ``head`` may be None for EAGLE-1 with the whole vocabulary; an EAGLE-3 head's own embedding goes
    before ``embedding``.
    """
    tensors = {} if embedding is None else {"embed_tokens.weight": embedding}
    vocabulary = None
    if isinstance(draft, EagleDraft):
        tensors |= {name: view.tensor for name, view in draft_views(draft).items()}
        own: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
        own["bias"] = draft.fc.bias is not None
        vocabulary = None if head is None else head.token_ids
    else:
        tensors |= eagle3_tensors(draft, head)
        own = eagle3_config(draft, head)
    # SGLang takes a tied draft's head for its embedding; no draft's head is.
    shape = draft.config.to_hf() | {"model_type": "llama", "tie_word_embeddings": False}
    return Layout(shape | own, tensors, vocabulary)


def write_layout(folder: Path, layout: Layout, dtype: torch.dtype) -> None:
    """Write a draft folder; its files are complete or absent: weights first, config.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout.vocabulary is not None:
        ids = layout.vocabulary.cpu().contiguous()
        save_file({"token_ids": ids}, folder / VOCABULARY_FILE)
    stored = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in layout.tensors.items()
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**layout.config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_draft(
    folder: Path,
    draft: Draft,
    head: Head | None,
    embedding: Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the public layout; without ``embedding`` only this package can load it."""
    write_layout(folder, public_layout(draft, head, embedding), dtype)


def _check_vocabulary(files: DraftFiles, vocab: int) -> Tensor | None:
    token_ids, path = files.vocabulary, Path(files.source) / VOCABULARY_FILE
    if token_ids is None:
        return None
    if token_ids.dim() != 1 or len(token_ids) == 0:
        raise CheckpointError(f"{path}: 'token_ids' is not a list; export the draft again")
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
