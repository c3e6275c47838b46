"""Weights and config from a GGUF file, as Hugging Face would have named and laid them out.

A GGUF file is a header (metadata, then name, shape, type and offset of every tensor) and one block
of data. The header is read here, in a tenth of a second and with every length checked against the
file; the ``gguf`` package's own reader needs seconds for a vocabulary and may loop on a bad length.
Dequantisation is the package's. Llama rotates pairs (2i, 2i + 1) in GGUF but (i, i + head_dim / 2)
in HF checkpoints, so the rows of its q and k projections are put back; Qwen2's never moved.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from aquiline.core.errors import CheckpointError
from aquiline.core.gguf_cursor import GgufCursor
from aquiline.models.config import LlamaConfig

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class _Stored:
    """Where one tensor lies: ``shape`` in torch's order, ``bytes`` still quantised."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    bytes: npt.NDArray[np.uint8] = field(repr=False)

    def dequantised(self) -> torch.Tensor:
        rows = self.bytes.reshape(*self.shape[:-1], -1)
        values = np.require(dequantize(rows, self.kind), np.float32, ["C", "W"])
        return torch.from_numpy(values)


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file. Its data stay on disk (memory-mapped) until a tensor is asked for."""

    path: Path
    config: LlamaConfig
    stored: dict[str, _Stored] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read the header.

        Raises:
            CheckpointError: not a GGUF file, cut short, or a model that is not implemented.
        """
        try:
            fields, stored = _read_header(np.memmap(path, np.uint8, mode="r"))
        except (OSError, ValueError, LookupError, struct.error) as error:
            raise CheckpointError(
                f"{path}: not a complete GGUF file ({error}); download it again"
            ) from None
        try:
            config = _config(fields, stored)
            names = {name: _hf_name(name) for name in stored if name != _ROPE_FACTORS}
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return cls(path, config, {hf: stored[name] for name, hf in names.items()})

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """HF name and float32 values of every tensor, dequantised one at a time."""
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
        for name, stored in self.stored.items():
            projection = name.split(".")[-2]
            try:
                tensor = stored.dequantised()
                if self.config.architecture == "LlamaForCausalLM" and projection in heads:
                    tensor = _halves_from_pairs(tensor, heads[projection])
            except NotImplementedError:
                raise CheckpointError(
                    f"{self.path}: tensor {name} is stored as {stored.kind.name}, which the gguf "
                    "package cannot dequantise; use a Q4_0 to Q8_0, F16 or BF16 file"
                ) from None
            except RuntimeError:
                raise CheckpointError(
                    f"{self.path}: tensor {name} has shape {stored.shape}, which does not fit "
                    f"{heads[projection]} heads; download the file again"
                ) from None
            yield name, tensor


def _read_header(data: npt.NDArray[np.uint8]) -> tuple[dict[str, Any], dict[str, _Stored]]:
    cursor = GgufCursor(data.data)
    num_tensors, fields = cursor.metadata()
    infos = [
        (
            cursor.string(),
            tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1],
            GGMLQuantizationType(cursor.number("I")),
            cursor.number("Q"),
        )
        for _ in range(num_tensors)
    ]
    alignment = fields.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    stored = {}
    for name, shape, kind, offset in infos:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not all(shape) or shape[-1] % block:
            raise ValueError(f"tensor {name} has shape {shape}")
        begin = start + offset
        end = begin + int(np.prod(shape, dtype=object)) // block * block_bytes
        if end > len(data):
            raise ValueError(f"tensor {name} reaches past the end of the file")
        stored[name] = _Stored(shape, kind, data[begin:end])
    return fields, stored


def _config(fields: dict[str, Any], stored: dict[str, _Stored]) -> LlamaConfig:
    if fields.get("split.count", 1) > 1:
        raise CheckpointError("split.count: a split GGUF; merge its parts with llama-gguf-split")
    if "token_embd.weight" not in stored:
        raise CheckpointError("token_embd.weight: the tensor is missing; give a whole model")
    factors = stored.get(_ROPE_FACTORS)
    return LlamaConfig.from_gguf(
        fields,
        vocab_size=stored["token_embd.weight"].shape[0],
        tie_word_embeddings="output.weight" not in stored,
        rope_factors=tuple(factors.dequantised().tolist()) if factors else (),
    )


def _hf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer is None or layer[2] not in _LAYER_NAMES:
        raise CheckpointError(f"tensor {name}: not part of a Llama or Qwen2 model; convert it anew")
    return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"


def _halves_from_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Per head, rows (0, h, 1, h + 1, ...) as GGUF orders them to (0, 1, ..., h, h + 1, ...)."""
    pairs = rows.view(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
