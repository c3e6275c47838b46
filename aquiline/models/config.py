"""The shape of a Llama-family model, from whatever file describes it.

One frozen value for Llama, Qwen2 and Mistral, read from a Hugging Face config (the layout before
transformers 5, or since) or from GGUF metadata. Everything the forward pass does not implement is
refused here by name, so that no weight is ever read under a wrong assumption.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, cast

from aquiline.core.errors import CheckpointError

Architecture = Literal["LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM"]
_MODEL_TYPES: dict[str, Architecture] = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM",
}  # fmt: skip
_GGUF_TYPES = ("llama", "qwen2")  # a Mistral is converted as a llama
_MISTRAL_WINDOW = 4096  # what transformers takes where the config says nothing
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are stretched for long contexts.

    Attributes:
        rope_type: ``"llama3"``: long wavelengths by ``factor``, short ones not at all, those
            between smoothly; the four numbers below. ``"factors"``: each as listed, which is all
            that GGUF keeps of llama3 and which covers linear scaling too.
        factors: what each of the head_dim / 2 inverse frequencies is divided by.
    """

    rope_type: Literal["llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    factors: tuple[float, ...] = ()

    def to_hf(self, max_position_embeddings: int) -> dict[str, Any]:
        """The ``rope_scaling`` entry of a ``config.json``."""
        if self.rope_type == "llama3":
            numbers = {k: v for k, v in asdict(self).items() if k not in ("rope_type", "factors")}
            return {"rope_type": "llama3", **numbers}
        if len(set(self.factors)) == 1:
            return {"rope_type": "linear", "factor": self.factors[0]}
        # The one HF type that lists divisors; with equal lists it never switches between them.
        return {
            "rope_type": "longrope",
            "short_factor": list(self.factors),
            "long_factor": list(self.factors),
            "attention_factor": 1.0,
            "original_max_position_embeddings": max_position_embeddings,
        }


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama, Qwen2 or Mistral decoder.

    Attributes:
        attention_bias: a bias on q, k and v only (Qwen2).
        sliding_window: a token sees so many, itself included (Mistral); None: all before it. Only
            full attention is implemented, which is the same as long as a text is no longer.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        _require(
            self.num_heads % self.num_kv_heads == 0,
            "num_key_value_heads", self.num_kv_heads, f"must divide {self.num_heads} heads",
        )  # fmt: skip
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "RoPE needs an even size")
        factors = self.rope_scaling.factors if self.rope_scaling else ()
        _require(
            not factors or len(factors) == self.head_dim // 2,
            "rope factors", len(factors), f"must be head_dim / 2 = {self.head_dim // 2} numbers",
        )  # fmt: skip

    @property
    def context(self) -> int:
        """Tokens of the longest text that this forward pass computes as the model is meant."""
        return min(
            self.max_position_embeddings, self.sliding_window or self.max_position_embeddings
        )

    @property
    def context_limit(self) -> str:
        """What bounds ``context``, in words."""
        if self.context == self.max_position_embeddings:
            return f"the model's context is {self.context}"
        return f"sliding_window={self.sliding_window} is not implemented for longer texts"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """From a parsed ``config.json``.

        Raises:
            CheckpointError: names the field that is missing, malformed or not implemented.
        """
        architecture = _hf_architecture(config)
        _refuse_unimplemented(config, architecture)
        mistral = architecture == "MistralForCausalLM"
        config = {"sliding_window": _MISTRAL_WINDOW, **config} if mistral else config
        windowed = mistral and config["sliding_window"] is not None
        heads = _number(config, "num_attention_heads", int)
        hidden = _number(config, "hidden_size", int)
        head_dim = _number(config, "head_dim", int, hidden // heads)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = _number({"rope_theta": 10000.0, **config, **rope}, "rope_theta", float)
        return cls(
            architecture=architecture,
            vocab_size=_number(config, "vocab_size", int),
            hidden_size=hidden,
            intermediate_size=_number(config, "intermediate_size", int),
            num_layers=_number(config, "num_hidden_layers", int),
            num_heads=heads,
            num_kv_heads=_number(config, "num_key_value_heads", int, None if mistral else heads),
            head_dim=head_dim,
            rms_norm_eps=_number(config, "rms_norm_eps", float, 1e-6),
            rope_theta=theta,
            rope_scaling=_hf_rope_scaling(rope, head_dim),
            max_position_embeddings=_number(config, "max_position_embeddings", int),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=architecture == "Qwen2ForCausalLM",
            sliding_window=_number(config, "sliding_window", int) if windowed else None,
        )

    @classmethod
    def from_gguf(
        cls,
        fields: Mapping[str, Any],
        *,
        vocab_size: int,
        tie_word_embeddings: bool,
        rope_factors: tuple[float, ...] = (),
    ) -> LlamaConfig:
        """From GGUF metadata and the three facts that a GGUF file keeps in its tensors.

        Args:
            fields: the metadata, name to plain Python value.
            vocab_size: rows of ``token_embd.weight``.
            tie_word_embeddings: there is no ``output.weight``.
            rope_factors: the values of ``rope_freqs.weight``; empty if there is none.
        """
        name = fields.get("general.architecture")
        _require(name in _GGUF_TYPES, "general.architecture", name, _SUPPORTED)
        prefix = f"{name}."
        own = {key.removeprefix(prefix): v for key, v in fields.items() if key.startswith(prefix)}
        heads = _number(own, "attention.head_count", int)
        hidden = _number(own, "embedding_length", int)
        head_dim = _number(own, "attention.key_length", int, hidden // heads)
        for key, implemented in {
            "attention.value_length": head_dim,
            "rope.dimension_count": head_dim,
            "attention.sliding_window": 0,
            "expert_count": 0,
        }.items():
            value = own.get(key, implemented)
            _require(value == implemented, key, value, f"only {implemented} is implemented here")
        return cls(
            architecture=_MODEL_TYPES[cast(str, name)],
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=_number(own, "feed_forward_length", int),
            num_layers=_number(own, "block_count", int),
            num_heads=heads,
            num_kv_heads=_number(own, "attention.head_count_kv", int, heads),
            head_dim=head_dim,
            # Stored in single precision: seven digits give back the decimal number meant.
            rms_norm_eps=float(f"{_number(own, 'attention.layer_norm_rms_epsilon', float):.7g}"),
            rope_theta=_number(own, "rope.freq_base", float, 10000.0),
            rope_scaling=_gguf_rope_scaling(own, rope_factors, head_dim),
            max_position_embeddings=_number(own, "context_length", int),
            tie_word_embeddings=tie_word_embeddings,
            attention_bias=name == "qwen2",
        )

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` that old and new transformers read alike; ``from_hf`` inverts it."""
        scaling, mistral = self.rope_scaling, self.architecture == "MistralForCausalLM"
        return {
            "architectures": [self.architecture],
            "model_type": next(k for k, v in _MODEL_TYPES.items() if v == self.architecture),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling.to_hf(self.max_position_embeddings) if scaling else None,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            **({"sliding_window": self.sliding_window} if mistral else {}),
        }


_SUPPORTED = f"aquiline runs {', '.join(_MODEL_TYPES.values())}"


def _require(ok: bool, field: str, value: object, remedy: str) -> None:
    if not ok:
        raise CheckpointError(f"{field}={value!r}: {remedy}")


def _number(
    config: Mapping[str, Any], field: str, kind: type[_Number], default: _Number | None = None
) -> _Number:
    """A positive number; an absent or null field is the default, or an error without one."""
    value = config.get(field)
    value = default if value is None else value
    _require(value is not None, field, None, "the field is missing; add it to the config")
    exact = isinstance(value, int | kind) and not isinstance(value, bool)
    _require(exact and cast(float, value) > 0, field, value, f"give a positive {kind.__name__}")
    return kind(cast(float, value))


def _hf_architecture(config: Mapping[str, Any]) -> Architecture:
    names = config.get("architectures") or [_MODEL_TYPES.get(str(config.get("model_type")))]
    name = names[0] if isinstance(names, list) else names
    _require(name in _MODEL_TYPES.values(), "architectures", name, _SUPPORTED)
    return cast(Architecture, name)


def _refuse_unimplemented(config: Mapping[str, Any], architecture: Architecture) -> None:
    activation = config.get("hidden_act", "silu")
    _require(activation in ("silu", "swish"), "hidden_act", activation, "only silu is implemented")
    # Qwen2 lists a sliding window it does not use; its own switch and layer_types decide. Mistral's
    # bounds the context.
    windows = {"Qwen2ForCausalLM": ["use_sliding_window"], "LlamaForCausalLM": ["sliding_window"]}
    window = windows.get(architecture, [])
    for field in (*window, "attention_bias", "mlp_bias", "quantization_config"):
        value = config.get(field)
        _require(not value, field, value, "not implemented; use a checkpoint without it")
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    _require(not kinds, "layer_types", sorted(kinds), "only full_attention is implemented")
    rotated = {**config, **(config.get("rope_parameters") or {})}.get("partial_rotary_factor") or 1
    _require(rotated == 1, "partial_rotary_factor", rotated, "only 1 is implemented")


def _hf_rope_scaling(rope: Mapping[str, Any], head_dim: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return _linear(_number(rope, "factor", float), head_dim)
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=_number(rope, "factor", float),
            low_freq_factor=_number(rope, "low_freq_factor", float),
            high_freq_factor=_number(rope, "high_freq_factor", float),
            original_max_position_embeddings=_number(rope, "original_max_position_embeddings", int),
        )
    factors = rope.get("long_factor") or ()
    constant = factors == rope.get("short_factor") and rope.get("attention_factor") == 1.0
    _require(
        kind == "longrope" and constant,
        "rope_type", kind, "only default, linear, llama3 and a longrope of equal lists work",
    )  # fmt: skip
    return RopeScaling("factors", factors=tuple(factors))


def _gguf_rope_scaling(
    own: Mapping[str, Any], factors: tuple[float, ...], head_dim: int
) -> RopeScaling | None:
    kind = own.get("rope.scaling.type", "none")
    _require(kind in ("none", "linear"), "rope.scaling.type", kind, "only linear is implemented")
    if kind == "none":
        return RopeScaling("factors", factors=factors) if factors else None
    _require(not factors, "rope.scaling.type", kind, "cannot be joined with rope_freqs.weight")
    return _linear(_number(own, "rope.scaling.factor", float), head_dim)


def _linear(factor: float, head_dim: int) -> RopeScaling:
    return RopeScaling("factors", factors=(factor,) * (head_dim // 2))
