"""LlamaConfig: every layout of the same facts gives one value; the rest is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aquiline.core.errors import CheckpointError
from aquiline.models.config import LlamaConfig, RopeScaling

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
}
QWEN2 = {
    **LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "sliding_window": 4096,
    "use_sliding_window": False,
}
MISTRAL = {
    **LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
    "sliding_window": None,
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GGUF = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 16,
    "llama.context_length": 512,
}
FACTORS = (1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 8.0, 8.0)


def from_gguf(fields: dict[str, Any], factors: tuple[float, ...] = ()) -> LlamaConfig:
    return LlamaConfig.from_gguf(
        fields, vocab_size=128, tie_word_embeddings=False, rope_factors=factors
    )


def test_plain_llama() -> None:
    config = LlamaConfig.from_hf(LLAMA)
    assert config == LlamaConfig(
        architecture="LlamaForCausalLM", vocab_size=128, hidden_size=64, intermediate_size=96,
        num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5,
        rope_theta=500000.0, rope_scaling=None, max_position_embeddings=512,
        tie_word_embeddings=False, attention_bias=False,
    )  # fmt: skip


def test_qwen2_has_qkv_bias_and_an_unused_window() -> None:
    assert LlamaConfig.from_hf(QWEN2).attention_bias


@pytest.mark.parametrize(
    ("window", "context"), [({"sliding_window": None}, 512), ({"sliding_window": 100}, 100),
                            ({"sliding_window": 1000}, 512)],
)  # fmt: skip
def test_mistrals_window_bounds_the_context(window: dict[str, Any], context: int) -> None:
    config = LlamaConfig.from_hf({**MISTRAL, **window})
    assert (config.context, config.sliding_window) == (context, window["sliding_window"])
    assert not config.attention_bias
    assert LlamaConfig.from_hf(config.to_hf()) == config
    assert AutoConfig.for_model(**config.to_hf()).sliding_window == config.sliding_window
    plain = replace(config, architecture="LlamaForCausalLM", sliding_window=None)
    assert plain == LlamaConfig.from_hf(LLAMA)


def test_what_a_mistral_config_leaves_out_is_transformers_default_or_refused() -> None:
    unsaid = {name: value for name, value in MISTRAL.items() if name != "sliding_window"}
    assert (
        LlamaConfig.from_hf(unsaid).sliding_window == AutoConfig.for_model("mistral").sliding_window
    )
    with pytest.raises(CheckpointError, match="num_key_value_heads"):
        LlamaConfig.from_hf({**MISTRAL, "num_key_value_heads": None})
    with pytest.raises(CheckpointError, match="sliding_window=0"):
        LlamaConfig.from_hf({**MISTRAL, "sliding_window": 0})
    with pytest.raises(CheckpointError, match="sliding_attention"):
        LlamaConfig.from_hf({**MISTRAL, "layer_types": ["sliding_attention"] * 2})


def test_gguf_and_hf_agree() -> None:
    assert from_gguf(GGUF) == LlamaConfig.from_hf(LLAMA)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_rope_layouts_agree(key: str) -> None:
    old = {**LLAMA, "rope_scaling": {key: "llama3", **LLAMA3}}
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "llama3", **LLAMA3}
    assert LlamaConfig.from_hf(old) == LlamaConfig.from_hf(new)
    assert LlamaConfig.from_hf(old).rope_scaling == RopeScaling("llama3", **LLAMA3)


def test_default_rope_is_no_scaling() -> None:
    config = {**LLAMA, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    assert LlamaConfig.from_hf(config).rope_scaling is None
    assert LlamaConfig.from_hf(config).rope_theta == 7.0


SCALINGS = [
    None,
    RopeScaling("llama3", **LLAMA3),
    RopeScaling("factors", factors=FACTORS),
    RopeScaling("factors", factors=(4.0,) * 8),
]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("hf", [LLAMA, QWEN2, MISTRAL])
def test_to_hf_inverts_from_hf(hf: dict[str, Any], scaling: RopeScaling | None) -> None:
    config = replace(LlamaConfig.from_hf(hf), rope_scaling=scaling, tie_word_embeddings=True)
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("scaling", SCALINGS[2:])
def test_transformers_divides_by_the_factors_we_write(scaling: RopeScaling) -> None:
    ours = replace(LlamaConfig.from_hf(LLAMA), rope_scaling=scaling).to_hf()
    theirs = AutoConfig.for_model(**ours)
    rope_type = theirs.rope_parameters["rope_type"]
    for length in (16, 4096):
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope_type](theirs, "cpu", seq_len=length)
        plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
        torch.testing.assert_close(frequencies, plain / torch.tensor(scaling.factors))
        assert scale == 1.0


@pytest.mark.parametrize("hf", [LLAMA, QWEN2, MISTRAL])
def test_what_transformers_saves_is_read_back(hf: dict[str, Any]) -> None:
    config = replace(LlamaConfig.from_hf(hf), rope_scaling=RopeScaling("llama3", **LLAMA3))
    saved = AutoConfig.for_model(**config.to_hf()).to_dict()
    assert "rope_parameters" in saved
    assert LlamaConfig.from_hf(saved) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "architectures"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"hidden_size": 64.5}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [2], "short_factor": [1]}}, "long"),
    ],
)
def test_refusals_name_the_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as error:
        LlamaConfig.from_hf({**LLAMA, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ],
)
def test_a_qwen2_window_in_use_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        LlamaConfig.from_hf({**QWEN2, **change})


def test_gguf_rope_factors_and_linear_scaling() -> None:
    assert from_gguf(GGUF, FACTORS).rope_scaling == RopeScaling("factors", factors=FACTORS)
    linear = {**GGUF, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert from_gguf(linear).rope_scaling == RopeScaling("factors", factors=(4.0,) * 8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"general.architecture": "gemma"}, "gemma"),
        ({"general.architecture": "mistral"}, "mistral"),
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count"),
        ({"llama.attention.value_length": 32}, "value_length"),
        ({"llama.attention.head_count": [4, 2]}, "head_count"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.context_length": None}, "context_length"),
    ],
)
def test_gguf_refusals_name_the_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        from_gguf({**GGUF, **change})


def test_a_wrong_number_of_factors_is_refused() -> None:
    with pytest.raises(CheckpointError, match="rope factors"):
        from_gguf(GGUF, FACTORS[:3])
