"""Models of known shapes with random weights, and drafts whose acceptance is given.

Nobody needs the weights of Llama-3.1-8B to know how long its rounds take. What a round accepts is
then synthetic: a rule that accepts by coin toss, with a probability for each depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aquiline.decoding.models import DecoderModels, Drafter
from aquiline.layers.rotary import RotaryEmbedding
from aquiline.models.config import LlamaConfig
from aquiline.models.eagle3 import random_eagle3
from aquiline.models.llama import Llama, inverse_frequencies
from aquiline.speculation.tree import TreeShape
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


TINY = LlamaConfig(  # to try a benchmark without a card
    architecture="LlamaForCausalLM", vocab_size=512, hidden_size=64, intermediate_size=96,
    num_layers=8, num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5,
    rope_theta=10000.0, rope_scaling=None, max_position_embeddings=16384,
    tie_word_embeddings=False, attention_bias=False,
)  # fmt: skip
TINY_DRAFT_VOCAB = 128


@torch.no_grad()
def random_llama(config: LlamaConfig, max_positions: int, device: str = "cuda") -> Llama:
    """A target in bf16, weights from N(0, 0.02^2)."""
    with torch.device("meta"):
        model = Llama(config, max_positions)
    model = model.to(torch.bfloat16).to_empty(device=device).requires_grad_(False).eval()
    model.rotary = RotaryEmbedding(inverse_frequencies(config), max_positions).to(
        device, torch.bfloat16
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            nn.init.normal_(parameter, std=0.02)
    return model


def random_models(
    config: LlamaConfig,
    max_positions: int,
    draft_vocab: int | None = DRAFT_VOCAB,
    device: str = "cuda",
) -> DecoderModels:
    """A target with a one-layer EAGLE-3 draft, or alone if ``draft_vocab`` is None."""
    target = random_llama(config, max_positions, device)
    drafter = None if draft_vocab is None else Drafter(*random_eagle3(target, draft_vocab))
    return DecoderModels(target, drafter)


def models_for(device: str) -> DecoderModels:
    """Llama-3.1-8B's shapes on a card; elsewhere tiny ones, to try a benchmark."""
    if device == "cuda":
        return random_models(LLAMA_31_8B, 16384)
    return random_models(TINY, 16384, TINY_DRAFT_VOCAB, device)


def synthetic(by_depth: Sequence[float]) -> RuleFactory:
    """A rule that walks down first children: depth d is reached in a share ``by_depth[d - 1]`` of
    the rounds. Everything else is the coupled rule's work, and done.

    The coin is a hash of (seed, position), a handful of small kernels.
    """
    constants: dict[tuple[TreeShape, torch.device], tuple[Tensor, Tensor]] = {}

    def constants_of(shape: TreeShape, device: torch.device) -> tuple[Tensor, Tensor]:
        """Shares [D], and the first child's first child ... at each depth [D + 1]; copied to the
        device before a graph is captured, where no copy may wait."""
        if (shape, device) not in constants:
            first = [0]
            while shape.children[first[-1]]:
                first.append(shape.children[first[-1]][0])
            shares = torch.tensor(by_depth[: len(first) - 1], dtype=torch.float64, device=device)
            constants[shape, device] = shares, torch.tensor(first, device=device)
        return constants[shape, device]

    class Synthetic(Coupled):
        def accept(self, tokens: Tensor, logits: Tensor) -> Verdict:
            super().accept(tokens, logits)
            round_, tree = self.round, self.round.tree
            shares, first = constants_of(tree.shape, tokens.device)
            x = round_.positions[:, :1] * 0x1E3779B97F4A7C15 + round_.sampling.seeds[:, None]
            for multiplier in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
                x = (x ^ (x >> 29)) * multiplier
            coin = ((x >> 11) & (2**52 - 1)).double() * 2.0**-52
            return verdict_of(tree, first[(coin < shares).sum(dim=-1)], tokens)

    return Synthetic
