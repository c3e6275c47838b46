"""Drafts: what decoding knows of one, and EAGLE-1 with 1..N dense layers.

A Draft turns what the target knew at position i and token i+1 into a hidden state that stands for
position i+1, again and again; a Head joins it to the vocabulary. Decoding sees no more than these
two, so it does not know which wiring it runs (eagle3.py has the other).

EagleDraft is one module for training and serving. At position i it reads [embedding of token i+1 ;
the target's feature h_i] through ``fc`` (2d to d), then its decoder layers, and predicts the
feature h_{i+1}; the target's LM head turns that into the distribution of token i+2 (PAPER: wiring).
The first layer has no input norm and nothing follows the last, as in the public checkpoints.
Embedding and head are the target's and not part of the module.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from aquiline.attention.backend import Attention
from aquiline.kernels import ops
from aquiline.kvcache.pool import PlaneShape
from aquiline.layers.decoder import DecoderLayer, run_layers
from aquiline.layers.linear import ColumnParallelLinear
from aquiline.layers.rotary import RotaryEmbedding
from aquiline.models.config import LlamaConfig
from aquiline.models.llama import inverse_frequencies, layer_shape
from aquiline.models.names import View, layer_views


class Draft(nn.Module):
    """What every wiring has: one recurrent step, called as a module.

    ``draft(embeddings, hidden, positions, attention)``: embeddings of tokens i+1 and hidden states
    of positions i, [B, T, d] -> the hidden state of position i+1. ``hidden`` is ``fuse`` of the
    target's features, or what the step before returned.

    Attributes:
        taps: layers of the target whose inputs are its features; () for the final feature.
        feature_size: width of the target's features, all taps side by side.
    """

    def __init__(self, config: LlamaConfig, taps: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config, self.taps = config, taps
        self.feature_size = max(1, len(taps)) * config.hidden_size

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features [..., feature_size] as a hidden state [..., d]."""
        raise NotImplementedError

    def plane_shape(self) -> PlaneShape:
        """What the draft stores per token."""
        config = self.config
        return PlaneShape(config.num_layers, config.num_kv_heads, config.head_dim)


class Vocabulary(Protocol):
    """What a head borrows of the target: a Llama, or what stands for one in training."""

    @property
    def head_weight(self) -> Tensor:
        """The LM head [V, d]."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [...] -> [..., d]."""
        ...

    def logits(self, features: Tensor) -> Tensor:
        """[..., d] -> [..., V]."""
        ...


class Head(nn.Module):
    """A draft's two doors to the vocabulary: ``embed`` and, called as a module, logits.

    Attributes:
        token_ids: [Vd] target ids of a reduced draft vocabulary, or None for the whole one.
    """

    token_ids: Tensor | None

    def __init__(self, target: Vocabulary, token_ids: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("token_ids", token_ids, persistent=False)
        self._target = [target]  # in a list, so that it is not a submodule

    def embed(self, tokens: Tensor) -> Tensor:
        """Target token ids [...] -> [..., d]."""
        return self._target[0].embed(tokens)

    def to_target(self, ids: Tensor) -> Tensor:
        """Draft vocabulary ids -> target token ids."""
        return ids if self.token_ids is None else self.token_ids[ids]

    def pack(self) -> None:
        """Prepare the weights for inference on this device."""
        raise NotImplementedError


class EagleDraft(Draft):
    """EAGLE-1's own weights; ``config.num_layers`` layers of ``config``'s shape."""

    def __init__(self, config: LlamaConfig, max_positions: int, fc_bias: bool = False) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.fc = ColumnParallelLinear(2 * hidden, (hidden,), bias=fc_bias)
        shape = layer_shape(config)
        self.layers = nn.ModuleList(
            DecoderLayer(shape, input_norm=index > 0) for index in range(config.num_layers)
        )
        self.rotary = RotaryEmbedding(inverse_frequencies(config), max_positions)

    def forward(
        self, embeddings: Tensor, features: Tensor, positions: Tensor, attention: Attention
    ) -> Tensor:
        """embeddings (of tokens i+1), features (h_i) [B, T, d], positions i [B, T] -> h_{i+1}."""
        x: Tensor = self.fc(torch.cat((embeddings, features.to(embeddings.dtype)), dim=-1))
        angles = self.rotary(positions, x.dtype)
        *_, last = run_layers(self.layers, x, None, angles, attention)
        return last.x

    def fuse(self, features: Tensor) -> Tensor:
        """The target's final feature is the hidden state already."""
        return features


class DraftHead(Head):
    """EAGLE-1's: the target's LM head, or its rows ``token_ids``."""

    def __init__(self, target: Vocabulary, token_ids: Tensor | None) -> None:
        super().__init__(target, token_ids)
        weight = target.head_weight
        self._rows = None if token_ids is None else weight[token_ids.to(weight.device)]
        self._packed: ops.PackedWeight | None = None

    def forward(self, features: Tensor) -> Tensor:
        """[..., d] -> [..., Vd] logits (Vd the whole vocabulary without ``token_ids``)."""
        if self._rows is None:
            return self._target[0].logits(features)
        return ops.linear(features, self._rows, None, self._packed)

    def pack(self) -> None:
        if self._rows is not None:
            self._packed = ops.pack_weight(self._rows)


def draft_config(target: LlamaConfig, layers: int, intermediate_size: int | None) -> LlamaConfig:
    """A dense draft for ``target``: its width, heads and rope, ``layers`` layers."""
    return replace(
        target,
        architecture="LlamaForCausalLM",
        num_layers=layers,
        intermediate_size=intermediate_size or target.intermediate_size,
        attention_bias=False,
        sliding_window=None,
    )


def draft_views(draft: EagleDraft) -> dict[str, View]:
    """Public EAGLE-1 tensor names (embedding aside) and the parameter slices they fill."""
    views = {"fc.weight": View(draft.fc.weight)}
    if draft.fc.bias is not None:
        views["fc.bias"] = View(draft.fc.bias)
    for index, layer in enumerate(draft.layers):
        assert isinstance(layer, DecoderLayer)
        views |= layer_views(f"layers.{index}.", layer)
    return views
