"""Exports: what each engine reads is there, and what is read back is what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aquiline.core.errors import CheckpointError
from aquiline.models.checkpoint import open_checkpoint
from aquiline.models.config import LlamaConfig, RopeScaling
from aquiline.models.draft import DraftHead, EagleDraft
from aquiline.models.draft_checkpoint import LoadedDraft, load_draft
from aquiline.models.draft_export import DraftFormat, export_draft, target_shell, verify_draft
from aquiline.models.eagle3 import Eagle3Draft, random_eagle3
from aquiline.models.llama import Llama
from tests.tiny_checkpoint import make_draft, tiny_config, write_target

ROPE = {"rope_theta": 5e5, "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64)}
D = 32


def make_target() -> Llama:
    torch.manual_seed(0)
    config = tiny_config(context=512, layers=8, tie_word_embeddings=True, **ROPE)
    return Llama(config, 64).requires_grad_(False)


@pytest.fixture(scope="module")
def target() -> Llama:
    return make_target()


def eagle1(target: Llama, layers: int = 1, token_ids: list[int] | None = None) -> LoadedDraft:
    draft = make_draft(layers, copies=False, context=512, **ROPE)
    ids = None if token_ids is None else torch.tensor(token_ids)
    return LoadedDraft(draft, DraftHead(target, ids))


def eagle3(target: Llama, layers: int = 1, **options: Any) -> LoadedDraft:
    return LoadedDraft(*random_eagle3(target, 40, layers, **options))


def export(
    loaded: LoadedDraft, target: Llama, folder: Path, form: DraftFormat
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    export_draft(loaded, target, folder, form, torch.float32, "some/target")
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config


@pytest.mark.parametrize("layers", [1, 3])
def test_plain_eagle1(layers: int, tmp_path: Path, target: Llama) -> None:
    loaded = eagle1(target, layers, token_ids=[3, 5, 8])
    tensors, config = export(loaded, target, tmp_path / "out", "eagle")
    assert "fc.bias" not in tensors
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["bias"], config["num_hidden_layers"]) == (False, layers)
    assert config["max_position_embeddings"] == 512
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert torch.equal(tensors["embed_tokens.weight"], target.embed_tokens.weight)
    again = load_draft(tmp_path / "out", target, 64)
    assert again.token_ids is not None
    assert again.token_ids.tolist() == [3, 5, 8]


def test_sglang_gets_a_zero_bias_and_its_own_class(tmp_path: Path, target: Llama) -> None:
    tensors, config = export(eagle1(target), target, tmp_path / "out", "sglang")
    assert tensors["fc.bias"].shape == (D,)
    assert not tensors["fc.bias"].any()
    assert config["bias"] is True
    assert config["architectures"] == ["LlamaForCausalLMEagle"]
    assert config["tie_word_embeddings"] is False  # a tied draft has no head to replace there
    back, plain = export(load_draft(tmp_path / "out", target, 1), target, tmp_path / "b", "eagle")
    assert "fc.bias" not in back
    assert plain["bias"] is False


def test_bias_that_is_not_zero_has_no_plain_form(tmp_path: Path, target: Llama) -> None:
    draft = EagleDraft(make_draft().config, 16, fc_bias=True)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter)
    loaded = LoadedDraft(draft, DraftHead(target, None))
    with pytest.raises(CheckpointError, match=r"fc\.bias is not zero"):
        export(loaded, target, tmp_path / "out", "eagle")
    tensors, _ = export(loaded, target, tmp_path / "sglang", "sglang")
    assert torch.equal(tensors["fc.bias"], draft.fc.bias)


@pytest.mark.parametrize("layers", [1, 3])
def test_eagle3_serves_vllm_and_sglang(layers: int, tmp_path: Path, target: Llama) -> None:
    tensors, config = export(eagle3(target, layers), target, tmp_path / "out", "eagle3")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]  # inputs of layers
    nested = config["eagle_config"]
    assert nested["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]  # outputs of layers
    assert config["norm_before_residual"] is False
    assert config["tie_word_embeddings"] is False
    assert config["draft_vocab_size"] == len(tensors["lm_head.weight"]) == 40
    for index in range(1, layers):
        norms = [
            tensors[f"layers.{index}.{name}.weight"] for name in ("input_layernorm", "hidden_norm")
        ]
        assert torch.equal(*norms)


def test_speculators(tmp_path: Path, target: Llama) -> None:
    tensors, config = export(eagle3(target, 2), target, tmp_path / "out", "speculators")
    assert not any(name.startswith("midlayer.") for name in tensors)
    assert tensors["layers.0.self_attn.q_proj.weight"].shape == (32, 2 * D)
    assert config["architectures"] == ["Eagle3Speculator"]
    assert config["norm_before_residual"] is False
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["speculators_config"]["verifier"]["name_or_path"] == "some/target"
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    nested = LlamaConfig.from_hf(config["transformer_layer_config"])
    assert (nested.num_layers, nested.rope_theta) == (2, 5e5)


def test_residual_after_the_norm_is_vllms_alone(tmp_path: Path, target: Llama) -> None:
    plain = eagle3(target)
    draft = Eagle3Draft(plain.draft.config, (2, 4, 5), 64, norm_before_residual=True)
    draft.load_state_dict(plain.draft.state_dict())
    loaded = LoadedDraft(draft, plain.head)
    with pytest.raises(CheckpointError, match=r"norm_before_residual=true.*speculators"):
        export(loaded, target, tmp_path / "out", "eagle3")
    _, config = export(loaded, target, tmp_path / "out", "speculators")
    assert config["norm_before_residual"] is True


def test_tap_of_the_embedding_has_no_name_in_sglang(tmp_path: Path, target: Llama) -> None:
    loaded = eagle3(target, taps=(0, 3, 8))
    with pytest.raises(CheckpointError, match=r"\[0, 3, 8\].*speculators"):
        export(loaded, target, tmp_path / "out", "eagle3")
    export(loaded, target, tmp_path / "out", "speculators")


@pytest.mark.parametrize(
    ("make", "form", "message"),
    [(eagle1, "eagle3", "EAGLE-1; give eagle or"), (eagle3, "sglang", "EAGLE-3; give eagle3 or")],
)
def test_format_of_the_other_wiring(
    make: Any, form: DraftFormat, message: str, tmp_path: Path, target: Llama
) -> None:
    with pytest.raises(CheckpointError, match=message):
        export(make(target), target, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_folder_in_use_is_left_alone(tmp_path: Path, target: Llama) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export(eagle1(target), target, tmp_path, "eagle")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [eagle1, eagle3])
def test_a_changed_value_is_noticed(
    make: Any, dtype: torch.dtype, tmp_path: Path, target: Llama
) -> None:
    loaded = make(target, 2)
    form: DraftFormat = "eagle" if make is eagle1 else "eagle3"
    export_draft(loaded, target, tmp_path / "out", form, dtype, "t")
    file = tmp_path / "out/model.safetensors"
    whole = load_file(file)
    for name in ("fc.weight", "layers.1.post_attention_layernorm.weight"):
        changed = {key: tensor.clone() for key, tensor in whole.items()}
        changed[name].view(-1)[5] += 0.5
        save_file(changed, file)
        with pytest.raises(CheckpointError, match="is not what was written"):
            verify_draft(tmp_path / "out", loaded, target, dtype)


@pytest.mark.parametrize(("field", "value"), [("rope_theta", 1e4), ("num_attention_heads", 2)])
def test_a_changed_config_is_noticed(
    field: str, value: float, tmp_path: Path, target: Llama
) -> None:
    loaded = eagle1(target)
    _, config = export(loaded, target, tmp_path / "out", "eagle")
    changes = {field: value} | ({"head_dim": 16, "num_key_value_heads": 1} if value == 2 else {})
    (tmp_path / "out/config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match="is not what was written"):
        verify_draft(tmp_path / "out", loaded, target, torch.float32)


def test_a_shell_is_enough_of_a_target(tmp_path: Path) -> None:
    folder = write_target(tmp_path / "target", layers=8)
    shell = target_shell(open_checkpoint(folder))
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(shell.embed_tokens.weight, stored)
    assert all(p.is_meta for name, p in shell.named_parameters() if "embed" not in name)
    draft = make_draft(1, copies=False)
    loaded = LoadedDraft(draft, DraftHead(shell, torch.tensor([1, 2])))
    export(loaded, shell, tmp_path / "out", "eagle")
    assert load_draft(tmp_path / "out", shell, 1).token_ids is not None
