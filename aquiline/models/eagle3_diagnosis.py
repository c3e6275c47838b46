"""EAGLE-3's own traps: tapped layers, vocabulary maps, the residual, later layers' norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aquiline.core.errors import CheckpointError
from aquiline.models.config import LlamaConfig
from aquiline.models.draft_files import SPECULATORS_SHAPE, DraftFiles
from aquiline.models.eagle3_checkpoint import TAPS, tapped_layers
from aquiline.models.finding import ALL, Engine, Finding
from aquiline.models.llama import Llama


def eagle3_findings(files: DraftFiles, config: LlamaConfig, target: Llama) -> Iterator[Finding]:
    yield _taps(files, target.config)
    yield _residual(files)
    yield _vocabulary_maps(files, target.config.vocab_size)
    if config.num_layers > 1:
        yield _later_norms(files, config.num_layers)


def _taps(files: DraftFiles, target: LlamaConfig) -> Finding:
    """Trap 2: one name, two meanings."""
    top = files.config.get(TAPS)
    nested = (files.config.get("eagle_config") or {}).get(TAPS)
    try:
        taps = list(tapped_layers(files.source, files.config, target))
    except CheckpointError as error:
        says = str(error).removeprefix(f"{files.source}: ")
        return Finding("taps", says, ALL, "list ascending layers of the target")
    default = [2, target.num_layers // 2, target.num_layers - 3]
    if top is None and nested is None:
        return Finding("taps", f"not stated; every engine taps the inputs of layers {taps}")
    if top == [layer - 1 for layer in default]:
        return Finding(
            "taps",
            f"{TAPS} {top} looks like SGLang's meaning (outputs): vLLM and aquiline read inputs "
            f"of layers, one too early; the usual ones are {default}",
            ("aquiline", "vllm"), "move the list into eagle_config and write each plus one above",
        )  # fmt: skip
    if top is None:
        return Finding(
            "taps",
            f"only eagle_config.{TAPS} {nested} (outputs of layers): vLLM reads it as inputs, one "
            "too early",
            ("vllm",), f"add {TAPS} {taps} at the top level",
        )  # fmt: skip
    if nested is None and taps != default:
        return Finding(
            "taps", f"only {TAPS} {top} at the top level: SGLang ignores it and taps {default}",
            ("sglang",), f"add eagle_config.{TAPS} {[tap - 1 for tap in taps]}",
        )  # fmt: skip
    return Finding("taps", f"the inputs of layers {taps}, in every engine")


def _residual(files: DraftFiles) -> Finding:
    value: Any = files.config.get("norm_before_residual")
    if value is None and SPECULATORS_SHAPE in files.config:
        return Finding(
            "norm_before_residual", "not stated: vLLM and aquiline take true, as this layout has "
            "it", ("sglang",), "state it; SGLang computes false alone",
        )  # fmt: skip
    if value:
        return Finding(
            "norm_before_residual", "true: SGLang computes false all the same", ("sglang",),
            "serve it with vLLM, or train with false",
        )  # fmt: skip
    return Finding("norm_before_residual", "false, as every engine computes it")


def _vocabulary_maps(files: DraftFiles, vocab: int) -> Finding:
    """Trap 6: rows of the head and the tokens they stand for."""
    offsets, marks = files.tensors.get("d2t"), files.tensors.get("t2d")
    if offsets is None:
        return Finding("d2t", "none: the draft says the whole vocabulary")
    if len(offsets) == vocab:
        return Finding(
            "d2t", "there although the draft has the whole vocabulary: vLLM refuses the key",
            ("vllm",), "aquiline export --format eagle3",
        )  # fmt: skip
    rows = torch.arange(len(offsets))
    if holds_ids(offsets, marks, vocab):
        return Finding(
            "d2t", "holds token ids; every engine adds the row's own number to them", ALL,
            "subtract it: d2t[i] = id - i",
        )  # fmt: skip
    ids = offsets + rows
    if int(ids.min()) < 0 or int(ids.max()) >= vocab or len(set(ids.tolist())) < len(ids):
        return Finding(
            "d2t", "leads outside the vocabulary or to one token twice", ALL,
            "take the one that was saved with this lm_head",
        )  # fmt: skip
    if marks is not None and not torch.equal((marks != 0).nonzero().flatten(), ids.sort().values):
        return Finding(
            "d2t", "t2d marks other tokens; one of the two is of another vocabulary, which no "
            "engine but aquiline notices", ALL, "take those saved with this lm_head",
        )  # fmt: skip
    if not bool((ids.diff() > 0).all()):
        return Finding(
            "d2t", "its tokens are not ascending: rows of lm_head may have been pinned to another "
            "order", ALL, "resume with the d2t that the head was trained with",
        )  # fmt: skip
    return Finding("d2t", f"{len(ids)} of {vocab} tokens, offsets, in agreement with t2d")


def holds_ids(offsets: Tensor, marks: Tensor | None, vocab: int) -> bool:
    """Whether ``d2t`` lists token ids instead of offsets; without ``t2d`` only if it is plain."""
    if marks is not None:
        return torch.equal((marks != 0).nonzero().flatten(), offsets.sort().values)
    outside = int((offsets + torch.arange(len(offsets))).max()) >= vocab
    return outside and bool((offsets.diff() > 0).all())


def _later_norms(files: DraftFiles, layers: int) -> Finding:
    """Trap 3: one norm, two names."""
    readers: dict[str, Engine] = {"input_layernorm": "vllm", "hidden_norm": "sglang"}
    for name, engine in readers.items():
        absent = [i for i in range(1, layers) if f"layers.{i}.{name}.weight" not in files.tensors]
        if absent:
            return Finding(
                "later norms", f"layers {absent} have no {name}, which {engine} reads: it stays "
                "all ones", (engine,), "aquiline export --format eagle3",
            )  # fmt: skip
    return Finding("later norms", "under both of their names")
