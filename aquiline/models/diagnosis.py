"""What a draft folder says about itself, checked against its target without running it.

Each check is a known way to lose acceptance silently: an engine reads the folder, finds nothing to
complain of and drafts nonsense. A finding names the engines that would, why, and the remedy. What
was read of them: vLLM 0.32 (llama_eagle.py, llama_eagle3.py, gpu_model_runner.py) and SGLang 0.5.23
(llama_eagle.py, llama_eagle3.py, spec_aux_hidden_state.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquiline.core.errors import CheckpointError
from aquiline.models.config import LlamaConfig
from aquiline.models.draft import EagleDraft, draft_views
from aquiline.models.draft_checkpoint import build_draft, read_shape
from aquiline.models.draft_files import DraftFiles
from aquiline.models.eagle3 import Eagle3Draft, Eagle3Head, eagle3_views
from aquiline.models.eagle3_checkpoint import rows_differ
from aquiline.models.eagle3_diagnosis import eagle3_findings
from aquiline.models.finding import ALL, OTHERS, Engine, Finding
from aquiline.models.llama import Llama, inverse_frequencies

STATED_NOTHING = 10000.0  # the rope theta of engines whose draft config states none


def diagnose(files: DraftFiles, target: Llama) -> list[Finding]:
    """Every check that applies to the draft's wiring, whether or not it loads.

    ``target`` needs to be no more than its shell (models/draft_export.py).
    """
    findings = [_wiring(files), _loads(files, target)]
    try:
        config = read_shape(files, target.config)
    except CheckpointError:
        return findings  # said by the loader; nothing else can be trusted
    findings += [
        _tensors(files, config, target), _values(files),
        _embedding(files, target.embed_tokens.weight), _rope(files, config, target.config),
        _context(files, target.config),
    ]  # fmt: skip
    findings.append(_tied_head(files))
    findings += (
        eagle3_findings(files, config, target) if files.method == "eagle3" else [_bias(files)]
    )
    return findings


def _wiring(files: DraftFiles) -> Finding:
    name, found = files.architecture, f"{files.method} keys under {files.architecture}"
    if files.method == "eagle3":
        if name == "Eagle3Speculator":
            return Finding(
                "wiring", f"{found}: SGLang has no such class", ("sglang",),
                "aquiline export --format eagle3",
            )  # fmt: skip
        if name == "LlamaForCausalLMEagle3":
            return Finding("wiring", found)
        return Finding(
            "wiring",
            f"{found}: SGLang runs it as a plain Llama and skips its keys (TPC 1.00); vLLM needs "
            "method eagle3",
            ("sglang",), "set architectures to LlamaForCausalLMEagle3",
        )  # fmt: skip
    if name == "LlamaForCausalLMEagle":
        return Finding(
            "wiring", f"{found}, SGLang's own: vLLM knows no class of that name", ("vllm",),
            "aquiline export --format eagle",
        )  # fmt: skip
    if name == "LlamaForCausalLM":
        return Finding(
            "wiring", f"{found}: SGLang runs it as a plain Llama and skips its keys", ("sglang",),
            "aquiline export --format sglang",
        )  # fmt: skip
    return Finding(
        "wiring", f"{found}: its keys are EAGLE-1's, the name is not", OTHERS,
        "set architectures to LlamaForCausalLM",
    )  # fmt: skip


def _loads(files: DraftFiles, target: Llama) -> Finding:
    try:
        build_draft(files, target, 1)
    except CheckpointError as error:
        says = str(error).removeprefix(f"{files.source}: ")
        return Finding("loading", f"refused: {says}", ("aquiline",), "as the message says")
    return Finding("loading", "every tensor is consumed, every parameter filled")


def _tensors(files: DraftFiles, config: LlamaConfig, target: Llama) -> Finding:
    """Trap 8: a wrong name is skipped by one engine and a gap passes in another."""
    expected, stored = _expected_names(files, config, target), set(files.tensors)
    stored = {name for name in stored if not name.endswith("rotary_emb.inv_freq")}
    optional = {"embed_tokens.weight", "d2t", "t2d", "fc.bias"}
    optional |= {f"layers.{i}.hidden_norm.weight" for i in range(1, config.num_layers)}
    optional |= {f"layers.{i}.input_layernorm.weight" for i in range(1, config.num_layers)}
    missing, unknown = sorted(expected - stored - optional), sorted(stored - expected - optional)
    if missing:
        return Finding(
            "tensors", f"{_few(missing)} missing: vLLM leaves them as they happen to be", ALL,
            "export the draft again",
        )  # fmt: skip
    if unknown:
        return Finding(
            "tensors", f"{_few(unknown)} unknown: SGLang skips them without a word", ALL,
            "rename them, or check num_hidden_layers",
        )  # fmt: skip
    return Finding("tensors", f"{len(stored)} tensors, none missing, none unknown")


def _expected_names(files: DraftFiles, config: LlamaConfig, target: Llama) -> set[str]:
    with torch.device("meta"):
        if files.method == "eagle":
            return set(draft_views(EagleDraft(config, 1)))
        draft, head = Eagle3Draft(config, (0, 1, 2), 1), Eagle3Head(target, config, 1, None)
    named = any(name.startswith("layers.0.") for name in files.tensors)
    return set(eagle3_views(draft, head, "layers.0." if named else "midlayer."))


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def _values(files: DraftFiles) -> Finding:
    floats = {n: t for n, t in files.tensors.items() if t.is_floating_point()}
    broken = [name for name, tensor in floats.items() if not tensor.isfinite().all()]
    empty = [n for n, t in floats.items() if t.dim() > 1 and not t.any()]
    if broken:
        return Finding("values", f"{_few(broken)}: NaN or infinity", ALL, "take an older one")
    if empty:
        return Finding(
            "values", f"{_few(empty)}: all zero, as in a half-written file", ALL,
            "export the draft again",
        )  # fmt: skip
    return Finding("values", "all finite")


def _embedding(files: DraftFiles, target: Tensor) -> Finding:
    own = files.tensors.get("embed_tokens.weight")
    if own is None:
        return Finding(
            "embedding", "none: aquiline, vLLM and SGLang use the target's; the EAGLE repository "
            "needs one",
        )  # fmt: skip
    differ = rows_differ(own, target)
    if not differ:
        return Finding("embedding", "the target's")
    share = f"{differ} of {len(own)} rows are not the target's"
    engines: tuple[Engine, ...] = (
        ("sglang",) if files.method == "eagle3" else ("aquiline", "sglang")
    )
    return Finding(
        "embedding",
        f"{share}: {' and '.join(engines)} would use the target's all the same; it may have been "
        "trained for another target",
        engines, "train with the target's embedding, frozen",
    )  # fmt: skip


def _rope(files: DraftFiles, config: LlamaConfig, target: LlamaConfig) -> Finding:
    """Trap 4, the half that moves positions."""
    if not files.states_rope:
        if _same_rope(STATED_NOTHING, target):
            return Finding("rope", "not stated; the default is the target's")
        return Finding(
            "rope",
            f"not stated: vLLM and SGLang take theta {STATED_NOTHING:g} unscaled, aquiline the "
            f"target's ({target.rope_theta:g})",
            OTHERS, "write into the config what the draft was trained with",
        )  # fmt: skip
    same = torch.allclose(inverse_frequencies(config), inverse_frequencies(target), rtol=1e-4)
    if same:
        return Finding("rope", f"the target's, theta {target.rope_theta:g}")
    scaled = "" if config.rope_scaling is None else ", scaled"
    return Finding(
        "rope",
        f"states theta {config.rope_theta:g}{scaled}, the target has {target.rope_theta:g}: right "
        "only if it was trained so",
        ALL, "copy the target's rope block, unless measuring says otherwise",
    )  # fmt: skip


def _same_rope(theta: float, target: LlamaConfig) -> bool:
    return target.rope_theta == theta and target.rope_scaling is None


def _context(files: DraftFiles, target: LlamaConfig) -> Finding:
    """Trap 4, the half that ends them."""
    stated, needed = files.shape.get("max_position_embeddings"), target.max_position_embeddings
    if isinstance(stated, int) and stated < needed:
        return Finding(
            "context",
            f"max_position_embeddings {stated}, the target's is {needed}: SGLang stops, or reads "
            "past the rope table where told to go on, as vLLM before 0.32 did",
            ("sglang",), f"write max_position_embeddings {needed}",
        )  # fmt: skip
    return Finding("context", f"{stated} positions; the target has {needed}")


def _bias(files: DraftFiles) -> Finding:
    """Trap 5, EAGLE-1 only."""
    bias, stated = files.tensors.get("fc.bias"), files.config.get("bias")
    if bias is None:
        if stated is True:
            return Finding(
                "fc.bias", "the config says bias, the file has none: the EAGLE repository and "
                "SGLang leave it random", ("sglang",), "set bias to false; for SGLang export it "
                "with --format sglang",
            )  # fmt: skip
        return Finding(
            "fc.bias", "none: SGLang builds one regardless and leaves it random", ("sglang",),
            "aquiline export --format sglang",
        )  # fmt: skip
    if bias.any():
        return Finding(
            "fc.bias", "not zero: vLLM's fc has no place for it", ("vllm",), "train without a bias"
        )
    return Finding(
        "fc.bias", "zero, for SGLang: vLLM refuses the key", ("vllm",),
        "aquiline export --format eagle",
    )  # fmt: skip


def _tied_head(files: DraftFiles) -> Finding:
    if not files.shape.get("tie_word_embeddings"):
        return Finding("tied head", "no: the draft's head is not its embedding")
    does = (
        "skips lm_head and drafts with the embedding"
        if files.method == "eagle3"
        else "stops at start, replacing one weight twice"
    )
    return Finding(
        "tied head", f"tie_word_embeddings is true: SGLang {does}", ("sglang",),
        "set tie_word_embeddings to false",
    )  # fmt: skip
