"""Eagle3Draft: the EAGLE-3 wiring with 1..N dense layers.

The target is tapped at several layers; ``fuse`` makes one hidden state of the taps (k * d to d).
The first layer reads embedding and hidden state side by side (layers/eagle3.py), the rest are
Llama's. A step hands its hidden state to the next as it is, before the final norm; logits are
lm_head(norm(hidden)) over the draft's own vocabulary. Unlike EAGLE-1 the hidden state is the
draft's own language: it is not meant to equal the target's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aquiline.attention.backend import Attention
from aquiline.core.errors import CheckpointError
from aquiline.kernels import ops
from aquiline.layers.decoder import DecoderLayer, run_layers
from aquiline.layers.eagle3 import Eagle3Layer
from aquiline.layers.linear import ColumnParallelLinear, pack_linears
from aquiline.layers.norm import RMSNorm
from aquiline.layers.rotary import RotaryEmbedding
from aquiline.models.config import LlamaConfig
from aquiline.models.draft import Draft, Head, Vocabulary, draft_config
from aquiline.models.llama import Llama, inverse_frequencies, layer_shape
from aquiline.models.names import View, layer_views


class Eagle3Draft(Draft):
    """The layers and ``fc``; ``config.num_layers`` counts the first layer too."""

    def __init__(
        self,
        config: LlamaConfig,
        taps: tuple[int, ...],
        max_positions: int,
        norm_before_residual: bool = False,
    ) -> None:
        super().__init__(config, taps)
        self.norm_before_residual = norm_before_residual
        self.fc = ColumnParallelLinear(self.feature_size, (config.hidden_size,))
        shape = layer_shape(config)
        self.midlayer = Eagle3Layer(shape, norm_before_residual)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(config.num_layers - 1))
        self.rotary = RotaryEmbedding(inverse_frequencies(config), max_positions)

    def fuse(self, features: Tensor) -> Tensor:
        """Taps side by side, ascending [..., k * d] -> [..., d]."""
        fused: Tensor = self.fc(features.to(self.fc.weight.dtype))
        return fused

    def forward(
        self, embeddings: Tensor, hidden: Tensor, positions: Tensor, attention: Attention
    ) -> Tensor:
        """embeddings (of tokens i+1), hidden [B, T, d], positions i [B, T] -> the next hidden."""
        angles = self.rotary(positions, embeddings.dtype)
        hidden = hidden.to(embeddings.dtype)
        norms = [layer.input_norm for layer in self.layers if isinstance(layer, DecoderLayer)]
        next_norm = norms[0] if norms else None
        x = self.midlayer(embeddings, hidden, next_norm, angles, attention, 0)
        *_, last = run_layers(self.layers, x, None, angles, attention, first=1)
        return last.x


class Eagle3Head(Head):
    """The draft's own final norm and LM head; its own embedding only where it differs."""

    def __init__(
        self,
        target: Vocabulary,
        config: LlamaConfig,
        draft_vocab: int,
        token_ids: Tensor | None,
        embedding: Tensor | None = None,
    ) -> None:
        super().__init__(target, token_ids)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = ColumnParallelLinear(config.hidden_size, (draft_vocab,))
        self.embed_tokens: nn.Embedding | None = None
        if embedding is not None:
            rows, width = embedding.shape
            self.embed_tokens = nn.Embedding(rows, width, _weight=embedding)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., Vd] logits."""
        logits: Tensor = self.lm_head(ops.Normed(hidden, self.norm.fused))
        return logits

    def embed(self, tokens: Tensor) -> Tensor:
        if self.embed_tokens is None:
            return super().embed(tokens)
        embedded: Tensor = self.embed_tokens(tokens)
        return embedded

    def pack(self) -> None:
        pack_linears(self)


def default_taps(target: LlamaConfig) -> tuple[int, ...]:
    """Inputs of layers 2, n / 2 and n - 3: what public drafts were trained on.

    Raises CheckpointError for a target with too few layers to have them.
    """
    count = target.num_layers
    taps = (2, count // 2, count - 3)
    if not taps[0] < taps[1] < taps[2]:
        raise CheckpointError(
            f"eagle_aux_hidden_state_layer_ids: a target of {count} layers has no default; list "
            "the layers in the draft's config"
        )
    return taps


def eagle3_views(draft: Eagle3Draft, head: Eagle3Head, first: str = "midlayer.") -> dict[str, View]:
    """Public tensor names (vocabulary maps and embedding aside) and what they fill.

    ``first`` is what the first layer is called: "midlayer.", or "layers.0." by speculators.
    """
    views = {
        "fc.weight": View(draft.fc.weight),
        "norm.weight": View(head.norm.weight),
        "lm_head.weight": View(head.lm_head.weight),
        **layer_views(first, draft.midlayer),
    }
    for index, layer in enumerate(draft.layers, start=1):
        assert isinstance(layer, DecoderLayer)
        views |= layer_views(f"layers.{index}.", layer)
    return views


@torch.no_grad()
def random_eagle3(
    target: Llama,
    draft_vocab: int,
    layers: int = 1,
    taps: tuple[int, ...] | None = None,
    seed: int = 0,
) -> tuple[Eagle3Draft, Eagle3Head]:
    """A draft of the right shape that knows nothing: for benchmarks and tests.

    Every matrix is from N(0, 0.02^2); the draft vocabulary is spread evenly over the target's.
    """
    weight, vocab = target.embed_tokens.weight, target.config.vocab_size
    assert 1 <= draft_vocab <= vocab
    config = draft_config(target.config, layers, None)
    taps = default_taps(target.config) if taps is None else taps
    with torch.device(weight.device):
        token_ids = (
            None if draft_vocab == vocab else torch.arange(draft_vocab) * vocab // draft_vocab
        )
        draft = Eagle3Draft(config, taps, len(target.rotary.table))
        head = Eagle3Head(target, config, draft_vocab, token_ids)
    generator = torch.Generator(weight.device).manual_seed(seed)
    for module in (draft, head):
        module.to(weight.dtype).requires_grad_(False).eval()
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02, generator=generator)
    return draft, head
