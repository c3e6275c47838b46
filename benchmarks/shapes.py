"""Models of known shapes with random weights, and drafts whose acceptance is given.

Nobody needs the weights of Llama-3.1-8B to know how long its rounds take. What a round accepts is
then synthetic: a rule that accepts by coin toss, with a probability for each depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aquiline.decoding.models import DecoderModels, Drafter
from aquiline.kernels import ops
from aquiline.layers.rotary import RotaryEmbedding
from aquiline.models.config import LlamaConfig
from aquiline.models.eagle3 import random_eagle3
from aquiline.models.llama import Llama, inverse_frequencies
from aquiline.speculation.verification.coupled import Coupled
from aquiline.speculation.verification.rules import RuleFactory
from aquiline.speculation.verification.verdict import Verdict, verdict_of

DRAFT_VOCAB = 32000
LLAMA_31_8B = LlamaConfig(
    architecture="LlamaForCausalLM", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
    num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, rms_norm_eps=1e-5,
    rope_theta=500000.0, rope_scaling=None, max_position_embeddings=131072,
    tie_word_embeddings=False, attention_bias=False,
)  # fmt: skip


@torch.no_grad()
def random_llama(config: LlamaConfig, max_positions: int) -> Llama:
    """A target on CUDA in bf16, weights from N(0, 0.02^2)."""
    with torch.device("meta"):
        model = Llama(config, max_positions)
    model = model.to(torch.bfloat16).to_empty(device="cuda").requires_grad_(False).eval()
    model.rotary = RotaryEmbedding(inverse_frequencies(config), max_positions).to(
        "cuda", torch.bfloat16
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            nn.init.normal_(parameter, std=0.02)
    return model


def random_models(
    config: LlamaConfig, max_positions: int, draft_vocab: int | None = DRAFT_VOCAB
) -> DecoderModels:
    """A target with a one-layer EAGLE-3 draft, or alone if ``draft_vocab`` is None."""
    target = random_llama(config, max_positions)
    drafter = None if draft_vocab is None else Drafter(*random_eagle3(target, draft_vocab))
    return DecoderModels(target, drafter)


def synthetic(by_depth: Sequence[float]) -> RuleFactory:
    """A rule that walks down first children: depth d is reached in a share ``by_depth[d - 1]`` of
    the rounds. Everything else is the coupled rule's work, and done."""

    class Synthetic(Coupled):
        def accept(self, tokens: Tensor, logits: Tensor) -> Verdict:
            super().accept(tokens, logits)
            round_, tree = self.round, self.round.tree
            sampling = round_.sampling
            coin = ops.uniform_noise(
                sampling.seeds, sampling.choices, round_.positions[:, :1], 1, ops.Stream.ACCEPT
            )[:, 0]
            shares = torch.tensor(by_depth, dtype=coin.dtype).to(coin.device)
            depth = (coin < shares[: tree.shape.depth]).sum(dim=-1)
            first = [0]
            while tree.shape.children[first[-1]]:
                first.append(tree.shape.children[first[-1]][0])
            leaf = torch.tensor(first).to(coin.device)[depth.clamp(max=len(first) - 1)]
            return verdict_of(tree, leaf, tokens)

    return Synthetic
