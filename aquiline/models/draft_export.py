"""Export: a draft for the engine that will run it, loaded back and compared before anyone relies
on it.

| format | wiring | for |
|---|---|---|
| eagle | EAGLE-1 | vLLM, the EAGLE repository, aquiline |
| sglang | EAGLE-1 | SGLang, whose class has an fc.bias, random if the file has none |
| eagle3 | EAGLE-3 | vLLM, SGLang and aquiline alike: the tapped layers in both of their meanings |
| speculators | EAGLE-3 | vLLM, which starts it from the draft's folder alone |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aquiline.core.errors import CheckpointError
from aquiline.models.checkpoint import Checkpoint
from aquiline.models.draft import EagleDraft
from aquiline.models.draft_checkpoint import (
    Layout,
    LoadedDraft,
    load_draft,
    public_layout,
    write_layout,
)
from aquiline.models.draft_files import SPECULATORS_SHAPE
from aquiline.models.eagle3 import Eagle3Draft
from aquiline.models.llama import Llama, inverse_frequencies

DraftFormat = Literal["eagle", "sglang", "eagle3", "speculators"]
SPECULATIVE_TOKENS = 3  # what vLLM drafts unless told otherwise, of a folder started on its own
_FIRST = "midlayer."


def target_shell(checkpoint: Checkpoint) -> Llama:
    """A target of which only the embedding is there, in fp32: what reading a draft needs of it."""
    with torch.device("meta"):
        shell = Llama(checkpoint.config, 1)
    for name, tensor in checkpoint.tensors():
        if name == "model.embed_tokens.weight":
            shell.embed_tokens.weight = nn.Parameter(tensor.float(), requires_grad=False)
            return shell
    raise CheckpointError(f"{checkpoint.path}: tensor 'model.embed_tokens.weight' is missing")


def export_draft(
    loaded: LoadedDraft,
    target: Llama,
    folder: Path,
    form: DraftFormat,
    dtype: torch.dtype,
    target_name: str,
) -> None:
    """Write ``loaded`` into ``folder``, which must be new or empty, and load it back.

    Args:
        target: the draft's own, or its shell.
        target_name: what a speculators folder calls its verifier: a path or a hub's name.

    Raises CheckpointError if the format cannot carry the draft, or if what is read differs.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: not an empty folder; give a new one")
    layout = public_layout(loaded.draft, loaded.head, target.embed_tokens.weight)
    write_layout(folder, _adapt(layout, loaded, form, target, target_name), dtype)
    verify_draft(folder, loaded, target, dtype)


def verify_draft(folder: Path, loaded: LoadedDraft, target: Llama, dtype: torch.dtype) -> None:
    """Read ``folder`` and compare it with what was written there in ``dtype``.

    The reader refuses a tensor that nothing consumes and a parameter that nothing fills; here every
    value must be what it was. Raises CheckpointError.
    """
    again = load_draft(folder, target, 1)
    mine, theirs = dict(_values(loaded)), dict(_values(again))
    for name in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(name), theirs.get(name)
        present = b if a is None else a
        assert present is not None
        if name == "draft.fc.bias" and (a is None or b is None):  # absent means zero
            same = not present.any()
        else:
            weight = name.startswith(("draft.", "head."))
            same = a is not None and b is not None and _same(a, b, dtype if weight else a.dtype)
        if not same:
            raise CheckpointError(f"{folder}: {name} is not what was written; export again")


def _same(written: Tensor, read: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(written.to(dtype).to(read), read)


def _values(loaded: LoadedDraft) -> Iterator[tuple[str, Tensor]]:
    """Everything that decides what a draft says."""
    draft = loaded.draft
    for prefix, module in (("draft.", draft), ("head.", loaded.head)):
        for name, parameter in module.named_parameters(prefix.rstrip(".")):
            yield name, parameter.detach()
    yield "taps", torch.tensor(draft.taps)
    yield "rope", inverse_frequencies(draft.config)
    yield "shape", torch.tensor([draft.config.num_heads, draft.config.head_dim])
    if loaded.token_ids is not None:
        yield "token_ids", loaded.token_ids.cpu()
    if isinstance(draft, Eagle3Draft):
        yield "norm_before_residual", torch.tensor(draft.norm_before_residual)


def _adapt(
    layout: Layout, loaded: LoadedDraft, form: DraftFormat, target: Llama, target_name: str
) -> Layout:
    wiring = "EAGLE-1" if isinstance(loaded.draft, EagleDraft) else "EAGLE-3"
    if (form in ("eagle", "sglang")) != (wiring == "EAGLE-1"):
        other = "eagle or sglang" if wiring == "EAGLE-1" else "eagle3 or speculators"
        raise CheckpointError(f"format={form!r}: the draft is {wiring}; give {other}")
    if form == "eagle":
        return _plain_eagle1(layout)
    if form == "sglang":
        return _sglang_eagle1(layout)
    assert isinstance(loaded.draft, Eagle3Draft)
    if form == "speculators":
        return _speculators(layout, target, target_name)
    if loaded.draft.norm_before_residual:
        raise CheckpointError(
            "format='eagle3': the draft has norm_before_residual=true, which SGLang does not "
            "compute; give speculators, for vLLM alone"
        )
    if min(loaded.draft.taps) == 0:
        raise CheckpointError(
            f"format='eagle3': the draft taps {list(loaded.draft.taps)}; 0, the embedding, is no "
            "layer's output and has no name in SGLang; give speculators, for vLLM alone"
        )
    return layout


def _plain_eagle1(layout: Layout) -> Layout:
    tensors = dict(layout.tensors)
    bias = tensors.pop("fc.bias", None)
    if bias is not None and bias.any():
        raise CheckpointError(
            "format='eagle': the draft's fc.bias is not zero, and vLLM has no place for one; give "
            "sglang"
        )
    return replace(layout, tensors=tensors, config={**layout.config, "bias": False})


def _sglang_eagle1(layout: Layout) -> Layout:
    weight = layout.tensors["fc.weight"]
    tensors = {"fc.bias": weight.new_zeros(weight.shape[0]), **layout.tensors}
    own = {"architectures": ["LlamaForCausalLMEagle"], "bias": True}
    return replace(layout, tensors=tensors, config={**layout.config, **own})


def _speculators(layout: Layout, target: Llama, target_name: str) -> Layout:
    """One document: the draft's Llama shape nested, what is not Llama's beside it."""
    own_fields = ("draft_vocab_size", "norm_before_residual", "eagle_aux_hidden_state_layer_ids")
    own = {name: layout.config[name] for name in own_fields}
    dropped = {*own_fields, "eagle_config"}
    shape = {name: value for name, value in layout.config.items() if name not in dropped}
    shape["architectures"] = ["LlamaForCausalLM"]
    proposal = {"proposal_type": "greedy", "speculative_tokens": SPECULATIVE_TOKENS}
    config: dict[str, Any] = {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
        "norm_before_fc": False, **own, SPECULATORS_SHAPE: shape,
        "speculators_config": {
            "algorithm": "eagle3", "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {
                "name_or_path": target_name, "architectures": [target.config.architecture]
            },
        },
    }  # fmt: skip
    tensors = {
        name.replace(_FIRST, "layers.0.", 1) if name.startswith(_FIRST) else name: tensor
        for name, tensor in layout.tensors.items()
    }
    return Layout(config, tensors, None)
