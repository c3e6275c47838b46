"""TransformersTeacher: any causal language model that transformers knows, as the frozen target.

Its feature is what its LM head reads, its taps are what its decoder layers read. Whatever cannot be
taken for granted about an unknown architecture is tried on a few tokens when it is loaded: that the
head is a plain matrix, and that packed documents give what each gives alone. If they do not, every
document is a forward pass of its own, which is slower and always right.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from aquiline.core.errors import CheckpointError
from aquiline.models.config import LlamaConfig
from aquiline.training import packed_transformers
from aquiline.training.packing import PackedBatch
from aquiline.training.teacher import Teacher, TeacherOutput

FEW = 8  # tokens that a model is tried on


class TransformersTeacher(Teacher):
    """``causal``: a model of transformers with a language-model head, on its device.

    Raises CheckpointError if its logits are not its head times its features.
    """

    def __init__(self, causal: Any) -> None:
        self.causal = causal.requires_grad_(False).eval()
        self._layers = _decoder_layers(causal)
        rows = self.head_weight.shape[0]
        self._config = draft_shape(causal.config, rows)
        self.packed = False
        sample = self._sample(rows)
        alone = self(sample, ()).features
        with torch.no_grad():
            logits = causal(input_ids=sample.tokens[None, :FEW], use_cache=False).logits
        if not _close(logits, self.logits(alone[:, :FEW])):
            raise CheckpointError(
                f"{type(causal).__name__}: its logits are not its LM head times its last hidden "
                "state (a bias, a cap or a scale comes after), so a draft could not use the head"
            )
        self.packed = self._packs(sample, alone)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> TransformersTeacher:
        """From a Hugging Face folder; CheckpointError if transformers cannot read it."""
        try:
            causal = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{folder}: transformers cannot load it: {reason}") from None
        return cls(causal.to(device))

    @property
    def config(self) -> LlamaConfig:
        return self._config

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    @property
    def head_weight(self) -> Tensor:
        weight: Tensor = self.causal.get_output_embeddings().weight
        return weight

    @property
    def model(self) -> nn.Module:
        base: nn.Module = self.causal.base_model
        return base

    @property
    def layers(self) -> nn.ModuleList:
        return self._layers

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.causal.get_input_embeddings()(tokens)
        return embedded

    def to(self, device: torch.device) -> None:
        self.causal.to(device)

    @torch.no_grad()
    def __call__(self, batch: PackedBatch, taps: Sequence[int]) -> TeacherOutput:
        if self.packed:
            edges, longest = batch.cu_seqlens, batch.max_seqlen
            return self._forward(
                batch.tokens, batch.positions, taps, cu_seq_lens_q=edges, cu_seq_lens_k=edges,
                max_length_q=longest, max_length_k=longest,
            )  # fmt: skip
        parts = []
        for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
            position = torch.arange(end - start, device=self.device)
            parts.append(self._forward(batch.tokens[start:end], position, taps))
        features = torch.cat([part.features for part in parts], dim=1)
        tapped = zip(*(part.taps for part in parts), strict=True)
        return TeacherOutput(features, tuple(torch.cat(tap, dim=1) for tap in tapped))

    def _forward(
        self, tokens: Tensor, positions: Tensor, taps: Sequence[int], **more: Any
    ) -> TeacherOutput:
        """tokens, positions [N] -> [1, N, d]; hooks catch what the tapped layers read."""
        caught: dict[int, Tensor] = {}

        def reads(index: int) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                caught[index] = args[0] if args else kwargs["hidden_states"]

            return hook

        def writes(_: nn.Module, __: Any, out: Any) -> None:
            caught[len(self._layers)] = out[0] if isinstance(out, tuple) else out

        hooks = [
            self._layers[tap].register_forward_pre_hook(reads(tap), with_kwargs=True)
            if tap < len(self._layers)
            else self._layers[-1].register_forward_hook(writes)
            for tap in taps
        ]
        try:
            out = self.model(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False, **more
            )
        finally:
            for hook in hooks:
                hook.remove()
        return TeacherOutput(out.last_hidden_state, tuple(caught[tap] for tap in taps))

    def _sample(self, vocab_size: int) -> PackedBatch:
        """Two documents, the first longer than any window of the model's attention."""
        text = self.causal.config.get_text_config()
        windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
        longest = min(
            FEW + max(filter(None, windows), default=0), self.config.max_position_embeddings
        )
        lengths = (longest, FEW)
        tokens = torch.arange(sum(lengths), device=self.device) * 7919 % vocab_size
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        edges = torch.tensor([0, longest, longest + FEW], dtype=torch.int32, device=self.device)
        return PackedBatch(tokens, tokens > 0, positions, edges, longest, 0.0)

    def _packs(self, sample: PackedBatch, alone: Tensor) -> bool:
        """Whether the documents of ``sample`` packed give ``alone``; the model is left so."""
        usual = self.causal.config._attn_implementation
        try:
            self.causal.set_attn_implementation(packed_transformers.NAME)
            self.packed = True
            if _close(self(sample, ()).features, alone):
                return True
        except (NotImplementedError, RuntimeError, TypeError, ValueError, KeyError):
            pass  # an architecture with attention of its own
        self.causal.set_attn_implementation(usual)
        return False


def draft_shape(config: Any, vocab_size: int | None = None) -> LlamaConfig:
    """The shape of a draft: the model's own if it is a Llama, else its sizes with plain rope."""
    text = config.get_text_config()
    try:
        return LlamaConfig.from_hf(text.to_dict())
    except CheckpointError:
        pass
    hidden, heads = text.hidden_size, text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    return LlamaConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size or text.vocab_size,
        hidden_size=hidden,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * hidden,
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        rms_norm_eps=getattr(text, "rms_norm_eps", None) or 1e-6,
        rope_theta=float(rope.get("rope_theta") or 10000.0),
        rope_scaling=None,
        max_position_embeddings=getattr(text, "max_position_embeddings", None) or 8192,
        tie_word_embeddings=False,
        attention_bias=False,
    )


def read_shape(folder: Path) -> LlamaConfig:
    """``draft_shape`` from the folder's ``config.json``; no weights are read."""
    try:
        return draft_shape(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: transformers cannot read it: {reason}") from None


def _decoder_layers(causal: Any) -> nn.ModuleList:
    count = causal.config.get_text_config().num_hidden_layers
    for module in causal.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise CheckpointError(f"{type(causal).__name__}: its {count} decoder layers were not found")


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, which grows with the largest value."""
    allowed = 1e-4 if a.dtype == torch.float32 else 5e-2
    return bool((a.float() - b.float()).abs().max() <= allowed * b.float().abs().max())
