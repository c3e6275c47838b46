"""Draft folders: the public EAGLE-1 layout, there and back; everything else refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aquiline.core.errors import CheckpointError
from aquiline.models.config import LlamaConfig
from aquiline.models.draft import DraftHead, EagleDraft, draft_config
from aquiline.models.draft_checkpoint import load_draft, save_draft
from aquiline.models.llama import Llama
from tests.tiny_checkpoint import VOCAB, make_draft, tiny_config

LAYER_KEYS = {
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
    "self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
    "mlp.down_proj.weight", "post_attention_layernorm.weight",
}  # fmt: skip


def make_target(**changes: object) -> Llama:
    torch.manual_seed(0)
    target = Llama(tiny_config(**changes), 16)
    torch.nn.init.normal_(target.lm_head.weight)
    return target.requires_grad_(False)


@pytest.fixture(scope="module")
def target() -> Llama:
    return make_target()


@pytest.fixture
def folder(tmp_path: Path, target: Llama) -> Path:
    save_draft(tmp_path, make_draft(1, copies=False), None, target.embed_tokens.weight)
    return tmp_path


def public_keys(layers: int) -> set[str]:
    keys = {"fc.weight", "embed_tokens.weight"}
    for index in range(layers):
        keys |= {f"layers.{index}.{key}" for key in LAYER_KEYS}
        if index:
            keys.add(f"layers.{index}.input_layernorm.weight")
    return keys


@pytest.mark.parametrize("layers", [1, 3])
def test_round_trip_in_the_public_layout(layers: int, tmp_path: Path, target: Llama) -> None:
    draft = make_draft(layers, copies=False)
    save_draft(tmp_path, draft, None, target.embed_tokens.weight, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == public_keys(layers)
    assert stored["fc.weight"].shape == (32, 64)
    assert stored["layers.0.self_attn.k_proj.weight"].shape == (16, 32)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["num_hidden_layers"] == layers
    assert saved["bias"] is False
    loaded = load_draft(tmp_path, target, 64)
    assert loaded.token_ids is None
    assert loaded.draft.config == draft.config
    for (name, mine), (_, theirs) in zip(
        draft.named_parameters(), loaded.draft.named_parameters(), strict=True
    ):
        assert mine.equal(theirs), name
        assert not theirs.requires_grad


def test_bias_of_fc_round_trips(tmp_path: Path, target: Llama) -> None:
    draft = EagleDraft(draft_config(tiny_config(), 1, None), 16, fc_bias=True)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter)
    save_draft(tmp_path, draft, None, None, torch.float32)
    assert draft.fc.bias is not None
    assert load_file(tmp_path / "model.safetensors")["fc.bias"].shape == (32,)
    loaded = load_draft(tmp_path, target, 16).draft
    assert loaded.fc.bias is not None
    assert loaded.fc.bias.equal(draft.fc.bias)


def test_default_dtype_is_bfloat16_and_loading_takes_the_targets(
    folder: Path, target: Llama
) -> None:
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert load_draft(folder, target, 16).draft.fc.weight.dtype == torch.float32


def test_embedding_is_optional(tmp_path: Path, target: Llama) -> None:
    save_draft(tmp_path, make_draft(1, copies=False), None, None, torch.float32)
    assert "embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    load_draft(tmp_path, target, 16)


def test_reduced_vocabulary_is_a_side_file(tmp_path: Path, target: Llama) -> None:
    ids = torch.tensor([3, 5, 100, VOCAB - 1])
    save_draft(tmp_path, make_draft(), DraftHead(target, ids), target.embed_tokens.weight)
    assert set(load_file(tmp_path / "model.safetensors")) == public_keys(1)
    loaded = load_draft(tmp_path, target, 16)
    assert loaded.token_ids is not None
    assert loaded.token_ids.equal(ids)
    head = DraftHead(target, loaded.token_ids)
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(head(x), target.logits(x)[..., ids])
    assert head.to_target(torch.tensor([[3, 0]])).tolist() == [[VOCAB - 1, 3]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([1, VOCAB]), "outside the vocabulary"),
        (torch.tensor([-1, 2]), "outside the vocabulary"),
        (torch.zeros(2, 2, dtype=torch.int64), "token_ids"),
        (torch.zeros(0, dtype=torch.int64), "token_ids"),
    ],
)
def test_bad_reduced_vocabulary_is_refused(
    ids: Tensor, message: str, folder: Path, target: Llama
) -> None:
    save_file({"token_ids": ids}, folder / "draft_vocabulary.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_draft(folder, target, 16)


def test_reduced_vocabulary_with_a_token_twice_is_refused(folder: Path, target: Llama) -> None:
    """Two siblings with one token would both match: multi-round would count it twice."""
    ids = torch.tensor([5, 5, 9])
    save_file({"token_ids": ids}, folder / "draft_vocabulary.safetensors")
    with pytest.raises(CheckpointError, match="draft_vocabulary"):
        load_draft(folder, target, 16)


PUBLIC = {  # as published beside EAGLE-1 weights of Llama models; shrunk
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 1, "pad_token_id": 0, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True,
    "vocab_size": VOCAB, "bias": False,
}  # fmt: skip
SHAPES = {
    "embed_tokens.weight": (VOCAB, 32), "fc.weight": (32, 64),
    "layers.0.self_attn.q_proj.weight": (32, 32), "layers.0.self_attn.k_proj.weight": (16, 32),
    "layers.0.self_attn.v_proj.weight": (16, 32), "layers.0.self_attn.o_proj.weight": (32, 32),
    "layers.0.mlp.gate_proj.weight": (48, 32), "layers.0.mlp.up_proj.weight": (48, 32),
    "layers.0.mlp.down_proj.weight": (32, 48), "layers.0.post_attention_layernorm.weight": (32,),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaForCausalLMEagle"])
@pytest.mark.parametrize("bias", [True, False])
def test_public_draft_loads(bias: bool, architecture: str, tmp_path: Path, target: Llama) -> None:
    torch.manual_seed(1)
    tensors = {name: torch.randn(shape).half() for name, shape in SHAPES.items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if bias:
        tensors["fc.bias"] = torch.randn(32).half()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    config = PUBLIC | {"architectures": [architecture], "bias": bias}
    (tmp_path / "config.json").write_text(json.dumps(config))
    draft = load_draft(tmp_path, target, 16, "eagle").draft
    assert isinstance(draft, EagleDraft)
    assert (draft.fc.bias is not None) == bias
    held = sum(parameter.numel() for parameter in draft.parameters())
    named = (n for n in tensors if n != "embed_tokens.weight" and "inv_freq" not in n)
    assert held == sum(tensors[name].numel() for name in named)
    assert torch.equal(draft.fc.weight, tensors["fc.weight"].float())


def test_metas_llama4_layout_is_refused_with_the_engine_that_runs_it(
    tmp_path: Path, target: Llama
) -> None:
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    tensors |= {"layers.0.input_layernorm.weight": torch.ones(32), "norm.weight": torch.ones(32)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC))
    with pytest.raises(CheckpointError, match="Llama 4 drafts, which only vLLM's EagleLlama4"):
        load_draft(tmp_path, target, 16)


def add(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.ones(32)

    return change


def remove(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def misshape(tensors: dict[str, Tensor]) -> None:
    tensors["fc.weight"] = torch.zeros(32, 96)


def narrow(tensors: dict[str, Tensor]) -> None:
    tensors["embed_tokens.weight"] = torch.zeros(VOCAB, 16)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "EAGLE-3 midlayer": (add("midlayer.hidden_norm.weight"), "EAGLE-3"),
    "EAGLE-3 d2t": (add("d2t"), "'d2t' belongs to an EAGLE-3"),
    "EAGLE-3 t2d": (add("t2d"), "'t2d' belongs to an EAGLE-3"),
    "input norm on layer 0": (add("layers.0.input_layernorm.weight"), "input norm on layer 0"),
    "final norm": (add("norm.weight"), "final norm"),
    "missing": (remove("layers.0.mlp.up_proj.weight"), "'layers.0.mlp.up_proj.weight' is missing"),
    "fc missing": (remove("fc.weight"), "'fc.weight' is missing"),
    "unknown": (add("layers.1.mlp.up_proj.weight"), "'layers.1.mlp.up_proj.weight' has no place"),
    "misshaped": (misshape, "'fc.weight' has shape"),
    "embedding of another width": (narrow, "embed_tokens.weight has shape"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_wrong_tensors_are_refused_by_name(damage: str, folder: Path, target: Llama) -> None:
    change, message = DAMAGE[damage]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_draft(folder, target, 16, "eagle")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64, "num_heads": 8}, "hidden_size is 32, the target's is 64"),
        ({"vocab_size": 300}, f"vocab_size is {VOCAB}, the target's is 300"),
    ],
)
def test_draft_of_another_target_is_refused(
    changes: dict[str, object], message: str, folder: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_draft(folder, make_target(**changes), 16)


def test_damaged_files_are_refused(folder: Path, target: Llama) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for kept in (len(whole) - 100, 200, 4, 0):
        weights.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load_draft(folder, target, 16)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file is missing"):
        load_draft(folder, target, 16)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_draft(folder, target, 16)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_draft(folder, target, 16)


def test_config_field_at_fault_is_named_with_its_folder(folder: Path, target: Llama) -> None:
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"hidden_act": "gelu"}))
    with pytest.raises(CheckpointError, match=rf"{folder.name}.*hidden_act"):
        load_draft(folder, target, 16)


def test_draft_of_a_qwen2_target_reloads(tmp_path: Path) -> None:
    qwen = make_target(architecture="Qwen2ForCausalLM", attention_bias=True)
    draft = EagleDraft(draft_config(qwen.config, 2, 40), 16)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter)
    save_draft(tmp_path, draft, None, qwen.embed_tokens.weight, torch.float32)
    saved = LlamaConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert saved == draft.config
    assert (saved.attention_bias, saved.intermediate_size) == (False, 40)
    loaded = load_draft(tmp_path, qwen, 16).draft
    for mine, theirs in zip(draft.parameters(), loaded.parameters(), strict=True):
        assert mine.equal(theirs)
