"""Llama (Qwen2 and Mistral by configuration): the target.

One forward over new rows at given positions; the attention object decides where keys go and what
each row sees, so the same code prefills, decodes, verifies trees and supplies training features.
``features`` are the hidden states after the final norm, which is what EAGLE-1 reads; any layer's
input can be tapped beside them (EAGLE-3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aquiline.attention.backend import Attention
from aquiline.core.errors import CheckpointError
from aquiline.distributed.ranks import SINGLE, Ranks
from aquiline.kvcache.pool import PlaneShape
from aquiline.layers.decoder import DecoderLayer, LayerShape, run_layers
from aquiline.layers.linear import ColumnParallelLinear
from aquiline.layers.norm import RMSNorm
from aquiline.layers.rotary import RotaryEmbedding
from aquiline.models.checkpoint import Checkpoint
from aquiline.models.config import LlamaConfig
from aquiline.models.names import View, fill, layer_views


@dataclass(frozen=True)
class TargetOutput:
    """features [B, T, hidden], after the final norm; taps[i] [B, T, hidden], inputs of layers."""

    features: Tensor
    taps: tuple[Tensor, ...]


def layer_shape(config: LlamaConfig) -> LayerShape:
    """The decoder layer that a configuration describes."""
    return LayerShape(
        config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads,
        config.head_dim, config.attention_bias, config.rms_norm_eps,
    )  # fmt: skip


class Llama(nn.Module):
    """The target. ``max_positions`` bounds the positions it will ever be asked for."""

    def __init__(self, config: LlamaConfig, max_positions: int, ranks: Ranks = SINGLE) -> None:
        super().__init__()
        self.config, self.ranks = config, ranks
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        shape = layer_shape(config)
        self.layers = nn.ModuleList(
            DecoderLayer(shape, ranks=ranks) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = ColumnParallelLinear(config.hidden_size, (config.vocab_size,), ranks=ranks)
        if config.tie_word_embeddings and ranks.size == 1:
            self.tie()
        self.rotary = RotaryEmbedding(inverse_frequencies(config), max_positions)

    def tie(self) -> None:
        """Make the head read the embedding's weights (one copy)."""
        weight = self.embed_tokens.weight
        assert isinstance(weight, nn.Parameter)
        self.lm_head.weight = weight

    def forward(
        self, tokens: Tensor, positions: Tensor, attention: Attention, taps: Sequence[int] = ()
    ) -> TargetOutput:
        """tokens, positions [B, T]; ``taps`` are layers whose input is wanted, ascending.

        Tap i is the input of layer i (the convention of vLLM and the EAGLE repository); the number
        of layers itself taps the last layer's output, before the final norm.
        """
        x = self.embed_tokens(tokens)
        angles = self.rotary(positions, x.dtype)
        stream = run_layers(self.layers, x, self.norm.fused, angles, attention)
        tapped = []
        for index, out in enumerate(stream):
            if index in taps:
                tapped.append(out.x)
        return TargetOutput(out.value(), tuple(tapped))

    @property
    def head_weight(self) -> Tensor:
        """The LM head's rows [vocab / ranks, hidden] on this rank."""
        return self.lm_head.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [...] -> [..., hidden]."""
        embedded: Tensor = self.embed_tokens(tokens)
        return embedded

    def logits(self, features: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab]."""
        return self.ranks.all_gather(self.lm_head(features))

    def plane_shape(self) -> PlaneShape:
        """What this model stores per token on this rank."""
        heads = self.ranks.split(self.config.num_kv_heads, "num_key_value_heads")
        return PlaneShape(self.config.num_layers, heads, self.config.head_dim)


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """[head_dim / 2] fp32, after the checkpoint's rope scaling."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    base = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return base
    if scaling.rope_type == "factors":
        return base / torch.tensor(scaling.factors)
    # Llama 3: long wavelengths are stretched by the factor, short ones kept, the band between
    # them interpolated.
    wavelengths = 2 * math.pi / base
    ratio = scaling.original_max_position_embeddings / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((ratio - low) / (high - low)).clamp(0.0, 1.0)
    return keep * base + (1.0 - keep) * base / scaling.factor


def llama_views(model: Llama) -> dict[str, View]:
    """Every Hugging Face tensor name of the target, and the parameter slice it fills."""
    views = {
        "model.embed_tokens.weight": View(model.embed_tokens.weight),
        "model.norm.weight": View(model.norm.weight),
    }
    if model.lm_head.weight is not model.embed_tokens.weight:
        views["lm_head.weight"] = View(model.lm_head.weight, 0)
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        views |= layer_views(f"model.layers.{index}.", layer)
    return views


def load_llama(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    max_positions: int,
    ranks: Ranks = SINGLE,
) -> Llama:
    """The target with its weights, frozen; every tensor and every parameter is accounted for."""
    config = checkpoint.config
    with torch.device("meta"):
        model = Llama(config, max_positions, ranks)
    model.to_empty(device=device).to(dtype)
    model.rotary = RotaryEmbedding(inverse_frequencies(config), max_positions).to(device, dtype)
    if config.tie_word_embeddings and ranks.size == 1:
        model.tie()
    views = llama_views(model)
    tied = config.tie_word_embeddings and "lm_head.weight" in views
    for name, tensor in checkpoint.tensors():
        if name.endswith("rotary_emb.inv_freq") or (
            name == "lm_head.weight" and config.tie_word_embeddings
        ):
            continue  # derived from the configuration, or a copy of the embedding
        fill(views, name, tensor, ranks, str(checkpoint.path))
        if tied and name == "model.embed_tokens.weight":
            fill(views, "lm_head.weight", tensor, ranks, str(checkpoint.path))
    if views:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {min(views)!r} is missing; download the checkpoint again"
        )
    return model.requires_grad_(False).eval()
