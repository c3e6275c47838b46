"""Names: which slice of which parameter each checkpoint tensor is.

One table serves reading and writing: a View is the parameter slice that a public tensor name stands
for. Reading takes entries out of the table, so what is left at the end was missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.core.errors import CheckpointError
from aquiline.distributed.ranks import Ranks
from aquiline.layers.decoder import DecoderLayer
from aquiline.layers.eagle3 import Eagle3Layer


@dataclass(frozen=True)
class View:
    """A slice of a parameter; ``shard_dim`` is the axis split over ranks, None if replicated."""

    tensor: Tensor
    shard_dim: int | None = None


def layer_views(prefix: str, layer: DecoderLayer | Eagle3Layer) -> dict[str, View]:
    """The tensors of one decoder layer under ``prefix``."""
    attention, mlp = layer.self_attn, layer.mlp
    views = {
        "self_attn.o_proj.weight": View(attention.o_proj.weight, 1),
        "mlp.down_proj.weight": View(mlp.down_proj.weight, 1),
        "post_attention_layernorm.weight": View(layer.post_attention_layernorm.weight),
    }
    if layer.input_layernorm is not None:
        views["input_layernorm.weight"] = View(layer.input_layernorm.weight)
    if isinstance(layer, Eagle3Layer):
        views["hidden_norm.weight"] = View(layer.hidden_norm.weight)
    qkv = attention.qkv_proj
    for index, name in enumerate("qkv"):
        views[f"self_attn.{name}_proj.weight"] = View(qkv.weight[qkv.part(index)], 0)
        if qkv.bias is not None:
            views[f"self_attn.{name}_proj.bias"] = View(qkv.bias[qkv.part(index)], 0)
    for index, name in enumerate(("gate", "up")):
        rows = mlp.gate_up_proj.part(index)
        views[f"mlp.{name}_proj.weight"] = View(mlp.gate_up_proj.weight[rows], 0)
    return {prefix + name: view for name, view in views.items()}


@torch.no_grad()
def fill(views: dict[str, View], name: str, tensor: Tensor, ranks: Ranks, source: str) -> None:
    """Copy a checkpoint tensor into its view and take it off the table."""
    view = views.pop(name, None)
    if view is None:
        raise CheckpointError(
            f"{source}: tensor {name!r} has no place in this architecture; "
            "check that config.json belongs to these weights"
        )
    if view.shard_dim is not None:
        tensor = ranks.shard(tensor, view.shard_dim)
    if tensor.shape != view.tensor.shape:
        raise CheckpointError(
            f"{source}: tensor {name!r} has shape {tuple(tensor.shape)}, the configuration says "
            f"{tuple(view.tensor.shape)}; check that config.json belongs to these weights"
        )
    view.tensor.copy_(tensor)
