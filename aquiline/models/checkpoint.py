"""A target checkpoint on disk: its config, its generation defaults and its tensors, one at a time.

A Hugging Face folder (safetensors, whole or sharded) and a GGUF file look the same from here on:
HF names, one tensor in memory at a time. Opening reads every header, so that a missing or truncated
file is reported before any weight is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from aquiline.core.errors import CheckpointError
from aquiline.models.config import LlamaConfig
from aquiline.models.gguf import GgufFile

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorSource(Protocol):
    """Anything that yields named tensors lazily, as often as it is asked."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]: ...


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: the folder or the GGUF file.
        config: the shape of the model.
        generation_config: ``generation_config.json``; empty if there is none.
        source: where the tensors come from.
    """

    path: Path
    config: LlamaConfig
    generation_config: dict[str, Any]
    source: TensorSource = field(repr=False)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """HF name and values of every stored tensor; float32 from GGUF, else as stored.

        A checkpoint with tied embeddings may or may not also store ``lm_head.weight``.
        """
        return self.source.tensors()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face folder or a ``.gguf`` file.

    Raises:
        CheckpointError: a file is missing, truncated or malformed, or the model is not implemented.
    """
    if path.suffix == ".gguf":
        gguf = GgufFile.open(path)
        return Checkpoint(path, gguf.config, {}, gguf)
    config_file = path / "config.json"
    try:
        config = LlamaConfig.from_hf(read_json(config_file))
    except CheckpointError as error:
        named = str(error).startswith(str(config_file))
        raise CheckpointError(str(error) if named else f"{config_file}: {error}") from None
    generation_file = path / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    return Checkpoint(path, config, generation, SafetensorsFolder.open(path))


@dataclass(frozen=True)
class SafetensorsFolder:
    """The tensors of a folder: file to the names it holds."""

    shards: dict[Path, tuple[str, ...]]

    @classmethod
    def open(cls, folder: Path) -> SafetensorsFolder:
        """Find the safetensors files of ``folder`` and check that they hold what they should.

        Raises:
            CheckpointError: no weights, a missing or truncated shard, an index that does not fit.
        """
        if not (folder / _INDEX).exists():
            return cls({folder / _SINGLE: _stored_names(folder / _SINGLE)})
        index = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{folder / _INDEX}: weight_map is missing; download it again")
        shards: dict[Path, tuple[str, ...]] = {}
        for name, file in index.items():
            shard = folder / str(file)
            shards[shard] = (*shards.get(shard, ()), name)
        for shard, names in shards.items():
            absent = sorted(set(names) - set(_stored_names(shard)))
            if absent:
                raise CheckpointError(
                    f"{shard}: tensor {absent[0]} is missing although {_INDEX} lists it; "
                    "download both again"
                )
        return cls(shards)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and values of every tensor, in the order of the files."""
        for shard, names in self.shards.items():
            with safe_open(shard, framework="pt") as file:
                for name in names:
                    yield name, file.get_tensor(name)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``.

    Raises:
        CheckpointError: the file is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; give a whole checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object; download it again")
    return value


def _stored_names(file: Path) -> tuple[str, ...]:
    try:
        with safe_open(file, framework="pt") as shard:
            return tuple(shard.keys())
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: the file is missing; aquiline reads safetensors, whole or sharded"
        ) from None
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{file}: not a complete safetensors file ({reason}); download it again"
        ) from None
