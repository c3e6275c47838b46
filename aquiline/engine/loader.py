"""From names to models: resolve, open, check that target and draft fit, load, pack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from aquiline.core.errors import AquilineError
from aquiline.core.params import AUTO_TREE, SpeculationParams
from aquiline.decoding.models import DecoderModels, Drafter
from aquiline.engine.config import DTYPES, PREFILL_BUDGETS, EngineConfig, PrefillBudget
from aquiline.kernels.cpu import native_bf16
from aquiline.models.checkpoint import open_checkpoint
from aquiline.models.draft_checkpoint import load_draft
from aquiline.models.llama import Llama, load_llama
from aquiline.models.registry import resolve, shipped_draft
from aquiline.speculation.dispatch.default import BatchRule
from aquiline.speculation.dispatch.dispatcher import OneTree, Retrieving, TreeChooser
from aquiline.speculation.dispatch.table import DispatchTable
from aquiline.speculation.tree import TreeShape
from aquiline.speculation.verification.rules import RULES, RuleFactory
from aquiline.text.tokenizer import Tokenizer, load_tokenizer

DEFAULT_CHAIN = 3


@dataclass(frozen=True)
class LoadedModel:
    """Everything an engine needs to start.

    Attributes:
        room: slots that a running request needs past its committed length.
        rule: how rounds are verified.
        kv_cache_tokens: what the device has memory for; None on the CPU.
    """

    models: DecoderModels
    tokenizer: Tokenizer
    chooser: TreeChooser
    room: int
    kv_cache_tokens: int | None
    max_model_len: int
    prefill_budget: PrefillBudget
    sampling_defaults: dict[str, object]
    rule: RuleFactory


Loader = Callable[[EngineConfig], LoadedModel]


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in PREFILL_BUDGETS or (name == "cuda" and not torch.cuda.is_available()):
        raise AquilineError(f"device={name!r}: give 'auto', 'cpu', or 'cuda' where there is one")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the device multiplies it natively, else float32."""
    if name not in DTYPES:
        raise AquilineError(f"dtype={name!r}: one of {DTYPES}")
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" or native_bf16() else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def chooser_of(speculation: SpeculationParams | None) -> TreeChooser:
    """What picks the trees that the parameters ask for; a root alone without speculation."""
    if speculation is None:
        return OneTree(TreeShape.chain(0))
    chooser = _drafted(speculation)
    return Retrieving(chooser, speculation.retrieval) if speculation.retrieval else chooser


def rule_of(speculation: SpeculationParams | None) -> RuleFactory:
    """The rule that the parameters ask for; without speculation the coupled one draws."""
    return RULES["coupled" if speculation is None else speculation.verification]


def _drafted(speculation: SpeculationParams) -> TreeChooser:
    if speculation.tree == AUTO_TREE:
        if speculation.dispatch_table is None:
            return BatchRule(speculation.verification)
        return DispatchTable.load(speculation.dispatch_table).dispatcher(speculation.verification)
    if isinstance(speculation.tree, str):
        return OneTree(TreeShape.named(speculation.tree))
    if speculation.tree is not None:
        return OneTree(TreeShape.of(speculation.tree))
    return OneTree(TreeShape.chain(speculation.num_speculative_tokens or DEFAULT_CHAIN))


def load(config: EngineConfig) -> LoadedModel:
    """Load the target, its tokenizer and, with speculation, its draft."""
    path = resolve(config.model)
    checkpoint = open_checkpoint(path)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    context = checkpoint.config.context
    max_model_len = config.max_model_len or context
    if max_model_len > context:
        raise AquilineError(
            f"max_model_len={max_model_len}: {checkpoint.config.context_limit}; give at most "
            f"{context}"
        )
    chooser = chooser_of(config.speculation)
    # One round's tree, and what a round in flight may still commit.
    room = 2 * max(tree.size for tree in chooser.candidates)
    config.pages(max_model_len, room)  # refuse a cache that is too small before loading
    positions = max_model_len + room
    target = load_llama(checkpoint, dtype, device, positions)
    drafter = None
    if config.speculation is not None:
        drafter = _drafter(config.speculation, config.model, target, positions)
    models = DecoderModels(target, drafter)
    models.pack()
    return LoadedModel(
        models, load_tokenizer(path), chooser, room, kv_cache_tokens(config, models),
        max_model_len, config.prefill_budget(device.type),
        _sampling_defaults(checkpoint.generation_config), rule_of(config.speculation),
    )  # fmt: skip


def kv_cache_tokens(config: EngineConfig, models: DecoderModels) -> int | None:
    """What fits beside the weights in this share of the card; None on the CPU."""
    if models.device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(models.device).total_memory
    left = config.gpu_memory_utilization * total - torch.cuda.memory_allocated(models.device)
    return max(0, int(left) // models.bytes_per_token())


def _drafter(
    speculation: SpeculationParams, target_name: str, target: Llama, positions: int
) -> Drafter:
    folder = Path(speculation.model) if speculation.model else shipped_draft(target_name)
    if folder is None:
        raise AquilineError(
            f"speculative_config: no draft is shipped for {target_name!r}; give its folder as "
            "'model'"
        )
    loaded = load_draft(folder, target, positions, speculation.method)
    return Drafter(loaded.draft, loaded.head)


def _sampling_defaults(generation_config: dict[str, object]) -> dict[str, object]:
    """The checkpoint's own sampling settings, where it has any."""
    if not generation_config.get("do_sample", False):
        return {}
    names = ("temperature", "top_k", "top_p", "min_p")
    return {name: generation_config[name] for name in names if generation_config.get(name)}
