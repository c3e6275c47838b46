"""A draft folder as it lies on disk: its config, its tensors, nothing interpreted but the wiring.

Loading, diagnosis and the doctor's what-ifs all start from this value. A folder holds config.json
and model.safetensors (whole or sharded), or the pytorch_model.bin of older public drafts. A reduced
vocabulary of an EAGLE-1 draft is a side file of ours that other engines ignore.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aquiline.core.errors import CheckpointError
from aquiline.core.params import DraftMethod
from aquiline.models.checkpoint import SafetensorsFolder, read_json

VOCABULARY_FILE = "draft_vocabulary.safetensors"
SPECULATORS_SHAPE = "transformer_layer_config"
EAGLE3_KEYS = ("midlayer.", "d2t", "t2d", "hidden_norm")
_PICKLE = "pytorch_model.bin"
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
# What engines and trainers call a Llama with a draft's wiring.
_ARCHITECTURES = (
    "LlamaForCausalLMEagle", "EagleLlamaForCausalLM", "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM", "Eagle3Speculator",
)  # fmt: skip


@dataclass(frozen=True)
class DraftFiles:
    """The content of a draft folder.

    Attributes:
        source: the folder, for messages.
        config: config.json.
        tensors: as stored, by their stored names, on the CPU.
        vocabulary: ``token_ids`` of the side file, unchecked; None without one.
    """

    source: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    vocabulary: Tensor | None = None

    @property
    def eagle3_key(self) -> str | None:
        """A tensor that only EAGLE-3 has."""
        marked = (name for name in self.tensors if any(mark in name for mark in EAGLE3_KEYS))
        return next(marked, None)

    @property
    def method(self) -> DraftMethod:
        """The wiring, by the keys: a config's architecture may say anything."""
        return "eagle" if self.eagle3_key is None else "eagle3"

    @property
    def architecture(self) -> str | None:
        names = self.config.get("architectures") or [None]
        return names[0] if isinstance(names, list) else str(names)

    @property
    def shape(self) -> dict[str, Any]:
        """The part of the config that describes a Llama, under Llama's own name.

        A rope field that is null states nothing and is left out.
        """
        nested = self.config.get(SPECULATORS_SHAPE)
        shape = dict(nested if isinstance(nested, dict) else self.config)
        if not isinstance(nested, dict) and self.architecture in _ARCHITECTURES:
            shape["architectures"] = ["LlamaForCausalLM"]
        unstated = [name for name in _ROPE_FIELDS if shape.get(name) is None]
        return {name: value for name, value in shape.items() if name not in unstated}

    @property
    def states_rope(self) -> bool:
        """Whether the config says how positions turn; without it engines differ."""
        return not self.shape.keys().isdisjoint(_ROPE_FIELDS)


def read_draft(folder: Path) -> DraftFiles:
    """Read a draft folder.

    Raises CheckpointError if a file is missing or damaged.
    """
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: no config.json there; give the folder of a draft")
    config = read_json(folder / "config.json")
    return DraftFiles(str(folder), config, _read_tensors(folder), _read_vocabulary(folder))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / _PICKLE
    if not file.exists() or any(folder.glob("model*.safetensors*")):
        return dict(SafetensorsFolder.open(folder).tensors())
    try:
        tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{file}: {reason}; the file is damaged, copy or export it again"
        ) from None
    return tensors


def _read_vocabulary(folder: Path) -> Tensor | None:
    file = folder / VOCABULARY_FILE
    if not file.exists():
        return None
    try:
        token_ids = load_file(file).get("token_ids")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: {error}; the file is damaged, copy or export it again"
        ) from None
    if token_ids is None:
        raise CheckpointError(f"{file}: no 'token_ids' list; export the draft again")
    return token_ids
